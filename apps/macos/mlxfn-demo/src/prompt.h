// A question as the model's prompt.
#pragma once

#include <optional>

#include "sidecar.h"
#include "tokenizer.h"

struct Prompt {
  Tokens tokens;
  // Where the picture's positions begin; fillers stand there.
  std::optional<int> picture;
};

// As mm1_mlx/prompt.py writes it: special tokens typed in the question stay text.
Prompt write_prompt(const std::string& question, bool with_picture, const Sidecar& sidecar,
                    const Tokenizer& tokenizer);
