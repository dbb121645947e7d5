#include "resize.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>

#include "error.h"

namespace {

// Above these, only strips reach an intermediate picture of such a size.
constexpr int64_t kMaxEnlarged = 1 << 24, kMaxSquare = 1 << 27;

// The part of an axis that is resized.
struct Range {
  float first, last;
};

// Pillow's bicubic resampling, src/libImaging/Resample.c: weights in fixed point, a pass
// along the rows and one along the columns, each rounded to 8 bits.
constexpr int kPrecision = 32 - 8 - 2;

double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

// What one new pixel is a sum of.
struct Taps {
  int first;
  std::vector<int> weights;
};

std::vector<Taps> taps_of(int old_size, Range range, int new_size) {
  const double scale = double(range.last - range.first) / new_size;
  const double filter_scale = std::max(scale, 1.0), support = 2 * filter_scale;
  std::vector<Taps> taps(new_size);
  for (int i = 0; i < new_size; ++i) {
    const double center = range.first + (i + 0.5) * scale;
    const int first = std::max(int(center - support + 0.5), 0);
    const int count = std::min(int(center + support + 0.5), old_size) - first;
    std::vector<double> weights(count);
    double sum = 0;
    for (int k = 0; k < count; ++k) {
      weights[k] = bicubic((k + first - center + 0.5) * (1 / filter_scale));
      sum += weights[k];
    }
    taps[i].first = first;
    for (double weight : weights) {
      if (sum != 0) weight /= sum;
      taps[i].weights.push_back(int((weight < 0 ? -0.5 : 0.5) + weight * (1 << kPrecision)));
    }
  }
  return taps;
}

uint8_t clip(int sum) { return uint8_t(std::clamp(sum >> kPrecision, 0, 255)); }

Image along_rows(const Image& image, int width, Range range) {
  Image result(width, image.height);
  const auto taps = taps_of(image.width, range, width);
  for (int row = 0; row < image.height; ++row)
    for (int column = 0; column < width; ++column)
      for (int c = 0; c < 3; ++c) {
        int sum = 1 << (kPrecision - 1), at = taps[column].first;
        for (int weight : taps[column].weights) sum += image.at(at++, row)[c] * weight;
        result.at(column, row)[c] = clip(sum);
      }
  return result;
}

Image along_columns(const Image& image, int height, Range range) {
  Image result(image.width, height);
  const auto taps = taps_of(image.height, range, height);
  for (int row = 0; row < height; ++row)
    for (int column = 0; column < image.width; ++column)
      for (int c = 0; c < 3; ++c) {
        int sum = 1 << (kPrecision - 1), at = taps[row].first;
        for (int weight : taps[row].weights) sum += image.at(column, at++)[c] * weight;
        result.at(column, row)[c] = clip(sum);
      }
  return result;
}

Image resize(Image image, int width, int height, std::optional<Range> columns = {},
             std::optional<Range> rows = {}) {
  const Range x = columns.value_or(Range{0, float(image.width)});
  const Range y = rows.value_or(Range{0, float(image.height)});
  const bool wide = width != image.width || x.first != 0 || x.last != width;
  const bool high = height != image.height || y.first != 0 || y.last != height;
  // From Pillow 13 on; it shows where the first pass rounds.
  const int shrinks = image.height - height;
  const bool columns_first = shrinks > 0 && shrinks > (image.width - width) * 2;
  if (high && columns_first) image = along_columns(image, height, y);
  if (wide) image = along_rows(image, width, x);
  if (high && !columns_first) image = along_columns(image, height, y);
  return image;
}

int shortest(const ImageSheet& sheet) { return sheet.crop_from.value_or(sheet.size); }

// Pixels before the centre that are cut off.
int margin(int length, const ImageSheet& sheet) {
  const int rest = length - sheet.size;
  if (sheet.crop_rounding == "even") return int(std::nearbyint(rest / 2.0));
  return int(std::floor(rest / 2.0));
}

Image cropped(const Image& image, const ImageSheet& sheet) {
  const int side = sheet.size, edge = std::min(image.width, image.height);
  const auto scaled = [&](int length) {
    return int(double(int64_t(shortest(sheet)) * length) / edge);
  };
  const int width = scaled(image.width), height = scaled(image.height);
  const int left = margin(width, sheet), top = margin(height, sheet);
  if (int64_t(width) * height <= kMaxEnlarged) {
    const Image whole = resize(image, width, height);
    Image result(side, side);
    for (int row = 0; row < side; ++row)
      std::copy_n(whole.at(left, top + row), side * 3, result.at(0, row));
    return result;
  }
  const double x = double(image.width) / width, y = double(image.height) / height;
  const Image narrow = resize(image, side, image.height,
                              Range{float(left * x), float((left + side) * x)});
  return resize(narrow, side, side, {}, Range{float(top * y), float((top + side) * y)});
}

Image padded(const Image& given, const ImageSheet& sheet) {
  const int side = sheet.size, longest = std::max(given.width, given.height);
  int width = longest, height = longest;
  Image image = given;
  if (int64_t(longest) * longest > kMaxSquare) {
    // The long side first, nearly equal: a strip's square would take a gigabyte.
    const bool wide = given.width > given.height;
    (wide ? width : height) = side;
    image = wide ? resize(given, side, given.height) : resize(given, given.width, side);
  }
  Image square(width, height);
  std::array<uint8_t, 3> colour;
  for (int c = 0; c < 3; ++c) colour[c] = uint8_t(255 * sheet.mean[c]);
  for (size_t i = 0; i < square.pixels.size(); ++i) square.pixels[i] = colour[i % 3];
  const int left = (width - image.width) / 2, top = (height - image.height) / 2;
  for (int row = 0; row < image.height; ++row)
    std::copy_n(image.at(0, row), image.width * 3, square.at(left, top + row));
  return resize(square, side, side);
}

// TensorFlow's bilinear resampling of one axis: the two pixels that each new one lies
// between, and how far.
struct Between {
  int low, high;
  float weight;
};

std::vector<Between> between(int old_size, int new_size, int first, int count) {
  std::vector<Between> result;
  for (int i = first; i < first + count; ++i) {
    const double x = (i + 0.5) * (double(old_size) / new_size) - 0.5, low = std::floor(x);
    const auto clipped = [&](double at) { return int(std::clamp(at, 0.0, old_size - 1.0)); };
    result.push_back({clipped(low), clipped(low + 1), float(x - low)});
  }
  return result;
}

float mix(float low, float high, float weight) { return low + (high - low) * weight; }

std::vector<float> bilinear(const Image& image, const ImageSheet& sheet) {
  const int side = sheet.size;
  int width = side, height = side;
  if (sheet.resize == "crop") {
    const double scale = double(shortest(sheet)) / std::min(image.width, image.height);
    width = int(std::nearbyint(image.width * scale));
    height = int(std::nearbyint(image.height * scale));
  }
  const auto columns = between(image.width, width, margin(width, sheet), side);
  const auto rows = between(image.height, height, margin(height, sheet), side);
  std::vector<float> result;
  for (const auto& row : rows)
    for (const auto& column : columns)
      for (int c = 0; c < 3; ++c) {
        const auto read = [&](int x) {
          return mix(image.at(x, row.low)[c], image.at(x, row.high)[c], row.weight);
        };
        result.push_back(mix(read(column.low), read(column.high), column.weight));
      }
  return result;
}

std::vector<float> to_square(const Image& image, const ImageSheet& sheet) {
  if (sheet.resample == "bilinear") return bilinear(image, sheet);
  Image square;
  if (sheet.resize == "squash")
    square = resize(image, sheet.size, sheet.size);
  else if (sheet.resize == "crop")
    square = cropped(image, sheet);
  else if (sheet.resize == "pad")
    square = padded(image, sheet);
  else
    throw Error("mlxfn.json: image.resize '" + sheet.resize + "' is unknown to this program");
  return {square.pixels.begin(), square.pixels.end()};
}

}  // namespace

std::vector<float> to_pixels(const Image& image, const ImageSheet& sheet) {
  auto pixels = to_square(image, sheet);
  for (size_t i = 0; i < pixels.size(); ++i)
    pixels[i] = (pixels[i] / 255.0f - float(sheet.mean[i % 3])) / float(sheet.std[i % 3]);
  return pixels;
}
