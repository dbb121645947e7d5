// Byte-pair encoding as Hugging Face's tokenizers does it, of bytes (GPT-2, Llama 3, Qwen)
// and of SentencePiece's kind (Llama 2, Mistral, Gemma).
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "sidecar.h"

class Pattern;

class Tokenizer {
 public:
  explicit Tokenizer(const Sidecar& sidecar);
  ~Tokenizer();

  // Tokens of a text in which no special token is meant. `first` says whether it begins
  // what is tokenised.
  Tokens encode(const std::string& text, bool first) const;
  // The bytes that a token writes, which may be a part of a character.
  const std::string& bytes(int token) const { return bytes_.at(token); }
  // Text without white space around it.
  std::string stripped(const std::string& text) const;

 private:
  Tokens encode_normal(const std::string& text, bool first) const;
  std::vector<std::string> words(std::string text) const;
  Tokens merged(const std::string& word) const;
  Tokens symbols(const std::string& word) const;
  std::string unspelled(const std::string& token) const;

  TokenizerSheet sheet_;
  std::unordered_map<std::string, int> vocabulary_;
  // By two tokens: the merge's rank and the token that it makes.
  std::unordered_map<uint64_t, std::pair<int, int>> merges_;
  std::vector<std::pair<std::string, int>> added_;
  std::vector<std::unique_ptr<Pattern>> patterns_;
  std::unique_ptr<Pattern> space_;
  std::unordered_map<int, std::string> bytes_;
  // Of GPT-2's alphabet: the character of each byte.
  std::vector<std::string> alphabet_;
};
