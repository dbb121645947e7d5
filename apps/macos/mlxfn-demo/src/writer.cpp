#include "writer.h"

namespace {

const std::string kReplacement = "\ufffd";

// UTF-8 in which every longest piece that can begin no character is U+FFFD, as Unicode
// recommends (chapter 3.9) and Python does.
std::string decoded(const std::string& bytes) {
  std::string text;
  for (size_t at = 0; at < bytes.size();) {
    const auto byte = [&](size_t i) { return i < bytes.size() ? int(uint8_t(bytes[i])) : -1; };
    const int lead = byte(at);
    const int more = lead < 0x80                    ? 0
                     : lead >= 0xc2 && lead <= 0xdf ? 1
                     : lead >= 0xe0 && lead <= 0xef ? 2
                     : lead >= 0xf0 && lead <= 0xf4 ? 3
                                                    : -1;
    // The second byte's range leaves out what other lengths or no character can spell.
    const int low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
    const int high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
    int found = 0;
    while (found < more) {
      const int next = byte(at + found + 1);
      if (next < (found ? 0x80 : low) || next > (found ? 0xbf : high)) break;
      ++found;
    }
    text += found == more ? bytes.substr(at, size_t(more) + 1) : kReplacement;
    at += size_t(found) + 1;
  }
  return text;
}

}  // namespace

std::string Writer::add(int token) {
  // Decoders are padded: their last tokens may have no text.
  if (token >= known_) return "";
  const auto& bytes = tokenizer_.bytes(token);
  waiting_ += bytes;
  const auto text = decoded(waiting_);
  // A byte-level tokenizer's single space may be the one that is left out.
  const bool waits = sheet_.kind == "byte_level" && bytes == " ";
  if (waits || text.ends_with(kReplacement)) return "";
  return flush(text);
}

std::string Writer::finish() { return flush(decoded(waiting_)); }

std::string Writer::flush(std::string text) {
  waiting_.clear();
  if (!begun_ && sheet_.trim && text.starts_with(' ')) text.erase(0, 1);
  begun_ = begun_ || !text.empty();
  return text;
}
