// mlxfn.json: what a folder of exported functions says of itself. The fields are those of
// mm1_mlx/mlxfn/sidecar.py, where they are described.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

using Tokens = std::vector<int>;

struct Array {
  std::vector<int> shape;
  std::string dtype;

  bool operator==(const Array&) const = default;
};

struct Function {
  std::string name, file;
  std::vector<Array> inputs, outputs;
};

struct Piece {
  std::string kind, text;
  Tokens tokens;
};

struct Layout {
  Tokens begin;
  std::vector<Piece> pieces;
  Tokens end;
};

struct Spelled {
  std::string text;
  Tokens tokens;
};

struct PromptSheet {
  std::optional<Layout> with_picture;
  Layout without_picture;
  bool strip, apart;
  std::vector<std::string> marks, specials;
  std::vector<Spelled> spelled;
  int filler, image_tokens;
  Tokens eos;
  int known;
};

struct TokenizerSheet {
  std::string kind;
  std::vector<std::string> patterns;
  bool space_first;
  std::string prepend;
  bool nfc, ignore_merges, byte_fallback;
  std::optional<int> unknown;
  bool fuse_unknown, trim;
};

struct ImageSheet {
  int size;
  std::string resize, resample, crop_rounding;
  std::array<double, 3> mean, std;
  std::optional<int> crop_from;
};

struct Limits {
  size_t max_bytes;
  int64_t max_pixels;
  int max_side;
};

struct Sidecar {
  std::filesystem::path folder;
  std::string device;
  int capacity;
  std::vector<int> buckets;
  std::vector<Function> functions;
  std::optional<ImageSheet> image;
  Limits limits;
  PromptSheet prompt;
  TokenizerSheet tokenizer;
  nlohmann::json vocabulary;  // tokenizer.json

  // The function of a name, for so many positions.
  const Function& find(const std::string& name, int positions = 1) const;
};

// The sidecar of a folder, after its version and every file's size and digest were
// checked, which is before mlx reads one. Throws Error.
Sidecar read_sidecar(const std::filesystem::path& folder);
