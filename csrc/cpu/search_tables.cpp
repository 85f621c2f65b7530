// What a table of 16 levels becomes for the search; see search.h.
#include <cmath>
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

}  // namespace

SearchTables search_tables(const float* levels, const float* thresholds) {
  SearchTables tables = {};
  memcpy(tables.levels, levels, sizeof tables.levels);
  memcpy(tables.thresholds, thresholds, 15 * sizeof(float));
  tables.thresholds[15] = INFINITY;
  for (int i = 0; i < kMultipliers; ++i) {
    tables.inverses[i] = int16_t(std::nearbyint(kUnit / double(multiplier(i))));
    tables.squares[i] = multiplier(i) * multiplier(i);
  }
  int fixed[16], negated[16];  // even, so that middles and halves are whole
  for (int i = 0; i < 16; ++i) fixed[i] = 2 * int(std::nearbyint(double(levels[i]) * (kUnit / 2)));
  for (int i = 0; i < 16; ++i) negated[i] = -fixed[15 - i];
  const bool plus = fill(tables.plus, fixed), minus = fill(tables.minus, negated);
  tables.has_bins = plus && minus;
  return tables;
}

}  // namespace nf4
