#include "picture.h"

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <memory>

// jpeglib.h needs stdio's types before it.
#include <jpeglib.h>
#include <jerror.h>
#include <libexif/exif-data.h>
#include <png.h>

#include "error.h"

namespace fs = std::filesystem;

namespace {

using Bytes = std::vector<uint8_t>;

struct Source {
  std::string name;
  Bytes bytes;
  const Limits& limits;

  [[noreturn]] void damaged() const {
    throw Error(name + " is damaged or cut short; save or download it again");
  }
  void check_size(int64_t width, int64_t height) const {
    const bool fits = std::min(width, height) >= 1 && std::max(width, height) <= limits.max_side;
    if (!fits || width * height > limits.max_pixels)
      throw Error(name + " has " + std::to_string(width) + " x " + std::to_string(height) +
                  " pixels, expected 1 to " + std::to_string(limits.max_side) +
                  " a side and at most " + std::to_string(limits.max_pixels) +
                  " in all; resize it");
  }
};

Source read(const fs::path& path, const Limits& limits) {
  Source source{path.string(), {}, limits};
  // A pipe could block and a device never end.
  if (!fs::is_regular_file(path))
    throw Error(source.name + " was not found or is no file; give the path of a picture file");
  const auto size = fs::file_size(path);
  if (size > limits.max_bytes)
    throw Error(source.name + " has more than " + std::to_string(limits.max_bytes) +
                " bytes; scale it down or save it as JPEG");
  source.bytes.resize(size);
  std::ifstream file(path, std::ios::binary);
  if (!file.read(reinterpret_cast<char*>(source.bytes.data()), std::streamsize(size)))
    throw Error(source.name + " cannot be opened; check its path and permissions");
  return source;
}

// EXIF's orientation, 1 to 8; 1 where there is none.
int orientation(const uint8_t* data, size_t size) {
  const std::unique_ptr<ExifData, decltype(&exif_data_unref)> exif(
      exif_data_new_from_data(data, unsigned(size)), exif_data_unref);
  ExifEntry* entry =
      exif ? exif_content_get_entry(exif->ifd[EXIF_IFD_0], EXIF_TAG_ORIENTATION) : nullptr;
  if (!entry || entry->format != EXIF_FORMAT_SHORT || entry->size < 2) return 1;
  const int value = exif_get_short(entry->data, exif_data_get_byte_order(exif.get()));
  return value >= 1 && value <= 8 ? value : 1;
}

Image upright(const Image& image, int turn) {
  if (turn == 1) return image;
  const bool aside = turn >= 5;
  Image result(aside ? image.height : image.width, aside ? image.width : image.height);
  const int right = image.width - 1, bottom = image.height - 1;
  for (int y = 0; y < result.height; ++y)
    for (int x = 0; x < result.width; ++x) {
      const int across = aside ? y : x, down = aside ? x : y;
      // 2: mirrored; 3: by 180; 4: upside down; 5: over the diagonal; 6: by 270; 7: over
      // the other diagonal; 8: by 90, counter-clockwise.
      const bool flip_x = turn == 2 || turn == 3 || turn == 7 || turn == 8;
      const bool flip_y = turn == 3 || turn == 4 || turn == 6 || turn == 7;
      std::memcpy(result.at(x, y),
                  image.at(flip_x ? right - across : across, flip_y ? bottom - down : down), 3);
    }
  return result;
}

// libjpeg and libpng leave by longjmp where a picture is damaged: what is between setjmp and
// their calls has nothing to destroy.
struct JpegReader {
  jpeg_decompress_struct info{};
  jpeg_error_mgr errors{};
  std::jmp_buf left{};

  explicit JpegReader(const Bytes& bytes) {
    info.err = jpeg_std_error(&errors);
    info.client_data = this;
    errors.error_exit = leave;
    errors.emit_message = [](j_common_ptr common, int level) {
      // Bytes that are missing would become grey.
      if (level < 0 && common->err->msg_code == JWRN_JPEG_EOF) leave(common);
    };
    jpeg_create_decompress(&info);
    jpeg_mem_src(&info, bytes.data(), bytes.size());
  }
  ~JpegReader() { jpeg_destroy_decompress(&info); }
  JpegReader(const JpegReader&) = delete;

  [[noreturn]] static void leave(j_common_ptr common) {
    std::longjmp(static_cast<JpegReader*>(common->client_data)->left, 1);
  }
  bool read_header() {
    if (setjmp(left)) return false;
    jpeg_read_header(&info, TRUE);
    return true;
  }
  bool read_rows(Image& image) {
    if (setjmp(left)) return false;
    jpeg_start_decompress(&info);
    while (info.output_scanline < info.output_height) {
      JSAMPROW row = image.at(0, int(info.output_scanline));
      jpeg_read_scanlines(&info, &row, 1);
    }
    jpeg_finish_decompress(&info);
    return true;
  }
};

Image decode_jpeg(const Source& source) {
  JpegReader reader(source.bytes);
  auto& info = reader.info;
  if (!reader.read_header()) source.damaged();
  source.check_size(info.image_width, info.image_height);
  if (info.num_components == 4)
    throw Error(source.name + " is a CMYK picture; convert it to RGB first");
  info.out_color_space = JCS_RGB;
  Image image(int(info.image_width), int(info.image_height));
  if (!reader.read_rows(image)) source.damaged();
  return upright(image, orientation(source.bytes.data(), source.bytes.size()));
}

struct PngReader {
  png_structp png;
  png_infop info;
  const Bytes& bytes;
  size_t at = 0;

  explicit PngReader(const Bytes& bytes) : bytes(bytes) {
    png = png_create_read_struct(PNG_LIBPNG_VER_STRING, nullptr, nullptr,
                                 [](png_structp, png_const_charp) {});
    info = png_create_info_struct(png);
    png_set_read_fn(png, this, [](png_structp png, png_bytep out, size_t count) {
      auto& self = *static_cast<PngReader*>(png_get_io_ptr(png));
      if (count > self.bytes.size() - self.at) png_longjmp(png, 1);
      std::memcpy(out, self.bytes.data() + self.at, count);
      self.at += count;
    });
  }
  ~PngReader() { png_destroy_read_struct(&png, &info, nullptr); }
  PngReader(const PngReader&) = delete;

  bool read_header() {
    if (setjmp(png_jmpbuf(png))) return false;
    png_read_info(png, info);
    return true;
  }
  // Rows of RGBA.
  bool read_rows(png_bytepp rows) {
    if (setjmp(png_jmpbuf(png))) return false;
    png_set_expand(png);
    png_set_strip_16(png);
    png_set_gray_to_rgb(png);
    png_set_add_alpha(png, 0xff, PNG_FILLER_AFTER);
    png_set_interlace_handling(png);
    png_read_update_info(png, info);
    png_read_image(png, rows);
    // The EXIF may stand behind the pixels.
    png_read_end(png, info);
    return true;
  }
  int turn() {
    png_uint_32 size = 0;
    png_bytep data = nullptr;
    if (!png_get_eXIf_1(png, info, &size, &data)) return 1;
    Bytes exif{'E', 'x', 'i', 'f', 0, 0};
    exif.insert(exif.end(), data, data + size);
    return orientation(exif.data(), exif.size());
  }
};

// As Pillow composes: (ink * alpha + paper * (255 - alpha)) / 255, rounded.
uint8_t over_white(int ink, int alpha) {
  const int sum = ink * alpha + 255 * (255 - alpha) + 128;
  return uint8_t(((sum >> 8) + sum) >> 8);
}

Image decode_png(const Source& source) {
  PngReader reader(source.bytes);
  if (!reader.read_header()) source.damaged();
  const int width = int(png_get_image_width(reader.png, reader.info));
  const int height = int(png_get_image_height(reader.png, reader.info));
  source.check_size(width, height);
  Bytes pixels(size_t(width) * height * 4);
  std::vector<png_bytep> rows;
  for (int y = 0; y < height; ++y) rows.push_back(&pixels[size_t(y) * width * 4]);
  if (!reader.read_rows(rows.data())) source.damaged();
  Image image(width, height);
  for (size_t i = 0; i < size_t(width) * height; ++i)
    for (int c = 0; c < 3; ++c)
      image.pixels[i * 3 + c] = over_white(pixels[i * 4 + c], pixels[i * 4 + 3]);
  return upright(image, reader.turn());
}

}  // namespace

Image read_picture(const fs::path& path, const Limits& limits) {
  const Source source = read(path, limits);
  const auto begins = [&](std::initializer_list<uint8_t> magic) {
    return source.bytes.size() > magic.size() &&
           std::equal(magic.begin(), magic.end(), source.bytes.begin());
  };
  if (begins({0xff, 0xd8, 0xff})) return decode_jpeg(source);
  if (begins({0x89, 'P', 'N', 'G', '\r', '\n', 0x1a, '\n'})) return decode_png(source);
  throw Error(source.name + " is not a PNG or JPEG; convert it to one first");
}
