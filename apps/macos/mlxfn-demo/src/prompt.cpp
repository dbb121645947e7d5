#include "prompt.h"

#include <algorithm>
#include <map>

#include "error.h"
#include "utf8.h"

namespace {

// A stretch of the prompt: text, or tokens that stand for themselves.
struct Part {
  std::string text;
  Tokens tokens;
  bool is_picture = false;

  bool is_text() const { return tokens.empty() && !is_picture; }
};

bool is_space(std::string_view letter) {
  const int code = code_of(letter);
  const auto kind = utf8proc_category(code);
  return (code >= 9 && code <= 13) || (code >= 0x1c && code <= 0x1f) || code == 0x85 ||
         kind == UTF8PROC_CATEGORY_ZS || kind == UTF8PROC_CATEGORY_ZL ||
         kind == UTF8PROC_CATEGORY_ZP;
}

// The question with its special tokens spelled out, as mm1_mlx/tokenizer.py shields them.
class Shield {
 public:
  explicit Shield(const PromptSheet& sheet) : sheet_(sheet) {
    for (const auto& spelled : sheet.spelled) letters_[spelled.text] = spelled.tokens;
  }

  std::vector<Part> operator()(const std::string& question) const {
    std::vector<Part> parts{{without_private_use(question), {}, false}};
    for (const auto& special : sheet_.specials) parts = cut(parts, special);
    if (parts.back().is_text()) shield_end(parts);
    std::erase_if(parts, [](const Part& part) { return part.is_text() && part.text.empty(); });
    return parts;
  }

 private:
  // Such characters stand for special tokens in the runtime.
  static std::string without_private_use(const std::string& text) {
    std::string result;
    for (size_t at = 0; at < text.size();) {
      const auto letter = character(text, at);
      at += letter.size();
      const int code = code_of(letter);
      result += code >= 0xe000 && code <= 0xf8ff ? "\ufffd" : std::string(letter);
    }
    return result;
  }

  std::vector<Part> cut(const std::vector<Part>& parts, const std::string& special) const {
    std::vector<Part> finer;
    for (const auto& part : parts) {
      if (!part.is_text()) {
        finer.push_back(part);
        continue;
      }
      size_t at = 0;
      for (size_t found; (found = part.text.find(special, at)) != std::string::npos;) {
        finer.push_back({part.text.substr(at, found - at), {}, false});
        finer.push_back({"", spell(special), false});
        at = found + special.size();
      }
      finer.push_back({part.text.substr(at), {}, false});
    }
    return finer;
  }

  // The beginning of a special token at the end, which the template might complete.
  void shield_end(std::vector<Part>& parts) const {
    const std::string text = parts.back().text;
    size_t end = 0;
    for (size_t at = 0; at < text.size();) {
      const auto letter = character(text, at);
      at += letter.size();
      if (!is_space(letter)) end = at;
    }
    for (size_t start = 0; start < end; start += character(text, start).size()) {
      const auto begun = std::string_view(text).substr(start, end - start);
      const bool found = std::any_of(sheet_.specials.begin(), sheet_.specials.end(),
                                     [&](const auto& x) { return x.starts_with(begun); });
      if (!found) continue;
      parts.back().text = text.substr(0, start);
      parts.push_back({"", spell(std::string(begun)), false});
      parts.push_back({text.substr(end), {}, false});
      return;
    }
  }

  Tokens spell(const std::string& text) const {
    Tokens tokens;
    for (size_t at = 0; at < text.size();) {
      const std::string letter(character(text, at));
      at += letter.size();
      const auto& spelled = letters_.at(letter);
      tokens.insert(tokens.end(), spelled.begin(), spelled.end());
    }
    return tokens;
  }

  const PromptSheet& sheet_;
  std::map<std::string, Tokens> letters_;
};

// The layout's parts, texts that follow each other as one.
std::vector<Part> parts_of(const Layout& layout, std::vector<Part> question) {
  std::vector<Part> parts;
  const auto add = [&](const Part& part) {
    if (part.is_text() && !parts.empty() && parts.back().is_text())
      parts.back().text += part.text;
    else
      parts.push_back(part);
  };
  for (const auto& piece : layout.pieces)
    if (piece.kind == "question")
      for (const auto& part : question) add(part);
    else
      add({piece.text, piece.tokens, piece.kind == "picture"});
  return parts;
}

// A text cut into its marks and what lies between them.
std::vector<std::string> at_marks(const std::string& text, const std::vector<std::string>& marks) {
  std::vector<std::string> stretches;
  size_t done = 0;
  for (size_t at = 0; at < text.size();) {
    const auto mark = std::find_if(marks.begin(), marks.end(), [&](const auto& x) {
      return text.compare(at, x.size(), x) == 0;
    });
    if (mark == marks.end()) {
      ++at;
      continue;
    }
    if (at > done) stretches.push_back(text.substr(done, at - done));
    stretches.push_back(*mark);
    done = at += mark->size();
  }
  if (done < text.size()) stretches.push_back(text.substr(done));
  return stretches;
}

}  // namespace

Prompt write_prompt(const std::string& question, bool with_picture, const Sidecar& sidecar,
                    const Tokenizer& tokenizer) {
  const auto& sheet = sidecar.prompt;
  if (with_picture && !sheet.with_picture)
    throw Error("the model takes text only; ask without a picture");
  if (!is_valid(question)) throw Error("the question is not valid UTF-8");
  const auto& layout = with_picture ? *sheet.with_picture : sheet.without_picture;
  auto parts =
      parts_of(layout, Shield(sheet)(sheet.strip ? tokenizer.stripped(question) : question));
  Prompt prompt{layout.begin, std::nullopt};
  const auto append = [&](const Tokens& tokens) {
    prompt.tokens.insert(prompt.tokens.end(), tokens.begin(), tokens.end());
  };
  // Whether the next text begins what is tokenised.
  bool first = true;
  for (const auto& part : parts) {
    if (part.is_picture) {
      prompt.picture = int(prompt.tokens.size());
      append(Tokens(sheet.image_tokens, sheet.filler));
      first = sheet.apart;
    } else if (!part.is_text()) {
      append(part.tokens);
      first = false;
    } else {
      for (const auto& stretch : at_marks(part.text, sheet.marks)) {
        const bool is_mark = std::find(sheet.marks.begin(), sheet.marks.end(), stretch) !=
                             sheet.marks.end();
        append(tokenizer.encode(stretch, first || is_mark));
        first = is_mark;
      }
    }
  }
  append(layout.end);
  return prompt;
}
