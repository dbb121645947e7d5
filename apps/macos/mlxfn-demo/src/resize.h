// A picture as the square of pixels that the encoder takes, equal to mm1_mlx/resize.py.
#pragma once

#include <cstdint>
#include <vector>

#include "sidecar.h"

// Rows of RGB.
struct Image {
  int width = 0, height = 0;
  std::vector<uint8_t> pixels;

  Image() = default;
  Image(int width, int height)
      : width(width), height(height), pixels(size_t(width) * height * 3) {}
  uint8_t* at(int x, int y) { return &pixels[(size_t(y) * width + x) * 3]; }
  const uint8_t* at(int x, int y) const { return &pixels[(size_t(y) * width + x) * 3]; }
};

// Pixels [size, size, 3] of mean 0, by the sidecar's image section.
std::vector<float> to_pixels(const Image& image, const ImageSheet& sheet);
