// What a table of 16 levels becomes for the search; see search.h.
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "search.h"

namespace nf4 {
namespace {

// The level nearest to y, in fixed point.
int nearest(const int* levels, int y) {
  int code = 0;
  while (code < 15 && 2 * y > levels[code] + levels[code + 1]) ++code;
  return code;
}

// Returns whether the bins are of use.
bool fill(FixedLevels& out, const int* levels) {
  for (int pair = 0; pair < kPairs; ++pair) {
    const int low = levels[2 * pair], high = levels[2 * pair + 1];
    out.middles[pair] = int16_t((low + high) / 2);
    out.halves[pair] = int16_t((high - low) / 2);
    out.borders[pair] = int16_t(pair + 1 < kPairs ? (high + levels[2 * pair + 2]) / 2 : INT16_MAX);
  }
  bool has_bins = true;
  for (int bin = -kBins / 2; bin < kBins / 2; ++bin) {
    const int begin = bin * (1 << kBinShift);
    const int first = nearest(levels, begin), last = nearest(levels, begin + (1 << kBinShift) - 1);
    has_bins &= last - first <= 1;
    out.bin_middles[bin & (kBins - 1)] = int16_t((levels[first] + levels[last]) / 2);
    out.bin_halves[bin & (kBins - 1)] = int16_t((levels[last] - levels[first]) / 2);
  }
  return has_bins;
}

// The same in the coarse fixed point.
bool fill(CoarseLevels& out, const int* levels) {
  for (int i = 0; i < 16; ++i) out.levels[i] = int8_t(levels[i]);
  for (int y = -128; y < 128; ++y) out.distances[y & 255] = uint8_t(std::abs(y - levels[nearest(levels, y)]));
  bool has_bins = true;
  for (int bin = -kBins / 2; bin < kBins / 2; ++bin) {
    const int begin = bin * (1 << kCoarseBinShift);
    const int first = nearest(levels, begin), last = nearest(levels, begin + (1 << kCoarseBinShift) - 1);
    has_bins &= last - first <= 1;
    out.bin_lows[bin & (kBins - 1)] = int8_t(levels[first]);
    out.bin_highs[bin & (kBins - 1)] = int8_t(levels[last]);
  }
  return has_bins;
}

// Both signs. `unit`: of the fixed point; levels are multiples of `step`.
template <typename Levels>
bool fill_both(Levels& plus, Levels& minus, const float* levels, int unit, int step) {
  int fixed[16], negated[16];
  for (int i = 0; i < 16; ++i) fixed[i] = step * int(std::nearbyint(double(levels[i]) * (unit / step)));
  for (int i = 0; i < 16; ++i) negated[i] = -fixed[15 - i];
  const bool has_bins = fill(plus, fixed);
  return fill(minus, negated) && has_bins;
}

}  // namespace

SearchTables search_tables(const float* levels, const float* thresholds) {
  SearchTables tables = {};
  memcpy(tables.levels, levels, sizeof tables.levels);
  memcpy(tables.thresholds, thresholds, 15 * sizeof(float));
  tables.thresholds[15] = INFINITY;
  for (int i = 0; i < kMultipliers; ++i) {
    tables.inverses[i] = int16_t(std::nearbyint(kCoarseUnit / double(nominal_multiplier(i))));
    tables.multipliers[i] = float(kCoarseUnit) / float(tables.inverses[i]);
    tables.squares[i] = tables.multipliers[i] * tables.multipliers[i];
  }
  const bool fine = fill_both(tables.plus, tables.minus, levels, kUnit, 2);  // even: whole middles and halves
  const bool coarse = fill_both(tables.coarse_plus, tables.coarse_minus, levels, kCoarseUnit, 1);
  tables.has_bins = fine && coarse;
  return tables;
}

}  // namespace nf4
