// UTF-8, character by character.
#pragma once

#include <string>
#include <string_view>

#include <utf8proc.h>

// The character at a place of valid UTF-8, as bytes.
inline std::string_view character(std::string_view text, size_t at) {
  const auto lead = static_cast<unsigned char>(text[at]);
  const size_t size = lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
  return text.substr(at, size);
}

inline int32_t code_of(std::string_view character) {
  utf8proc_int32_t code = -1;
  utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(character.data()),
                   utf8proc_ssize_t(character.size()), &code);
  return code;
}

inline std::string from_code(int32_t code) {
  utf8proc_uint8_t bytes[4];
  const auto size = utf8proc_encode_char(code, bytes);
  return {reinterpret_cast<char*>(bytes), size_t(size)};
}

inline bool is_valid(std::string_view text) {
  for (size_t at = 0; at < text.size();) {
    utf8proc_int32_t code;
    const auto size =
        utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(&text[at]),
                         utf8proc_ssize_t(text.size() - at), &code);
    if (size < 1) return false;
    at += size_t(size);
  }
  return true;
}
