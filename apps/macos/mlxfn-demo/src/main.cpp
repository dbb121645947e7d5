// mlxfn-demo: a question about a picture, answered by exported functions without Python.

#include <algorithm>
#include <iostream>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "digest.h"
#include "error.h"
#include "picture.h"
#include "program.h"
#include "prompt.h"
#include "resize.h"
#include "sidecar.h"
#include "tokenizer.h"
#include "writer.h"

namespace {

constexpr char kUsage[] =
    "usage: mlxfn-demo [--json] [--max-tokens N] FOLDER [PICTURE] QUESTION\n"
    "  FOLDER         made by 'mm1 export mlxfn'\n"
    "  PICTURE        PNG or JPEG\n"
    "  --json         print tokens, text and the pixels' digest as one JSON object\n"
    "  --max-tokens   longest answer (default: 256)\n";

struct Options {
  bool json = false;
  int max_tokens = 256;
  std::vector<std::string> names;
};

Options parse(int count, char** arguments) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument == "-h" || argument == "--help") {
      std::cout << kUsage;
      std::exit(0);
    } else if (argument == "--json") {
      options.json = true;
    } else if (argument == "--max-tokens") {
      const std::string value = ++i < count ? arguments[i] : "";
      const bool number = !value.empty() && value.size() < 7 &&
                          std::all_of(value.begin(), value.end(), ::isdigit);
      options.max_tokens = number ? std::stoi(value) : 0;
      if (options.max_tokens < 1) throw Error("--max-tokens takes a number from 1 on");
    } else {
      options.names.push_back(argument);
    }
  }
  if (options.names.size() < 2 || options.names.size() > 3)
    throw Error("give a folder, a picture if there is one, and a question; see --help");
  return options;
}

void answer(const Options& options) {
  const auto& names = options.names;
  const Sidecar sidecar = read_sidecar(names[0]);
  const Tokenizer tokenizer(sidecar);
  const bool sees = names.size() == 3;
  const Prompt prompt = write_prompt(names.back(), sees, sidecar, tokenizer);
  // Before the functions are read: what is wrong with a picture is said at once.
  std::vector<float> pixels;
  if (sees) pixels = to_pixels(read_picture(names[1], sidecar.limits), *sidecar.image);
  Program program(sidecar);
  std::optional<mlx::core::array> picture;
  if (sees) picture = program.encode(pixels);

  Writer writer(tokenizer, sidecar);
  Tokens tokens;
  std::string text;
  const auto print = [&](const std::string& piece) {
    text += piece;
    if (!options.json) std::cout << piece << std::flush;
  };
  const auto& eos = sidecar.prompt.eos;
  program.answer(prompt, picture, options.max_tokens, [&](int token) {
    tokens.push_back(token);
    if (std::find(eos.begin(), eos.end(), token) == eos.end()) print(writer.add(token));
  });
  print(writer.finish());
  if (options.json)
    std::cout << nlohmann::json{{"prompt_tokens", prompt.tokens},
                                {"pixels_sha256", sha256(pixels)},
                                {"tokens", tokens},
                                {"text", text}};
  std::cout << '\n';
}

}  // namespace

int main(int count, char** arguments) {
  try {
    answer(parse(count, arguments));
    return 0;
  } catch (const std::exception& error) {
    std::string message = error.what();
    std::replace(message.begin(), message.end(), '\n', ' ');
    std::cerr << "error: " << message << '\n';
    return 1;
  }
}
