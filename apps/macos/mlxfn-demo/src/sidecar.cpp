#include "sidecar.h"

#include <algorithm>
#include <fstream>
#include <functional>
#include <set>

#include <mlx/version.h>

#include "digest.h"
#include "error.h"

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

const std::string kSidecar = "mlxfn.json", kTokenizer = "tokenizer.json";
const std::string kAgain = "export the model again with 'mm1 export mlxfn'";
constexpr uintmax_t kMaxJson = 64u << 20;
// So that no product of such numbers leaves an int.
constexpr int kMaxCapacity = 1 << 24, kMaxSide = 1 << 16, kMaxPictureSide = 1 << 20;

template <typename T>
std::optional<T> maybe(const json& value) {
  if (value.is_null()) return std::nullopt;
  return value.get<T>();
}

}  // namespace

// Found by nlohmann::json by their names.
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Array, shape, dtype)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Function, name, file, inputs, outputs)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Piece, kind, text, tokens)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Layout, begin, pieces, end)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Spelled, text, tokens)

static void from_json(const json& j, PromptSheet& x) {
  x.with_picture = maybe<Layout>(j.at("with_picture"));
  j.at("without_picture").get_to(x.without_picture);
  j.at("strip").get_to(x.strip);
  j.at("apart").get_to(x.apart);
  j.at("marks").get_to(x.marks);
  j.at("specials").get_to(x.specials);
  j.at("spelled").get_to(x.spelled);
  j.at("filler").get_to(x.filler);
  j.at("image_tokens").get_to(x.image_tokens);
  j.at("eos").get_to(x.eos);
  j.at("known").get_to(x.known);
}

static void from_json(const json& j, TokenizerSheet& x) {
  j.at("kind").get_to(x.kind);
  j.at("patterns").get_to(x.patterns);
  j.at("space_first").get_to(x.space_first);
  j.at("prepend").get_to(x.prepend);
  j.at("nfc").get_to(x.nfc);
  j.at("ignore_merges").get_to(x.ignore_merges);
  j.at("byte_fallback").get_to(x.byte_fallback);
  x.unknown = maybe<int>(j.at("unknown"));
  j.at("fuse_unknown").get_to(x.fuse_unknown);
  j.at("trim").get_to(x.trim);
}

static void from_json(const json& j, ImageSheet& x) {
  j.at("size").get_to(x.size);
  j.at("resize").get_to(x.resize);
  j.at("resample").get_to(x.resample);
  j.at("crop_rounding").get_to(x.crop_rounding);
  j.at("mean").get_to(x.mean);
  j.at("std").get_to(x.std);
  x.crop_from = maybe<int>(j.at("crop_from"));
}

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Limits, max_bytes, max_pixels, max_side)

namespace {

json read_json(const fs::path& path) {
  if (!fs::is_regular_file(path)) throw Error(path.string() + " does not exist; " + kAgain);
  if (fs::file_size(path) > kMaxJson) throw Error(path.string() + " is too large; " + kAgain);
  std::ifstream file(path, std::ios::binary);
  try {
    return json::parse(file);
  } catch (const json::exception&) {
    throw Error(path.string() + " is not valid JSON; " + kAgain);
  }
}

// Before any other field is read: another version's sidecar may say other things.
void check_version(const fs::path& folder, const json& values) {
  const auto path = (folder / kSidecar).string();
  if (!values.is_object() || values.value("format", json()) != "mm1-mlxfn")
    throw Error(path + " does not describe exported functions; " + kAgain);
  if (values.value("format_version", json()) != 1)
    throw Error(path + " is of another format version than 1; " + kAgain);
  const auto found = values.value("mlx", json());
  if (found != mlx::core::version())
    throw Error(folder.string() + " was exported with mlx " + found.dump() + " and this is " +
                mlx::core::version() + ", which would read it as garbage; " + kAgain);
}

void check_file(const fs::path& folder, const json& file) {
  const auto name = file.at("name").get<std::string>();
  // So no folder can be spelled, nor a file that is hidden.
  const bool plain = !name.empty() && name[0] != '.' && name.find('/') == std::string::npos;
  if (!plain)
    throw Error(folder.string() + ": a file of this name is not allowed; " + kAgain);
  const auto path = folder / name;
  if (!fs::is_regular_file(path)) throw Error(path.string() + " does not exist; " + kAgain);
  const auto size = fs::file_size(path), expected = file.at("bytes").get<uintmax_t>();
  if (size != expected)
    throw Error(path.string() + " has " + std::to_string(size) + " bytes, expected " +
                std::to_string(expected) + "; copy it or " + kAgain);
  if (sha256(path) != file.at("sha256"))
    throw Error(path.string() +
                " is not what was exported (its sha256 differs); copy it or " + kAgain);
}

void check_functions(const Sidecar& sidecar) {
  std::vector<std::string> names, expected;
  for (const auto& function : sidecar.functions) names.push_back(function.name);
  if (sidecar.image) expected.push_back("encode");
  expected.insert(expected.end(), sidecar.buckets.size(), "embed");
  expected.insert(expected.end(), sidecar.buckets.size(), "run");
  const auto& buckets = sidecar.buckets;
  const bool rise = !buckets.empty() && buckets[0] == 1 &&
                    std::adjacent_find(buckets.begin(), buckets.end(),
                                       std::greater_equal<>()) == buckets.end();
  const bool sees = sidecar.image.has_value();
  if (names != expected || !rise || sees != sidecar.prompt.with_picture.has_value())
    throw Error((sidecar.folder / kSidecar).string() +
                " names other functions than its buckets need; " + kAgain);
  if (sidecar.capacity > kMaxCapacity || buckets.back() > sidecar.capacity)
    throw Error((sidecar.folder / kSidecar).string() + ": a capacity of " +
                std::to_string(sidecar.capacity) + " does not fit the buckets; " + kAgain);
}

// What a function takes and gives follows from the rest, as in mm1_mlx/mlxfn/sidecar.py: mlx
// checks no bounds of what it writes.
void check_shapes(const Sidecar& sidecar) {
  const auto check = [&](bool fits, const Function& function) {
    if (!fits)
      throw Error((sidecar.folder / kSidecar).string() + ": shapes or types of " + function.name +
                  " in " + function.file + " are not those of the other functions, the capacity "
                  "and the buckets; " + kAgain);
  };
  const auto& embed = sidecar.find("embed");
  check(embed.outputs.size() == 1 && embed.outputs[0].shape.size() == 3, embed);
  const int D = embed.outputs[0].shape[2];
  const auto& dtype = embed.outputs[0].dtype;
  const Array index{{}, "int32"};
  if (sidecar.image) {
    const auto& encode = sidecar.find("encode");
    const int side = sidecar.image->size;
    const std::vector<Array> pixels{{{1, side, side, 3}, "float32"}};
    const std::vector<Array> tokens{{{sidecar.prompt.image_tokens, D}, dtype}};
    check(encode.inputs == pixels && encode.outputs == tokens, encode);
  }
  const auto& first = sidecar.find("run");
  check(first.inputs.size() > 3 && first.inputs.size() % 2 == 1 && !first.outputs.empty(), first);
  const std::vector<Array> caches(first.inputs.begin() + 3, first.inputs.end());
  for (const auto& cache : caches)
    check(cache.shape.size() == 4 && cache.shape[0] == 1 && cache.shape[2] == sidecar.capacity,
          first);
  const auto& logits = first.outputs[0];
  check(logits.shape.size() == 2 && logits.shape[0] == 1, first);
  std::vector<Array> given{logits};
  given.insert(given.end(), caches.begin(), caches.end());
  for (int T : sidecar.buckets) {
    const Array row{{1, T, D}, dtype};
    const auto& rows = sidecar.find("embed", T);
    const std::vector<Array> tokens{{{1, T}, "int32"}};
    check(rows.inputs == tokens && rows.outputs == std::vector<Array>{row}, rows);
    std::vector<Array> taken{row, index, index};
    taken.insert(taken.end(), caches.begin(), caches.end());
    const auto& run = sidecar.find("run", T);
    check(run.inputs == taken && run.outputs == given, run);
  }
}

void check_image(const Sidecar& sidecar) {
  if (!sidecar.image) return;
  const auto& image = *sidecar.image;
  const int from = image.crop_from.value_or(image.size);
  const bool fits = 0 < image.size && image.size <= kMaxSide && image.size <= from &&
                    from <= kMaxSide && sidecar.limits.max_side <= kMaxPictureSide;
  if (!fits)
    throw Error((sidecar.folder / kSidecar).string() +
                ": image.size or image.crop_from is out of its range; " + kAgain);
}

}  // namespace

const Function& Sidecar::find(const std::string& name, int positions) const {
  const auto first = std::find_if(functions.begin(), functions.end(),
                                  [&](const auto& x) { return x.name == name; });
  if (name == "encode") return *first;
  const auto row = std::find(buckets.begin(), buckets.end(), positions);
  return first[row - buckets.begin()];
}

Sidecar read_sidecar(const fs::path& folder) {
  if (!fs::is_directory(folder)) throw Error("folder " + folder.string() + " does not exist");
  const auto values = read_json(folder / kSidecar);
  check_version(folder, values);
  try {
    Sidecar x;
    x.folder = folder;
    values.at("device").get_to(x.device);
    values.at("capacity").get_to(x.capacity);
    values.at("buckets").get_to(x.buckets);
    values.at("functions").get_to(x.functions);
    x.image = maybe<ImageSheet>(values.at("image"));
    values.at("limits").get_to(x.limits);
    values.at("prompt").get_to(x.prompt);
    values.at("tokenizer").get_to(x.tokenizer);
    check_functions(x);
    check_shapes(x);
    check_image(x);
    std::set<std::string> listed;
    for (const auto& file : values.at("files")) {
      check_file(folder, file);
      listed.insert(file.at("name").get<std::string>());
    }
    std::vector<std::string> needed{kTokenizer};
    for (const auto& function : x.functions) needed.push_back(function.file);
    for (const auto& name : needed)
      if (!listed.contains(name))
        throw Error((folder / kSidecar).string() + " gives no digest of " + name + "; " + kAgain);
    x.vocabulary = read_json(folder / kTokenizer);
    return x;
  } catch (const json::exception& error) {
    throw Error((folder / kSidecar).string() + " lacks a field or holds one of another type (" +
                error.what() + "); " + kAgain);
  }
}
