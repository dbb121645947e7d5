#include "digest.h"

#include <array>
#include <fstream>
#include <memory>
#include <vector>

#ifdef __APPLE__
#include <CommonCrypto/CommonDigest.h>
#else
#include <openssl/evp.h>
#endif

#include "error.h"

namespace {

#ifdef __APPLE__
class Hash {
 public:
  Hash() { CC_SHA256_Init(&state_); }
  void update(const char* data, size_t size) {
    CC_SHA256_Update(&state_, data, static_cast<CC_LONG>(size));
  }
  std::array<unsigned char, 32> finish() {
    std::array<unsigned char, 32> digest;
    CC_SHA256_Final(digest.data(), &state_);
    return digest;
  }

 private:
  CC_SHA256_CTX state_;
};
#else
class Hash {
 public:
  Hash() { EVP_DigestInit_ex(state_.get(), EVP_sha256(), nullptr); }
  void update(const char* data, size_t size) {
    EVP_DigestUpdate(state_.get(), data, size);
  }
  std::array<unsigned char, 32> finish() {
    std::array<unsigned char, 32> digest;
    EVP_DigestFinal_ex(state_.get(), digest.data(), nullptr);
    return digest;
  }

 private:
  std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> state_{EVP_MD_CTX_new(),
                                                               EVP_MD_CTX_free};
};
#endif

std::string hexadecimal(Hash& hash) {
  static constexpr char digits[] = "0123456789abcdef";
  std::string text;
  for (unsigned char byte : hash.finish()) {
    text += digits[byte >> 4];
    text += digits[byte & 15];
  }
  return text;
}

}  // namespace

std::string sha256(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw Error(path.string() + " cannot be opened; check who may read it");
  Hash hash;
  std::vector<char> block(1 << 20);
  while (file.read(block.data(), block.size()), file.gcount() > 0)
    hash.update(block.data(), file.gcount());
  return hexadecimal(hash);
}

std::string sha256(const std::vector<float>& values) {
  Hash hash;
  hash.update(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
  return hexadecimal(hash);
}
