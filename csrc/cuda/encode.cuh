// The encoder for one thread: a block of 64 values from load to codes, to the bits of the CPU's (csrc/cpu/
// search.h says what the search does; nf4format/reference.py has it in plain numpy). A thread keeps its block
// in registers: nothing is summed across threads, and all threads of a warp take the same way.
//
// Cost of the search, an element: 13 multipliers for both signs, 6 entries of the grid, and absmax itself.
// Each is about a multiplication, two shifts and a mask or two for y and its bin, and for each sign a read of
// shared memory, two instructions to take it apart, |y - middle| - half, and its square: near 260 integer
// instructions. An H100 starts 132 SMs * 64 lanes * 1.7 GHz of them a second: 55e9 elements, twice what PCIe
// 5.0 x16 brings. Groups whose grid is shifted cost another 9 entries for each attempt.
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
  // By bin of y: the middle between the two nearest levels (high half) and minus half their distance. Of the
  // coarse ones the double.
  uint32_t bins[2][kBins];  // plus, minus
  uint32_t coarse_bins[2][kBins];
  int pairs[2][3][kPairs];           // borders, middles, minus halves; for levels without bins
  uint8_t coarse_distances[2][256];  // by y modulo 256; for levels without bins
  float thresholds[16];              // ascending, and infinity
  float midpoints[256];              // of kNestedMap, and infinity
  float nested_map[256];             // kNestedMap
  float multipliers[16];             // about 0.70, 0.75 ...
  float squares[16];                 // of them
  int inverses[16];                  // of them, in the coarse fixed point
  float grid_shifts[1 + kShifts];    // 1, kGridShifts
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

// Distance of y from the nearest level, which may be in any pair.
NF4_DEVICE int distance_in_pairs(const int (&pairs)[3][kPairs], int y) {
  int middle = pairs[1][0], minus_half = pairs[2][0];
#pragma unroll
  for (int pair = 1; pair < kPairs; ++pair) {
    const bool above = y > pairs[0][pair - 1];
    middle = above ? pairs[1][pair] : middle;
    minus_half = above ? pairs[2][pair] : minus_half;
  }
  return distance_plus(y, middle, minus_half);
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
  const int distance = distance_in_pairs(tables.pairs[sign], y);
  return distance * distance;
}

// The same in the coarse fixed point, times 4.
template <bool has_bins>
NF4_DEVICE int coarse_squared_distance(const EncodeTables& tables, int sign, int product) {
  if (has_bins) {
    const int twice_y = (product >> 14) & ~1;
    const uint32_t offset = static_cast<uint32_t>(product >> (15 + kCoarseBinShift - 2)) & (4 * kBins - 4);
    const uint32_t bin =
        *reinterpret_cast<const uint32_t*>(reinterpret_cast<const char*>(tables.coarse_bins[sign]) + offset);
    const int distance =
        distance_plus(twice_y, static_cast<int>(bin) >> 16, static_cast<int16_t>(bin & 0xffffu));
    return distance * distance;
  }
  const int distance = tables.coarse_distances[sign][(product >> 15) & 255];
  return 4 * distance * distance;
}

// Sum over the block of squared distances, for a scale and its inverse in fixed point.
template <bool has_bins>
NF4_DEVICE int block_error(const EncodeTables& tables, const int* x, int inverse) {
  const int sign = inverse < 0, magnitude = inverse < 0 ? -inverse : inverse;
  int sum = 0;
#pragma unroll
  for (int j = 0; j < kBlock; ++j) {
    sum += squared_distance<has_bins>(tables, sign, x[j] * magnitude + (1 << 14));
  }
  return sum;
}

// What the search has found for a block before it knows the grid.
struct Wanted {
  float scales[kWanted];  // absmax times the best multipliers, with their signs; the first of equals first
  float plain_error;      // that of a scale of absmax
};

// The least two numbers of a sequence, the first of equals first, and where they are.
struct LeastTwo {
  float first, second;
  int at_first, at_second;
};

NF4_DEVICE void consider(LeastTwo& least, float error, int at) {
  if (error < least.first) {
    least.second = least.first;
    least.at_second = least.at_first;
    least.first = error;
    least.at_first = at;
  } else if (error < least.second) {
    least.second = error;
    least.at_second = at;
  }
}

// `at`: the multiplier's index, and 16 more for minus.
NF4_DEVICE float scale_of_candidate(const EncodeTables& tables, int at, float absmax) {
  const float scale = multiplied(absmax, tables.multipliers[at & 15]);
  const float magnitude = scale < kLargest ? scale : kLargest;
  return at >= 16 ? -magnitude : magnitude;
}

template <bool has_bins>
NF4_DEVICE Wanted best_scales(const EncodeTables& tables, const int* x, float absmax) {
  const float infinity = from_bits(kInfinityBits);
  LeastTwo plus = {infinity, infinity, 0, 0}, minus = plus;
#pragma unroll 1
  for (int i = 0; i < kMultipliers; ++i) {
    const int inverse = tables.inverses[i];
    int sums[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < kBlock; ++j) {
      const int product = x[j] * inverse + (1 << 14);
      sums[0] += coarse_squared_distance<has_bins>(tables, 0, product);
      sums[1] += coarse_squared_distance<has_bins>(tables, 1, product);
    }
    consider(plus, multiplied(static_cast<float>(sums[0]), tables.squares[i]), i);
    consider(minus, multiplied(static_cast<float>(sums[1]), tables.squares[i]), 16 + i);
  }
  consider(plus, minus.first, minus.at_first);  // plus comes before minus
  consider(plus, minus.second, minus.at_second);
  Wanted wanted;
  wanted.scales[0] = scale_of_candidate(tables, plus.at_first, absmax);
  wanted.scales[1] = scale_of_candidate(tables, plus.at_second, absmax);
  wanted.plain_error = added(static_cast<float>(block_error<has_bins>(tables, x, kUnit)), 1.0f);
  return wanted;
}

// An entry of the map for a block, and its error.
struct Entry {
  int index;
  float error;
};

// The best of the three entries of the map next to either scale, and those next to absmax if asked for.
template <bool has_bins>
NF4_DEVICE Entry best_entry(const EncodeTables& tables, const int* x, float absmax, const Wanted& wanted,
                            bool near_absmax, float nested_absmax) {
  const float inverse_nested = limited(divided(1.0f, nested_absmax));
  Entry best = {0, from_bits(kInfinityBits)};
  int nearest = 0;
#pragma unroll 1
  for (int tried = 0; tried < (near_absmax ? 9 : 6); ++tried) {
    const int place = tried % 3;
    if (place == 0) {
      const float scale = tried == 0 ? wanted.scales[0] : tried == 3 ? wanted.scales[1] : absmax;
      const float relative = multiplied(scale, inverse_nested);
      nearest = 0;  // midpoints below
#pragma unroll
      for (int step = 128; step > 0; step /= 2) {
        if (relative > tables.midpoints[nearest + step - 1]) nearest += step;
      }
      if (tried == 0) best.index = nearest;
    }
    const int lower = nearest - (nearest > 0), upper = nearest + (nearest < 255);
    const int entry = place == 0 ? nearest : place == 1 ? lower : upper;
    const float ratio = divided(absmax, multiplied(tables.nested_map[entry], nested_absmax));
    const float fixed = multiplied(ratio, static_cast<float>(kUnit));
    // Not if it is NaN: scales that are zero, or so small that values lie far outside of the levels.
    const bool compared = (fixed < 0.0f ? -fixed : fixed) <= static_cast<float>(kLargestInverse);
    const float weight = compared ? divided(1.0f, multiplied(ratio, ratio)) : from_bits(kInfinityBits);
    const int sum = block_error<has_bins>(tables, x, nearest_integer(compared ? fixed : 0.0f));
    const float error = multiplied(added(static_cast<float>(sum), 1.0f), weight);  // + 1: not 0 * infinity
    if (!(error < best.error)) continue;
    best = Entry{entry, error};
  }
  return best;
}

// By how much a block's error exceeds that with a scale of absmax; csrc/cpu/search_grid.h.
NF4_DEVICE int excess_on_grid(float error, float plain_error, float absmax) {
  const float units = multiplied(added(divided(error, plain_error), -kMostExcess), kExcessUnits);
  if (absmax == 0.0f || !(units > 0.0f)) return 0;
  const int whole = nearest_integer(units < kExcessUnits ? units : kExcessUnits);
  return whole * whole;
}

// nested_absmax of the grids that are tried, one after the other: attempts 0 to kShifts, the first without
// entries near absmax.
NF4_DEVICE float shifted_grid(const EncodeTables& tables, float nested_absmax, int attempt) {
  const float shifted = multiplied(nested_absmax, tables.grid_shifts[attempt]);
  return shifted < kLargest ? shifted : kLargest;
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
