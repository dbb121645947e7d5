// The exported functions, and the straight line from a prompt to an answer's tokens.
#pragma once

#include <functional>
#include <map>
#include <span>
#include <utility>

#include <mlx/mlx.h>

#include "prompt.h"
#include "sidecar.h"

class Program {
 public:
  // Reads the functions and compares their shapes with the sidecar's; nothing is run.
  // Throws Error.
  explicit Program(const Sidecar& sidecar);

  // Image tokens [K, D] of pixels [S, S, 3].
  mlx::core::array encode(const std::vector<float>& pixels);

  // The likeliest tokens one after the other, up to one that ends the answer; `write` is
  // given each. Throws Error where the prompt has no room.
  void answer(const Prompt& prompt, const std::optional<mlx::core::array>& picture,
              int max_tokens, const std::function<void(int)>& write);

 private:
  using Arrays = std::vector<mlx::core::array>;

  Arrays call(const Function& function, const Arrays& inputs);
  void check(const Function& function);
  int bucket(int wanted, int room) const;
  // The likeliest token behind some more positions of the prompt.
  int run(std::span<const int> tokens, std::optional<int> at,
          const std::optional<mlx::core::array>& picture);
  // The same behind as many as fit into a bucket, and how many those were.
  std::pair<int, int> run_part(std::span<const int> tokens, std::optional<int> at,
                               const std::optional<mlx::core::array>& picture);

  const Sidecar& sidecar_;
  std::map<std::string, mlx::core::ImportedFunction> files_;
  Arrays caches_;
  int offset_ = 0;
};
