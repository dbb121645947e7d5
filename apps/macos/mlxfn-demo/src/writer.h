// Tokens to text as it becomes readable, as mlx-lm's detokenizers write it.
#pragma once

#include "tokenizer.h"

class Writer {
 public:
  Writer(const Tokenizer& tokenizer, const Sidecar& sidecar)
      : tokenizer_(tokenizer), sheet_(sidecar.tokenizer), known_(sidecar.prompt.known) {}

  // The text that a token adds: nothing while a character is incomplete.
  std::string add(int token);
  // What is left at the end.
  std::string finish();

 private:
  std::string flush(std::string text);

  const Tokenizer& tokenizer_;
  const TokenizerSheet& sheet_;
  int known_;
  std::string waiting_;
  bool begun_ = false;
};
