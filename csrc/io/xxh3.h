// XXH3-64 with seed 0 and the default secret, of data that comes in pieces and whose length is known.
#pragma once

#include <cstdint>

namespace nf4 {

class Xxh3 {
 public:
  static constexpr int64_t kBlockBytes = 1024;

  explicit Xxh3(int64_t length);  // of all pieces together

  // The next piece: a multiple of kBlockBytes, unless it is the last.
  void update(const uint8_t* data, int64_t size);

  // When all pieces were there.
  uint64_t digest() const;

 private:
  const uint64_t length_;
  uint64_t done_ = 0;
  uint64_t short_digest_ = 0;     // of up to 240 bytes, which come in one piece
  uint8_t last_stripe_[64] = {};  // the last bytes so far
  alignas(64) uint64_t lanes_[8];
};

}  // namespace nf4
