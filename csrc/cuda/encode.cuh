// The encoder for one thread: a block of 64 values from load to codes, to the bits of the CPU's (csrc/cpu/
// search.h says what the search does; nf4format/reference.py has it in plain numpy). A thread keeps its block
// in registers: nothing is summed across threads, and all threads of a warp take the same way.
//
// Cost of the search, an element: 13 multipliers for both signs and 3 entries of the grid, each about a
// multiplication, two shifts and a mask for y and its bin, and for each sign a read of shared memory, two
// instructions to take it apart, |y - middle| - half, and its square: near 230 integer instructions. An H100
// starts 132 SMs * 64 lanes * 1.7 GHz of them a second: 60e9 elements, twice what PCIe 5.0 x16 brings.
//
// Compiled for the host too, so that the arithmetic is tested where there is no GPU; there without
// contraction to fused multiply-add. On the device the intrinsics promise one rounding each.
#pragma once

#include <cstdint>

#include "../cpu/search.h"

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define NF4_DEVICE static __device__ __forceinline__
#else
#include <cmath>

#include "../cpu/rounding.h"
#define NF4_DEVICE static inline
#endif

namespace nf4 {

// What all blocks share, in shared memory. 32 bins lie in as many banks, so that lanes never wait for each
// other whatever they look up.
struct EncodeTables {
  // By bin of y: the middle between the two nearest levels (high half) and minus half their distance.
  uint32_t bins[2][kBins];  // plus, minus
  int pairs[2][3][kPairs];  // borders, middles, minus halves; for levels without bins
  float thresholds[16];     // ascending, and infinity
  float midpoints[256];     // of kNestedMap, and infinity
  float nested_map[256];    // kNestedMap
  float multipliers[16];    // 0.70, 0.75 ...
  float squares[16];        // of them
  int inverses[16];         // of them
};

// From levels as the CPU's search wants them.
EncodeTables encode_tables(const SearchTables& tables);

constexpr float kLargest = 0x1.fffffep127f;

#ifdef __CUDACC__
NF4_DEVICE float multiplied(float a, float b) { return __fmul_rn(a, b); }
NF4_DEVICE float added(float a, float b) { return __fadd_rn(a, b); }
NF4_DEVICE float divided(float a, float b) { return __fdiv_rn(a, b); }
NF4_DEVICE uint32_t bits(float value) { return __float_as_uint(value); }
NF4_DEVICE float from_bits(uint32_t word) { return __uint_as_float(word); }
NF4_DEVICE float half_bits_to_float(uint32_t half) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(half)));
}
// |a - b| + c
NF4_DEVICE int distance_plus(int a, int b, int c) {
  return static_cast<int>(__sad(a, b, static_cast<unsigned>(c)));
}
#else
struct uint4 {
  uint32_t x, y, z, w;
};
NF4_DEVICE float multiplied(float a, float b) { return a * b; }
NF4_DEVICE float added(float a, float b) { return a + b; }
NF4_DEVICE float divided(float a, float b) { return a / b; }
NF4_DEVICE uint32_t bits(float value) { return bits_of(value); }
NF4_DEVICE float from_bits(uint32_t word) { return float_of(word); }
NF4_DEVICE float half_bits_to_float(uint32_t half) { return fp16_to_float(static_cast<uint16_t>(half)); }
NF4_DEVICE int distance_plus(int a, int b, int c) { return (a > b ? a - b : b - a) + c; }
#endif

NF4_DEVICE float limited(float value) {
  return value < kLargest ? (value > -kLargest ? value : -kLargest) : kLargest;
}

// The nearest integer, ties to even, of a number below 2^22.
NF4_DEVICE int nearest_integer(float value) {
  return static_cast<int>(bits(added(value, kMagic)) - 0x4b400000u);
}

// Values 8 * piece .. 8 * piece + 7 of a block, whose first value is 16-byte aligned.
NF4_DEVICE void load_eight(const void* block, Dtype dtype, int piece, float* wide) {
  const uint4* const words = static_cast<const uint4*>(block);
  if (dtype == Dtype::float32) {
    for (int i = 0; i < 2; ++i) {
      const uint4 four = words[2 * piece + i];
      wide[4 * i] = from_bits(four.x);
      wide[4 * i + 1] = from_bits(four.y);
      wide[4 * i + 2] = from_bits(four.z);
      wide[4 * i + 3] = from_bits(four.w);
    }
    return;
  }
  const uint4 eight = words[piece];
  const uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
  for (int i = 0; i < 4; ++i) {
    const bool is_half = dtype == Dtype::float16;
    wide[2 * i] = is_half ? half_bits_to_float(pairs[i] & 0xffffu) : from_bits(pairs[i] << 16);
    wide[2 * i + 1] = is_half ? half_bits_to_float(pairs[i] >> 16) : from_bits(pairs[i] & 0xffff0000u);
  }
}

NF4_DEVICE const void* block_at(const void* values, Dtype dtype, int64_t block) {
  return static_cast<const char*>(values) + block * (kBlock * (dtype == Dtype::float32 ? 4 : 2));
}

// The largest magnitude, as bits: they order like magnitudes, with infinity and NaN above all.
NF4_DEVICE uint32_t largest_bits(const void* block, Dtype dtype) {
  uint32_t largest = 0;
#pragma unroll 1
  for (int piece = 0; piece < 8; ++piece) {
    float wide[8];
    load_eight(block, dtype, piece, wide);
    for (int i = 0; i < 8; ++i) {
      const uint32_t magnitude = bits(wide[i]) & 0x7fffffffu;
      largest = magnitude > largest ? magnitude : largest;
    }
  }
  return largest;
}

constexpr uint32_t kInfinityBits = 0x7f800000u;

// The block in units of absmax / 32767.
NF4_DEVICE void load_fixed(const void* block, Dtype dtype, float absmax, int* x) {
  const float factor = limited(divided(32767.0f, absmax));
#pragma unroll
  for (int piece = 0; piece < 8; ++piece) {
    float wide[8];
    load_eight(block, dtype, piece, wide);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[8 * piece + i] = nearest_integer(multiplied(wide[i], factor));
  }
}

// Squared distance of y from the nearest level. `product`: y = product >> 15.
template <bool has_bins>
NF4_DEVICE int squared_distance(const EncodeTables& tables, int sign, int product) {
  const int y = product >> 15;
  if (has_bins) {
    // y >> kBinShift, modulo kBins, as a byte offset.
    const uint32_t offset = static_cast<uint32_t>(product >> (15 + kBinShift - 2)) & (4 * kBins - 4);
    const uint32_t bin =
        *reinterpret_cast<const uint32_t*>(reinterpret_cast<const char*>(tables.bins[sign]) + offset);
    const int distance = distance_plus(y, static_cast<int>(bin) >> 16, static_cast<int16_t>(bin & 0xffffu));
    return distance * distance;
  }
  const int (&pairs)[3][kPairs] = tables.pairs[sign];
  int middle = pairs[1][0], minus_half = pairs[2][0];
#pragma unroll
  for (int pair = 1; pair < kPairs; ++pair) {
    const bool above = y > pairs[0][pair - 1];
    middle = above ? pairs[1][pair] : middle;
    minus_half = above ? pairs[2][pair] : minus_half;
  }
  const int distance = distance_plus(y, middle, minus_half);
  return distance * distance;
}

// absmax times the best multiplier and sign, the first of equally good ones.
template <bool has_bins>
NF4_DEVICE float best_scale(const EncodeTables& tables, const int* x, float absmax) {
  float least[2] = {from_bits(kInfinityBits), from_bits(kInfinityBits)};
  int best[2] = {0, 0};
#pragma unroll 1
  for (int i = 0; i < kMultipliers; ++i) {
    const int inverse = tables.inverses[i];
    int sums[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < kBlock; ++j) {
      const int product = x[j] * inverse + (1 << 14);
      sums[0] += squared_distance<has_bins>(tables, 0, product);
      sums[1] += squared_distance<has_bins>(tables, 1, product);
    }
#pragma unroll
    for (int sign = 0; sign < 2; ++sign) {
      const float error = multiplied(static_cast<float>(sums[sign]), tables.squares[i]);
      if (!(error < least[sign])) continue;
      least[sign] = error;
      best[sign] = i;
    }
  }
  const bool minus = least[1] < least[0];
  const float scale = multiplied(absmax, tables.multipliers[minus ? best[1] : best[0]]);
  const float magnitude = scale < kLargest ? scale : kLargest;
  return minus ? -magnitude : magnitude;
}

// The best of the three entries of the map next to a scale, and in `scale` what it decodes to.
template <bool has_bins>
NF4_DEVICE int best_entry(const EncodeTables& tables, const int* x, float absmax, float nested_absmax,
                          float* scale) {
  const float relative = multiplied(*scale, limited(divided(1.0f, nested_absmax)));
  int nearest = 0;  // midpoints below
#pragma unroll
  for (int step = 128; step > 0; step /= 2) {
    if (relative > tables.midpoints[nearest + step - 1]) nearest += step;
  }
  float least = from_bits(kInfinityBits);
  int best = nearest;
#pragma unroll 1
  for (int tried = 0; tried < 3; ++tried) {
    const int lower = nearest - (nearest > 0), upper = nearest + (nearest < 255);
    const int entry = tried == 0 ? nearest : tried == 1 ? lower : upper;
    const float ratio = divided(absmax, multiplied(tables.nested_map[entry], nested_absmax));
    const float fixed = multiplied(ratio, static_cast<float>(kUnit));
    // Not if it is NaN: scales that are zero, or so small that values lie far outside of the levels.
    const bool compared = (fixed < 0.0f ? -fixed : fixed) <= static_cast<float>(kLargestInverse);
    const int inverse = nearest_integer(compared ? fixed : 0.0f);
    const float weight = compared ? divided(1.0f, multiplied(ratio, ratio)) : from_bits(kInfinityBits);
    const int sign = inverse < 0, magnitude = inverse < 0 ? -inverse : inverse;
    int sum = 0;
#pragma unroll
    for (int j = 0; j < kBlock; ++j) {
      sum += squared_distance<has_bins>(tables, sign, x[j] * magnitude + (1 << 14));
    }
    const float error = multiplied(added(static_cast<float>(sum), 1.0f), weight);  // + 1: not 0 * infinity
    if (!(error < least)) continue;
    least = error;
    best = entry;
  }
  *scale = multiplied(tables.nested_map[best], nested_absmax);
  return best;
}

NF4_DEVICE uint32_t code_of(const EncodeTables& tables, float scaled) {
  const float* const thresholds = tables.thresholds;
  uint32_t code = scaled > thresholds[7] ? 8 : 0;
  code += scaled > thresholds[code + 3] ? 4 : 0;
  code += scaled > thresholds[code + 1] ? 2 : 0;
  code += scaled > thresholds[code] ? 1 : 0;
  return code;
}

// The 32 bytes of codes; values are multiplied by `factor` before they are looked up.
NF4_DEVICE void encode_block(const EncodeTables& tables, const void* block, Dtype dtype, float factor,
                             uint4* codes) {
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float wide[8];
      load_eight(block, dtype, 4 * half + i, wide);
      words[i] = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) {  // the first of two in the high nibble, bytes in rising order
        words[i] |= code_of(tables, multiplied(wide[j], factor)) << (4 * (j ^ 1));
      }
    }
    codes[half] = uint4{words[0], words[1], words[2], words[3]};
  }
}

// What values are multiplied by for a scale; zero gives every value the code of 0.
NF4_DEVICE float factor_of_scale(float scale) { return scale == 0.0f ? 0.0f : limited(divided(1.0f, scale)); }

}  // namespace nf4
