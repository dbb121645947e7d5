#include "tokenizer.h"

#include <algorithm>
#include <climits>
#include <cstdlib>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "error.h"
#include "utf8.h"

namespace {

const std::string kSpace = "\u2581";

uint64_t pair_of(int left, int right) {
  return uint64_t(uint32_t(left)) << 32 | uint32_t(right);
}

std::string replaced(const std::string& text, const std::string& old, const std::string& with) {
  std::string result;
  for (size_t at = 0;;) {
    const auto found = text.find(old, at);
    result += text.substr(at, found - at);
    if (found == std::string::npos) return result;
    result += with;
    at = found + old.size();
  }
}

// GPT-2's bytes_to_unicode: printable bytes stand for themselves, the others for the
// characters from 256 on.
std::vector<std::string> byte_alphabet() {
  std::vector<std::string> alphabet(256);
  int next = 256;
  for (int byte = 0; byte < 256; ++byte) {
    const bool itself = (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte != 0xad);
    alphabet[byte] = from_code(itself ? byte : next++);
  }
  return alphabet;
}

std::string byte_token(int byte) {
  static constexpr char digits[] = "0123456789ABCDEF";
  return std::string("<0x") + digits[byte >> 4] + digits[byte & 15] + '>';
}

std::string nfc(const std::string& text) {
  const std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> result(
      utf8proc_NFC(reinterpret_cast<const utf8proc_uint8_t*>(text.c_str())), std::free);
  if (!result) throw Error("the question is not valid UTF-8");
  return reinterpret_cast<const char*>(result.get());
}

}  // namespace

class Pattern {
 public:
  explicit Pattern(const std::string& expression) {
    int code;
    PCRE2_SIZE at;
    code_ = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(expression.data()), expression.size(),
                          PCRE2_UTF | PCRE2_UCP, &code, &at, nullptr);
    if (!code_)
      throw Error("mlxfn.json: PCRE2 does not read tokenizer.patterns at " + std::to_string(at));
    match_ = pcre2_match_data_create_from_pattern(code_, nullptr);
  }
  ~Pattern() {
    pcre2_match_data_free(match_);
    pcre2_code_free(code_);
  }
  Pattern(const Pattern&) = delete;

  // The text's matches and what lies between them, in order.
  std::vector<std::string> split(const std::string& text) const { return parts(text, true); }

  // The text without its matches.
  std::string without(const std::string& text) const {
    std::string rest;
    for (const auto& part : parts(text, false)) rest += part;
    return rest;
  }

 private:
  std::vector<std::string> parts(const std::string& text, bool matches) const {
    std::vector<std::string> parts;
    size_t done = 0;
    for (size_t at = 0; at < text.size();) {
      const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
      if (pcre2_match(code_, subject, text.size(), at, PCRE2_NOTEMPTY, match_, nullptr) < 0) break;
      const auto* found = pcre2_get_ovector_pointer(match_);
      if (found[0] > done) parts.push_back(text.substr(done, found[0] - done));
      if (matches) parts.push_back(text.substr(found[0], found[1] - found[0]));
      done = at = found[1];
    }
    if (done < text.size()) parts.push_back(text.substr(done));
    return parts;
  }

  pcre2_code* code_;
  pcre2_match_data* match_;
};

Tokenizer::Tokenizer(const Sidecar& sidecar)
    : sheet_(sidecar.tokenizer), alphabet_(byte_alphabet()) {
  if (sheet_.kind != "byte_level" && sheet_.kind != "sentencepiece")
    throw Error("mlxfn.json: a tokenizer of kind '" + sheet_.kind + "' is unknown to this program");
  const auto& model = sidecar.vocabulary.at("model");
  model.at("vocab").get_to(vocabulary_);
  int rank = 0;
  for (const auto& merge : model.at("merges")) {
    const auto left = merge.at(0).get<std::string>(), right = merge.at(1).get<std::string>();
    merges_[pair_of(vocabulary_.at(left), vocabulary_.at(right))] = {rank++,
                                                                   vocabulary_.at(left + right)};
  }
  for (const auto& [text, token] : vocabulary_) bytes_[token] = unspelled(text);
  for (const auto& token : sidecar.vocabulary.at("added_tokens")) {
    const auto text = token.at("content").get<std::string>();
    bytes_[token.at("id").get<int>()] = unspelled(text);
    if (!token.at("special").get<bool>()) added_.emplace_back(text, token.at("id").get<int>());
  }
  for (const auto& expression : sheet_.patterns)
    patterns_.push_back(std::make_unique<Pattern>(expression));
  space_ = std::make_unique<Pattern>("\\A[\\s\\x1c-\\x1f]+|[\\s\\x1c-\\x1f]+\\z");
}

Tokenizer::~Tokenizer() = default;

std::string Tokenizer::stripped(const std::string& text) const {
  return space_->without(text);
}

Tokens Tokenizer::encode(const std::string& text, bool first) const {
  // Added tokens first: the leftmost, of several there the longest.
  Tokens tokens;
  size_t done = 0;
  for (size_t at = 0; at < text.size(); ++at) {
    const std::pair<std::string, int>* found = nullptr;
    for (const auto& added : added_)
      if (text.compare(at, added.first.size(), added.first) == 0 && !added.first.empty() &&
          (!found || added.first.size() > found->first.size()))
        found = &added;
    if (!found) continue;
    const auto before = encode_normal(text.substr(done, at - done), first && done == 0);
    tokens.insert(tokens.end(), before.begin(), before.end());
    tokens.push_back(found->second);
    done = at + found->first.size();
    at = done - 1;
  }
  const auto rest = encode_normal(text.substr(done), first && done == 0);
  tokens.insert(tokens.end(), rest.begin(), rest.end());
  return tokens;
}

Tokens Tokenizer::encode_normal(const std::string& given, bool first) const {
  if (given.empty()) return {};
  std::string text = sheet_.nfc ? nfc(given) : given;
  if (sheet_.kind == "sentencepiece") {
    text = replaced(text, " ", kSpace);
    const bool wanted = sheet_.prepend == "every" || sheet_.prepend == "always" ||
                        (sheet_.prepend == "first" && first);
    if (wanted && (sheet_.prepend == "every" || !text.starts_with(kSpace))) text = kSpace + text;
  } else if (sheet_.space_first && !text.starts_with(' ')) {
    text = ' ' + text;
  }
  Tokens tokens;
  for (const auto& word : words(text)) {
    const auto part = merged(word);
    tokens.insert(tokens.end(), part.begin(), part.end());
  }
  return tokens;
}

std::vector<std::string> Tokenizer::words(std::string text) const {
  std::vector<std::string> words{std::move(text)};
  for (const auto& pattern : patterns_) {
    std::vector<std::string> finer;
    for (const auto& word : words)
      for (auto& part : pattern->split(word)) finer.push_back(std::move(part));
    words = std::move(finer);
  }
  if (sheet_.kind == "byte_level")
    for (auto& word : words) {
      std::string spelled;
      for (unsigned char byte : word) spelled += alphabet_[byte];
      word = spelled;
    }
  return words;
}

Tokens Tokenizer::merged(const std::string& word) const {
  if (const auto whole = vocabulary_.find(word);
      sheet_.ignore_merges && whole != vocabulary_.end())
    return {whole->second};
  Tokens tokens = symbols(word);
  while (tokens.size() > 1) {
    // The merge of the lowest rank, of equal ones the leftmost.
    std::pair<int, int> best{INT_MAX, 0};
    size_t place = 0;
    for (size_t i = 0; i + 1 < tokens.size(); ++i)
      if (const auto merge = merges_.find(pair_of(tokens[i], tokens[i + 1]));
          merge != merges_.end() && merge->second.first < best.first) {
        best = merge->second;
        place = i;
      }
    if (best.first == INT_MAX) break;
    tokens[place] = best.second;
    tokens.erase(tokens.begin() + place + 1);
  }
  return tokens;
}

// The word's characters as tokens, unknown ones as bytes or as the unknown token.
Tokens Tokenizer::symbols(const std::string& word) const {
  Tokens tokens;
  bool after_unknown = false;
  for (size_t at = 0; at < word.size();) {
    const std::string letter(character(word, at));
    at += letter.size();
    if (const auto known = vocabulary_.find(letter); known != vocabulary_.end()) {
      tokens.push_back(known->second);
      after_unknown = false;
      continue;
    }
    Tokens spelled;
    if (sheet_.byte_fallback)
      for (unsigned char byte : letter)
        if (const auto found = vocabulary_.find(byte_token(byte)); found != vocabulary_.end())
          spelled.push_back(found->second);
    if (sheet_.byte_fallback && spelled.size() == letter.size()) {
      tokens.insert(tokens.end(), spelled.begin(), spelled.end());
      after_unknown = false;
    } else if (sheet_.unknown) {
      if (!after_unknown || !sheet_.fuse_unknown) tokens.push_back(*sheet_.unknown);
      after_unknown = true;
    }
  }
  return tokens;
}

// The bytes that a token's text in the vocabulary stands for.
std::string Tokenizer::unspelled(const std::string& token) const {
  if (sheet_.kind == "sentencepiece") {
    if (token.size() == 6 && token.starts_with("<0x"))
      return {char(std::stoi(token.substr(3, 2), nullptr, 16))};
    return replaced(token, kSpace, " ");
  }
  std::string bytes;
  for (size_t at = 0; at < token.size();) {
    const std::string letter(character(token, at));
    at += letter.size();
    const auto found = std::find(alphabet_.begin(), alphabet_.end(), letter);
    const bool is_byte = found != alphabet_.end();
    bytes += is_byte ? std::string{char(found - alphabet_.begin())} : letter;
  }
  return bytes;
}
