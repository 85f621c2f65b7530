// The second half of a search: scales found for up to 256 blocks onto the 8-bit grid that they share.
#pragma once

#include <algorithm>
#include <cmath>

#include "codebook.h"
#include "rounding.h"
#include "search.h"

namespace nf4 {

// `kNear`: scales of each block near which entries are tried.
template <int kNear>
struct Grid {
  static constexpr int kTried = 3 * kNear;  // entries for each block: the nearest and its neighbours

  uint8_t entries[kNestedBlock * kTried];
  float scales[kNestedBlock * kTried];
  int16_t inverses[kNestedBlock * kTried];  // of the scales, as search.h has them
  float weights[kNestedBlock * kTried];     // of errors, to compare them
  float errors[kNestedBlock * kTried];      // to be filled in, above zero

  // The first block's entries next to the wanted scales [count, kNear]. Those that are zero, or so small that
  // values lie far outside of the levels, are not compared.
  void fill(const float* absmax, const float* wanted, int64_t count, float nested_absmax) {
    const float inverse = limited_inverse(1.0f, nested_absmax);
    for (int64_t i = 0; i < count * kNear; ++i) {
      const uint8_t entry = nearest_nested(wanted[i] * inverse);
      uint8_t* const tried = entries + 3 * i;
      tried[0] = entry;
      tried[1] = uint8_t(entry - (entry > 0));
      tried[2] = uint8_t(entry + (entry < 255));
      for (int j = 0; j < 3; ++j) {
        scales[3 * i + j] = kNestedMap[tried[j]] * nested_absmax;
        errors[3 * i + j] = absmax[i / kNear];
      }
    }
    for (int64_t at = 0; at < count * kTried; ++at) {  // apart and without branches, so that it vectorizes
      const float ratio = errors[at] / scales[at];
      const float fixed = ratio * float(kUnit), weight = 1.0f / (ratio * ratio);
      const uint32_t compared = std::fabs(fixed) <= float(kLargestInverse) ? ~0u : 0u;  // not if it is NaN
      inverses[at] = int16_t(bits_of(float_of(bits_of(fixed) & compared) + kMagic) - bits_of(kMagic));
      weights[at] = float_of((bits_of(weight) & compared) | (bits_of(INFINITY) & ~compared));
    }
  }

  // The best entry of each block, the first of equals, its scale and its error.
  void choose(int64_t count, uint8_t* chosen_entries, float* chosen_scales, float* least_errors) const {
    for (int64_t i = 0; i < count; ++i) {
      int64_t best = i * kTried;
      float least = INFINITY;
      for (int64_t at = i * kTried; at < (i + 1) * kTried; ++at) {
        const float error = errors[at] * weights[at];
        if (!(error < least)) continue;
        best = at;
        least = error;
      }
      chosen_entries[i] = entries[best];
      chosen_scales[i] = scales[best];
      least_errors[i] = least;
    }
  }
};

// What a group is on a grid.
struct Fitted {
  uint8_t entries[kNestedBlock];
  float scales[kNestedBlock];
  float errors[kNestedBlock];
};

static inline float largest_magnitude_of(const float* values, int64_t count, int64_t step) {
  float largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::fabs(values[i * step]));
  return largest;
}

// By how much a block's error exceeds that with a scale of absmax, 0 to kExcessUnits^2.
static inline int32_t excess_of(float error, float plain_error, float absmax) {
  const float units = (error / plain_error - kMostExcess) * kExcessUnits;
  if (absmax == 0.0f || !(units > 0.0f)) return 0;
  const int32_t whole = int32_t(bits_of(std::min(units, kExcessUnits) + kMagic) - bits_of(kMagic));
  return whole * whole;
}

}  // namespace nf4
