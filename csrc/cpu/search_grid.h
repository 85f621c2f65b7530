// The second half of a search: scales found for up to 256 blocks onto the 8-bit grid that they share.
#pragma once

#include <algorithm>
#include <cmath>

#include "codebook.h"
#include "rounding.h"
#include "search.h"

namespace nf4 {

constexpr int kTried = 3;  // entries of the grid for each block: the nearest and its neighbours

struct Grid {
  uint8_t entries[kNestedBlock * kTried];
  float scales[kNestedBlock * kTried];
  int16_t inverses[kNestedBlock * kTried];  // of the scales, as search.h has them
  float weights[kNestedBlock * kTried];     // of errors, to compare them
  float errors[kNestedBlock * kTried];      // to be filled in, above zero

  // Entries next to the wanted scales. Those that are zero, or so small that values lie far outside of the
  // levels, are not compared. Returns nested_absmax.
  float fill(const float* absmax, const float* wanted, int64_t count) {
    float largest = 0;
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::fabs(wanted[i]));
    const float inverse = limited_inverse(1.0f, largest);
    for (int64_t i = 0; i < count; ++i) {
      const uint8_t entry = nearest_nested(wanted[i] * inverse);
      uint8_t* const tried = entries + i * kTried;
      tried[0] = entry;
      tried[1] = uint8_t(entry - (entry > 0));
      tried[2] = uint8_t(entry + (entry < 255));
      for (int j = 0; j < kTried; ++j) {
        scales[i * kTried + j] = kNestedMap[tried[j]] * largest;
        errors[i * kTried + j] = absmax[i];
      }
    }
    for (int64_t at = 0; at < count * kTried; ++at) {  // apart, so that it vectorizes
      const float ratio = errors[at] / scales[at];
      const float fixed = ratio * float(kUnit);
      const bool compared = std::fabs(fixed) <= float(kLargestInverse);  // not if it is NaN
      inverses[at] = int16_t(bits_of((compared ? fixed : 0.0f) + kMagic) - bits_of(kMagic));
      weights[at] = compared ? 1.0f / (ratio * ratio) : INFINITY;
    }
    return largest;
  }

  // The best entry of each block, the first of equals, and its scale.
  void choose(int64_t count, uint8_t* chosen_entries, float* chosen_scales) const {
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
    }
  }
};

}  // namespace nf4
