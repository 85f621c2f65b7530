// The searching encoder. A block's scale is its largest magnitude `a` times a multiplier, about 0.70, 0.75
// ... 1.30 or one of these with a minus, then snapped to the 8-bit grid of its group of 256 blocks:
//
//   find_scales     the multipliers with the least and the second least error, coarsely measured
//   measure_blocks  errors for the three entries of the grid next to either scale; the least is taken
//   encode_blocks   codes for what the entry decodes to
//
// Blocks share a grid, and where it is coarse for one of them, that one may lose more than with a scale of
// `a`. Then the whole grid is shifted: search.cpp.
//
// Errors are computed in integers, so that neither the order of sums nor the width of vectors can show. A
// scale s stands for its inverse k = rint(unit a / |s|) and its sign, a value v for x = rint(32767 v / a):
//
//   y = (x k + 2^14) >> 15, with the sign of s
//   error = sum over the block of (y - nearest level)^2        times (s / a)^2, to compare scales
//
// The unit is kUnit, with y in 16 bits; or kCoarseUnit, with y in 8, for multipliers of kCoarseUnit / k.
//
// nf4format/reference.py has the same in plain numpy.
#pragma once

#include "kernels.h"

namespace nf4 {

constexpr int kUnit = 11 * 512;  // 1.0 in fixed point
constexpr int kCoarseUnit = 89;  // the largest for which y stays below 128
constexpr int kLargestInverse = 16 * 512 - 1;
constexpr int kMultipliers = 13;  // magnitudes
constexpr int kWanted = 2;        // scales of a block that the grid is searched near
constexpr int kPairs = 8;         // of neighbouring levels
constexpr int kBins = 32;         // of 512 each: all that y may be
constexpr int kBinShift = 9;
constexpr int kCoarseBinShift = 3;
constexpr float kMagic = 0x1.8p23f;  // added to a small number, it leaves the nearest integer in the low bits

// Levels in fixed point, for one sign of the scale: for minus they are negated instead of y. Levels are even
// numbers. Taken in pairs, within a pair's range the distance to the nearer of the two is
// | |y - middle| - half |.
struct FixedLevels {
  // Pair p + 1 begins above borders[p]; the last is larger than any y.
  alignas(16) int16_t borders[kPairs];
  alignas(16) int16_t middles[kPairs];
  alignas(16) int16_t halves[kPairs];
  // By bin, y >> kBinShift modulo kBins: of the two levels nearest to every y in it. Only if has_bins.
  alignas(64) int16_t bin_middles[kBins];
  alignas(64) int16_t bin_halves[kBins];
};

// Levels in the coarse fixed point, for one sign of the scale.
struct CoarseLevels {
  alignas(64) uint8_t distances[256];  // of y modulo 256 from the nearest level
  alignas(16) int8_t levels[16];
  // By bin, y >> kCoarseBinShift modulo kBins: two levels, one of which is nearest to every y in it. Only if
  // has_bins.
  alignas(16) int8_t bin_lows[kBins];
  alignas(16) int8_t bin_highs[kBins];
};

// What a table of levels becomes for the search.
struct SearchTables {
  // Both ascending. A value's code is the number of thresholds below it.
  alignas(64) float levels[16];
  alignas(64) float thresholds[16];  // and one that nothing exceeds

  // Of the multipliers, then zeros; their inverses in the coarse fixed point.
  alignas(64) int16_t inverses[16];
  alignas(64) float multipliers[16];
  alignas(64) float squares[16];

  FixedLevels plus, minus;
  CoarseLevels coarse_plus, coarse_minus;
  bool has_bins;  // no bin has more than two levels that are nearest to a y in it
};

// What nested_absmax is multiplied by to shift the grid: by a step or so of its coarse parts; and so far that
// what lies in the coarse part of a decade comes into the fine part of the one below. First not at all,
// because then more scales are tried.
constexpr int kShifts = 17;
constexpr float kGridShifts[kShifts] = {1,
                                        1 + 1 / 64.f,
                                        1 + 2 / 64.f,
                                        1 + 3 / 64.f,
                                        1 + 4 / 64.f,
                                        1 + 5 / 64.f,
                                        1 + 6 / 64.f,
                                        1 + 7 / 64.f,
                                        1 + 8 / 64.f,
                                        2.5f,
                                        2.75f,
                                        3.f,
                                        3.375f,
                                        3.75f,
                                        4.125f,
                                        4.5f,
                                        5.f};
// What shifting is to lessen: a block's error, divided by its error with a scale of `a`, less kMostExcess,
// from 0 to 1, in units of 1 / kExcessUnits, squared; and the sum of these over the group.
constexpr float kMostExcess = 1.03f;
constexpr float kExcessUnits = 1024.0f;

// 16 levels, ascending, from at most -0.5 to at least 0.5 and within [-1, 1], and the 15 thresholds. The
// limits keep a block's error below 2^31.
SearchTables search_tables(const float* levels, const float* thresholds);

// Distance of y from the nearest level, one at a time; `has_bins` as in the tables.
template <bool has_bins>
static inline int32_t distance_from_level(const FixedLevels& levels, int32_t y) {
  int32_t middle = levels.middles[0], half = levels.halves[0];
  if (has_bins) {
    const int bin = (y >> kBinShift) & (kBins - 1);
    middle = levels.bin_middles[bin];
    half = levels.bin_halves[bin];
  } else {
    for (int pair = 1; pair < kPairs; ++pair) {
      const bool above = y > levels.borders[pair - 1];
      middle = above ? levels.middles[pair] : middle;
      half = above ? levels.halves[pair] : half;
    }
  }
  return (y > middle ? y - middle : middle - y) - half;
}

// The factors that all kernels share, to the bit.
static inline float limited_inverse(float numerator, float value) {
  const float inverse = numerator / value;  // infinite where the value is 0 or subnormal
  const float largest = 0x1.fffffep127f;
  return inverse < largest ? (inverse > -largest ? inverse : -largest) : largest;
}

// What values are multiplied by before codes are looked up; a scale of zero gives every value the code of 0.
static inline float factor_of(float scale) { return scale == 0.0f ? 0.0f : limited_inverse(1.0f, scale); }

// 0.70, 0.75 ... 1.30
static inline float nominal_multiplier(int index) { return float(14 + index) / 20.0f; }

// absmax times the multiplier, held to finite values.
static inline float scale_of(float multiplier, bool minus, float absmax) {
  const float scale = absmax * multiplier;
  const float largest = 0x1.fffffep127f;
  const float magnitude = scale < largest ? scale : largest;
  return minus ? -magnitude : magnitude;
}

}  // namespace nf4
