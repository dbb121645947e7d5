// Picture files.
#pragma once

#include <filesystem>

#include "resize.h"

// A PNG or JPEG, upright, transparent parts over white. Throws Error where it cannot be
// read or is over a limit, which is known before a pixel is decoded.
Image read_picture(const std::filesystem::path& path, const Limits& limits);
