// Conversions of single values between float32 and the 16-bit types; round to nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>

namespace nf4 {

static inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static inline float bf16_to_float(uint16_t bits) { return float_of(uint32_t(bits) << 16); }

static inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;  // NaN: rounding could carry into the exponent
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

static inline float fp16_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // inf, NaN
  if (magnitude < 0x400u) return float_of(sign | bits_of(float(magnitude) * 0x1p-24f));        // subnormal
  return float_of(sign | ((magnitude << 13) + (112u << 23)));
}

static inline uint16_t float_to_fp16(float value) {
  const uint32_t bits = bits_of(value);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00;   // NaN
  if (magnitude >= 0x477ff000u) return sign | 0x7c00;  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {                       // below 2^-14: a multiple of 2^-24
    // Adding 0.5 leaves that multiple, rounded by the FPU, in the low bits of the sum.
    return sign | uint16_t(bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f));
  }
  return sign | uint16_t((magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1)) >> 13);
}

}  // namespace nf4
