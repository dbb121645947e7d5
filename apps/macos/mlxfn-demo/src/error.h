// What a user, a file or a caller can cause: one sentence, printed as "error: ...".
#pragma once

#include <stdexcept>

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
