// SHA-256, in hexadecimal.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

std::string sha256(const std::filesystem::path& path);
std::string sha256(const std::vector<float>& values);
