// How it works. Up to 240 bytes are folded by one of five short formulas. Longer inputs go through eight
// 64-bit lanes, a stripe of 64 bytes at a time:
//
//     lane[i]     += low32(data[i] ^ key[i]) * high32(data[i] ^ key[i])
//     lane[i ^ 1] += data[i]
//
// where key is the secret from byte 8 * stripe on; after each block of 16 stripes the lanes are scrambled.
// The last 64 bytes are always a stripe of their own, with a key of their own, wherever the last whole one
// ended. (xxHash specification, "XXH3 Algorithm Overview".) Little endian.
#include "xxh3.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace nf4 {
namespace {

constexpr int kStripe = 64, kStripesPerBlock = 16;
constexpr uint64_t kLongest = 240;  // of the short formulas
constexpr uint64_t kPrime32_1 = 0x9E3779B1, kPrime32_2 = 0x85EBCA77, kPrime32_3 = 0xC2B2AE3D;
constexpr uint64_t kPrime64_1 = 0x9E3779B185EBCA87, kPrime64_2 = 0xC2B2AE3D27D4EB4F,
                   kPrime64_3 = 0x165667B19E3779F9, kPrime64_4 = 0x85EBCA77C2B2AE63,
                   kPrime64_5 = 0x27D4EB2F165667C5;
constexpr uint64_t kMix1 = 0x165667919E3779F9, kMix2 = 0x9FB21C651E98DF25;

alignas(64) constexpr uint8_t kSecret[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};
constexpr int kScrambleKey = 192 - kStripe, kLastKey = kScrambleKey - 7, kMergeKey = 11;

inline uint64_t read64(const uint8_t* p) {
  uint64_t value;
  memcpy(&value, p, 8);
  return value;
}

inline uint64_t read32(const uint8_t* p) {
  uint32_t value;
  memcpy(&value, p, 4);
  return value;
}

inline uint64_t rotate_left(uint64_t x, int by) { return x << by | x >> (64 - by); }

inline uint64_t folded_product(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

inline uint64_t avalanche(uint64_t h) {
  h = (h ^ h >> 37) * kMix1;
  return h ^ h >> 32;
}

inline uint64_t avalanche_xxh64(uint64_t h) {
  h = (h ^ h >> 33) * kPrime64_2;
  h = (h ^ h >> 29) * kPrime64_3;
  return h ^ h >> 32;
}

inline uint64_t mix16(const uint8_t* data, const uint8_t* key) {
  return folded_product(read64(data) ^ read64(key), read64(data + 8) ^ read64(key + 8));
}

uint64_t digest_up_to_16(const uint8_t* data, uint64_t length) {
  if (length > 8) {
    const uint64_t low = read64(data) ^ read64(kSecret + 24) ^ read64(kSecret + 32);
    const uint64_t high = read64(data + length - 8) ^ read64(kSecret + 40) ^ read64(kSecret + 48);
    return avalanche(length + __builtin_bswap64(low) + high + folded_product(low, high));
  }
  if (length >= 4) {
    uint64_t h = read32(data + length - 4) + (read32(data) << 32);
    h ^= read64(kSecret + 8) ^ read64(kSecret + 16);
    h = (h ^ rotate_left(h, 49) ^ rotate_left(h, 24)) * kMix2;
    h = (h ^ ((h >> 35) + length)) * kMix2;
    return h ^ h >> 28;
  }
  if (length == 0) return avalanche_xxh64(read64(kSecret + 56) ^ read64(kSecret + 64));
  const uint64_t bytes =
      uint64_t{data[0]} << 16 | uint64_t{data[length >> 1]} << 24 | data[length - 1] | length << 8;
  return avalanche_xxh64(bytes ^ read32(kSecret) ^ read32(kSecret + 4));
}

uint64_t digest_up_to_240(const uint8_t* data, uint64_t length) {
  if (length <= 16) return digest_up_to_16(data, length);
  uint64_t sum = length * kPrime64_1;
  if (length <= 128) {
    // Pairs of 16 bytes from both ends inwards.
    for (uint64_t pair = 0; pair <= (length - 1) / 32; ++pair) {
      sum += mix16(data + 16 * pair, kSecret + 32 * pair);
      sum += mix16(data + length - 16 * (pair + 1), kSecret + 32 * pair + 16);
    }
    return avalanche(sum);
  }
  for (int i = 0; i < 8; ++i) sum += mix16(data + 16 * i, kSecret + 16 * i);
  sum = avalanche(sum);
  for (uint64_t i = 8; i < length / 16; ++i) sum += mix16(data + 16 * i, kSecret + 16 * (i - 8) + 3);
  return avalanche(sum + mix16(data + length - 16, kSecret + 136 - 17));
}

// `stripes` stripes into the lanes; the key moves on by 8 bytes a stripe.
void stripes_portable(uint64_t* lanes, const uint8_t* data, int64_t stripes, const uint8_t* key) {
  for (int64_t stripe = 0; stripe < stripes; ++stripe, data += kStripe, key += 8) {
    for (int i = 0; i < 8; ++i) {
      const uint64_t value = read64(data + 8 * i), keyed = value ^ read64(key + 8 * i);
      lanes[i ^ 1] += value;
      lanes[i] += (keyed & 0xFFFFFFFF) * (keyed >> 32);
    }
  }
}

// Whole blocks, each scrambled.
void blocks_portable(uint64_t* lanes, const uint8_t* data, int64_t blocks) {
  for (int64_t block = 0; block < blocks; ++block, data += Xxh3::kBlockBytes) {
    stripes_portable(lanes, data, kStripesPerBlock, kSecret);
    for (int i = 0; i < 8; ++i) {
      lanes[i] = (lanes[i] ^ lanes[i] >> 47 ^ read64(kSecret + kScrambleKey + 8 * i)) * kPrime32_1;
    }
  }
}

#if defined(__x86_64__)

__attribute__((target("avx2"))) inline __m256i accumulated_avx2(__m256i lanes, const uint8_t* data,
                                                                const uint8_t* key) {
  const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
  const __m256i keyed = _mm256_xor_si256(value, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(key)));
  const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
  const __m256i swapped = _mm256_shuffle_epi32(value, _MM_SHUFFLE(1, 0, 3, 2));
  return _mm256_add_epi64(lanes, _mm256_add_epi64(product, swapped));
}

__attribute__((target("avx2"))) inline __m256i scrambled_avx2(__m256i lanes, const uint8_t* key) {
  const __m256i prime = _mm256_set1_epi64x(static_cast<int64_t>(kPrime32_1));
  const __m256i secret = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(key));
  const __m256i x = _mm256_xor_si256(_mm256_xor_si256(lanes, _mm256_srli_epi64(lanes, 47)), secret);
  const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), prime);
  return _mm256_add_epi64(_mm256_mul_epu32(x, prime), _mm256_slli_epi64(high, 32));
}

__attribute__((target("avx2"))) void blocks_avx2(uint64_t* lanes, const uint8_t* data, int64_t blocks) {
  __m256i* const at = reinterpret_cast<__m256i*>(lanes);
  __m256i low = _mm256_load_si256(at), high = _mm256_load_si256(at + 1);
  for (int64_t block = 0; block < blocks; ++block) {
    for (int stripe = 0; stripe < kStripesPerBlock; ++stripe, data += kStripe) {
      low = accumulated_avx2(low, data, kSecret + 8 * stripe);
      high = accumulated_avx2(high, data + 32, kSecret + 8 * stripe + 32);
    }
    low = scrambled_avx2(low, kSecret + kScrambleKey);
    high = scrambled_avx2(high, kSecret + kScrambleKey + 32);
  }
  _mm256_store_si256(at, low);
  _mm256_store_si256(at + 1, high);
}

__attribute__((target("avx512f"))) void blocks_avx512(uint64_t* lanes, const uint8_t* data, int64_t blocks) {
  const __m512i prime = _mm512_set1_epi64(static_cast<int64_t>(kPrime32_1));
  __m512i sums = _mm512_load_si512(lanes);
  for (int64_t block = 0; block < blocks; ++block) {
    for (int stripe = 0; stripe < kStripesPerBlock; ++stripe, data += kStripe) {
      const __m512i value = _mm512_loadu_si512(data);
      const __m512i keyed = _mm512_xor_si512(value, _mm512_loadu_si512(kSecret + 8 * stripe));
      const __m512i product = _mm512_mul_epu32(keyed, _mm512_srli_epi64(keyed, 32));
      const __m512i swapped = _mm512_shuffle_epi32(value, _MM_PERM_BADC);
      sums = _mm512_add_epi64(sums, _mm512_add_epi64(product, swapped));
    }
    const __m512i secret = _mm512_loadu_si512(kSecret + kScrambleKey);
    const __m512i x = _mm512_xor_si512(_mm512_xor_si512(sums, _mm512_srli_epi64(sums, 47)), secret);
    const __m512i high = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), prime);
    sums = _mm512_add_epi64(_mm512_mul_epu32(x, prime), _mm512_slli_epi64(high, 32));
  }
  _mm512_store_si512(lanes, sums);
}

#endif

// The best that this CPU has; NF4_CPU_ISA may ask for less, as for the other kernels.
using Blocks = void (*)(uint64_t* lanes, const uint8_t* data, int64_t blocks);

Blocks choose() {
#if defined(__x86_64__)
  const char* wanted = getenv("NF4_CPU_ISA");
  const auto may = [wanted](const char* isa) {
    return wanted == nullptr || *wanted == '\0' || strcmp(wanted, isa) == 0;
  };
  if (may("avx512") && __builtin_cpu_supports("avx512f")) return blocks_avx512;
  if (may("avx2") && __builtin_cpu_supports("avx2")) return blocks_avx2;
#endif
  return blocks_portable;
}

}  // namespace

Xxh3::Xxh3(int64_t length)
    : length_(static_cast<uint64_t>(length)),
      lanes_{kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3, kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1} {
  if (length == 0) short_digest_ = digest_up_to_240(nullptr, 0);
}

void Xxh3::update(const uint8_t* data, int64_t size) {
  static const Blocks blocks_of = choose();
  if (length_ <= kLongest) {
    if (size > 0) short_digest_ = digest_up_to_240(data, length_);
    return;
  }
  // A block is scrambled only when more follows it.
  const int64_t left = static_cast<int64_t>(length_ - done_);
  const int64_t blocks = (size < left ? size : size - 1) / kBlockBytes;
  blocks_of(lanes_, data, blocks);
  if (size == left) {
    const uint8_t* rest = data + blocks * kBlockBytes;
    stripes_portable(lanes_, rest, (size - blocks * kBlockBytes - 1) / kStripe, kSecret);
  }
  if (size >= kStripe) {
    memcpy(last_stripe_, data + size - kStripe, kStripe);
  } else {
    memmove(last_stripe_, last_stripe_ + size, static_cast<size_t>(kStripe - size));
    memcpy(last_stripe_ + kStripe - size, data, static_cast<size_t>(size));
  }
  done_ += static_cast<uint64_t>(size);
}

uint64_t Xxh3::digest() const {
  if (length_ <= kLongest) return short_digest_;
  uint64_t lanes[8];
  memcpy(lanes, lanes_, sizeof lanes);
  stripes_portable(lanes, last_stripe_, 1, kSecret + kLastKey);
  uint64_t sum = length_ * kPrime64_1;
  for (int i = 0; i < 4; ++i) {
    const uint8_t* key = kSecret + kMergeKey + 16 * i;
    sum += folded_product(lanes[2 * i] ^ read64(key), lanes[2 * i + 1] ^ read64(key + 8));
  }
  return avalanche(sum);
}

}  // namespace nf4
