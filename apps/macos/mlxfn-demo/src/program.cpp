#include "program.h"

#include <algorithm>

#include "error.h"

namespace mx = mlx::core;

namespace {

mx::Dtype dtype_of(const std::string& name) {
  if (name == "float32") return mx::float32;
  if (name == "float16") return mx::float16;
  if (name == "bfloat16") return mx::bfloat16;
  if (name == "int32") return mx::int32;
  throw Error("mlxfn.json: the type '" + name + "' is unknown to this program");
}

mx::Shape shape_of(const Array& array) { return {array.shape.begin(), array.shape.end()}; }

mx::array zeros(const Array& array) { return mx::zeros(shape_of(array), dtype_of(array.dtype)); }

}  // namespace

Program::Program(const Sidecar& sidecar) : sidecar_(sidecar) {
  const bool gpu = sidecar.device == "gpu";
  if (gpu && !mx::is_available(mx::Device::gpu))
    throw Error(sidecar.folder.string() +
                " was exported on a GPU, and there is none here; export it on this machine");
  mx::set_default_device(gpu ? mx::Device::gpu : mx::Device::cpu);
  for (const auto& function : sidecar.functions) {
    const auto path = (sidecar.folder / function.file).string();
    try {
      if (!files_.contains(function.file))
        files_.emplace(function.file, mx::import_function(path));
    } catch (const std::exception& error) {
      throw Error(path + " cannot be read by mlx " + mx::version() + " (" + error.what() +
                  "); export the model again");
    }
    check(function);
  }
  const auto& inputs = sidecar.find("run").inputs;
  for (size_t i = 3; i < inputs.size(); ++i) caches_.push_back(zeros(inputs[i]));
}

void Program::check(const Function& function) {
  const auto where = (sidecar_.folder / function.file).string() + ": " + function.name;
  Arrays inputs, outputs;
  try {
    for (const auto& input : function.inputs) inputs.push_back(zeros(input));
    outputs = call(function, inputs);
  } catch (const Error&) {
    throw;
  } catch (const std::exception&) {
    throw Error(where + " does not take the shapes that mlxfn.json says; export the model again");
  }
  const bool same = std::equal(
      outputs.begin(), outputs.end(), function.outputs.begin(), function.outputs.end(),
      [](const mx::array& x, const Array& y) {
        return x.shape() == shape_of(y) && x.dtype() == dtype_of(y.dtype);
      });
  if (!same)
    throw Error(where +
                " does not give the shapes and types that mlxfn.json says; export the model again");
}

Program::Arrays Program::call(const Function& function, const Arrays& inputs) {
  return files_.at(function.file)(inputs);
}

mx::array Program::encode(const std::vector<float>& pixels) {
  const auto& function = sidecar_.find("encode");
  const auto shape = shape_of(function.inputs[0]);
  if (pixels.size() != size_t(shape[0]) * shape[1] * shape[2] * shape[3])
    throw Error("mlxfn.json: image.size is not the side of encode's pixels; export the model again");
  return call(function, {mx::array(pixels.begin(), shape)})[0];
}

// How many positions to run: all that are wanted, padded if there is room for that.
int Program::bucket(int wanted, int room) const {
  int best = 1;
  for (int T : sidecar_.buckets) {
    if (T > room) break;
    best = T;
    if (T >= wanted) break;
  }
  return best;
}

int Program::run(std::span<const int> tokens, std::optional<int> at,
                 const std::optional<mx::array>& picture) {
  // One after the other, and not called again from within: what a part leaves behind would
  // hold all caches, and the next one copy them.
  for (;;) {
    const auto [token, count] = run_part(tokens, at, picture);
    if (int(tokens.size()) == count) return token;
    tokens = tokens.subspan(count);
    if (at) *at -= count;
  }
}

std::pair<int, int> Program::run_part(std::span<const int> tokens, std::optional<int> at,
                                      const std::optional<mx::array>& picture) {
  const int T = bucket(int(tokens.size()), sidecar_.capacity - offset_);
  const int count = std::min(T, int(tokens.size()));
  Tokens padded(tokens.begin(), tokens.begin() + count);
  padded.resize(T, sidecar_.prompt.filler);
  // mlx reads whatever lies behind its table of embeddings.
  const int vocabulary = sidecar_.find("run").outputs[0].shape[1];
  for (int token : padded)
    if (token < 0 || token >= vocabulary)
      throw Error("mlxfn.json or tokenizer.json names token " + std::to_string(token) +
                  ", and the model has " + std::to_string(vocabulary) + "; export the model again");
  mx::array x = call(sidecar_.find("embed", T), {mx::array(padded.data(), {1, T}, mx::int32)})[0];
  if (picture && at) {
    // The picture's rows that stand among these.
    const int width = x.shape(2), rows = picture->shape(0);
    const int first = std::max(*at, 0), last = std::min(*at + rows, count);
    if (first < last) {
      const auto part = mx::slice(*picture, {first - *at, 0}, {last - *at, width});
      x = mx::slice_update(x, mx::reshape(part, {1, last - first, width}),
                           mx::Shape{0, first, 0}, mx::Shape{1, last, width});
    }
  }
  Arrays inputs{x, mx::array(offset_, mx::int32), mx::array(count - 1, mx::int32)};
  // Moved, so that mlx writes the new keys and values where the old ones lie.
  std::move(caches_.begin(), caches_.end(), std::back_inserter(inputs));
  auto outputs = call(sidecar_.find("run", T), inputs);
  inputs.clear();
  caches_.assign(outputs.begin() + 1, outputs.end());
  const mx::array best = mx::argmax(outputs[0], -1);
  outputs.clear();
  offset_ += count;
  Arrays results = caches_;
  results.push_back(best);
  mx::eval(results);
  return {int(best.item<uint32_t>()), count};
}

void Program::answer(const Prompt& prompt, const std::optional<mx::array>& picture,
                     int max_tokens, const std::function<void(int)>& write) {
  if (prompt.tokens.empty()) throw Error("the prompt is empty; ask something");
  if (int(prompt.tokens.size()) > sidecar_.capacity)
    throw Error("the prompt has " + std::to_string(prompt.tokens.size()) +
                " tokens, more than the " + std::to_string(sidecar_.capacity) +
                " that the functions hold; export with a larger --capacity");
  const auto& eos = sidecar_.prompt.eos;
  int token = run(prompt.tokens, prompt.picture, picture);
  for (int count = 1;; ++count) {
    write(token);
    const bool ended = std::find(eos.begin(), eos.end(), token) != eos.end();
    if (ended || count == max_tokens || offset_ == sidecar_.capacity) return;
    token = run({&token, 1}, std::nullopt, std::nullopt);
  }
}
