// The second level: scales minus their mean, in blocks of 256, to the nearest entry of the 8-bit map.
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "codebook.h"
#include "float_environment.h"
#include "kernels.h"
#include "rounding.h"

namespace nf4 {
namespace {

// Nearest entries of the map. A value picks one of the intervals that share sign, exponent and the first six
// fraction bits; such an interval holds one midpoint of neighbours at most, so code = base + (value >
// midpoint).
class NestedSearch {
 public:
  NestedSearch() {
    const uint32_t first_bits = uint32_t(kLowestExponent + 127) << 23;
    int passed = 0;
    float midpoints[255];
    for (int i = 0; i < 255; ++i) midpoints[i] = (kNestedMap[i] + kNestedMap[i + 1]) / 2;
    // Positive intervals, rising.
    while (midpoints[passed] <= 0.0f) ++passed;
    for (int i = 0; i < kIntervals; ++i) {
      const float end = float_of(first_bits + (uint32_t(i + 1) << kShift));
      fill(positive_[i], midpoints, &passed, end);
    }
    // Negative ones, falling: interval i is (-end, -begin].
    passed = 0;
    for (int i = kIntervals - 1; i >= 0; --i) {
      const float begin = i == 0 ? 0.0f : float_of(first_bits + (uint32_t(i) << kShift));
      fill(negative_[i], midpoints, &passed, std::nextafter(-begin, 1.0f));
    }
  }

  uint8_t operator()(float value) const {
    const uint32_t bits = bits_of(value);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t first_bits = uint32_t(kLowestExponent + 127) << 23;
    const uint32_t offset = magnitude < first_bits ? 0 : (magnitude - first_bits) >> kShift;
    const Interval* const intervals = bits >> 31 ? negative_ : positive_;
    const Interval& interval = intervals[std::min<uint32_t>(offset, kIntervals - 1)];
    return uint8_t(interval.base + (value > interval.midpoint));
  }

 private:
  struct Interval {
    float midpoint;
    int base;
  };

  // The interval that ends before `end`, with `passed` midpoints below it.
  static void fill(Interval& interval, const float* midpoints, int* passed, float end) {
    interval = {FLT_MAX, *passed};
    if (*passed < 255 && midpoints[*passed] < end) interval.midpoint = midpoints[(*passed)++];
  }

  static constexpr int kShift = 23 - 6;
  static constexpr int kLowestExponent = -22;  // 2^-22 is below the midpoints next to zero, +-2.75e-7
  static constexpr int kIntervals = (1 - kLowestExponent) * 64;
  Interval positive_[kIntervals], negative_[kIntervals];
};

// The mean, in the order that nf4format/blocks.py states.
float mean(const float* values, int64_t n) {
  double lanes[8] = {};
  const int64_t whole = n / 8 * 8;
  for (int64_t i = 0; i < whole; i += 8) {
    for (int lane = 0; lane < 8; ++lane) lanes[lane] += double(values[i + lane]);
  }
  for (int64_t i = whole; i < n; ++i) lanes[i - whole] += double(values[i]);
  double total = 0;
  for (const double lane : lanes) total += lane;
  return float(total / double(n));
}

}  // namespace

uint8_t nearest_nested(float value) {
  static const NestedSearch search;
  return search(value);
}

float quantize_absmax(const float* absmax, int64_t n, uint8_t* codes, float* nested_absmax) {
  if (n == 0) return 0.0f;
  const DefaultFloatEnvironment environment;
  const float offset = mean(absmax, n);
  for (int64_t begin = 0; begin < n; begin += kNestedBlock) {
    const int64_t count = std::min(kNestedBlock, n - begin);
    float centred[kNestedBlock];
    float largest = 0;
    for (int64_t i = 0; i < count; ++i) {
      centred[i] = absmax[begin + i] - offset;
      largest = std::max(largest, std::fabs(centred[i]));
    }
    nested_absmax[begin / kNestedBlock] = largest;
    const float reciprocal = std::min(1.0f / largest, FLT_MAX);
    for (int64_t i = 0; i < count; ++i) codes[begin + i] = nearest_nested(centred[i] * reciprocal);
  }
  return offset;
}

}  // namespace nf4
