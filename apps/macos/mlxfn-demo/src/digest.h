// A file's SHA-256.
#pragma once

#include <filesystem>
#include <string>

// In hexadecimal.
std::string sha256(const std::filesystem::path& path);
