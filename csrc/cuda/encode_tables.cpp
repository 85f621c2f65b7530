// The tables of the encoder's kernels, from those of the CPU's search.
#include <cmath>
#include <cstring>

#include "../cpu/codebook.h"
#include "encode.cuh"

namespace nf4 {
namespace {

uint32_t packed_bin(int middle, int half) {
  return static_cast<uint32_t>(static_cast<uint16_t>(middle)) << 16 | static_cast<uint16_t>(-half);
}

}  // namespace

EncodeTables encode_tables(const SearchTables& tables) {
  EncodeTables out = {};
  for (int sign = 0; sign < 2; ++sign) {
    const FixedLevels& levels = sign ? tables.minus : tables.plus;
    const CoarseLevels& coarse = sign ? tables.coarse_minus : tables.coarse_plus;
    for (int bin = 0; bin < kBins; ++bin) {
      const int low = coarse.bin_lows[bin], high = coarse.bin_highs[bin];
      out.bins[sign][bin] = packed_bin(levels.bin_middles[bin], levels.bin_halves[bin]);
      out.coarse_bins[sign][bin] = packed_bin(low + high, high - low);
    }
    memcpy(out.coarse_distances[sign], coarse.distances, sizeof coarse.distances);
    for (int pair = 0; pair < kPairs; ++pair) {
      out.pairs[sign][0][pair] = levels.borders[pair];
      out.pairs[sign][1][pair] = levels.middles[pair];
      out.pairs[sign][2][pair] = -levels.halves[pair];
    }
  }
  memcpy(out.thresholds, tables.thresholds, sizeof out.thresholds);
  for (int i = 0; i < 255; ++i) out.midpoints[i] = (kNestedMap[i] + kNestedMap[i + 1]) / 2;
  out.midpoints[255] = INFINITY;
  memcpy(out.nested_map, kNestedMap, sizeof out.nested_map);
  for (int i = 0; i < kMultipliers; ++i) {
    out.multipliers[i] = tables.multipliers[i];
    out.squares[i] = tables.squares[i];
    out.inverses[i] = tables.inverses[i];
  }
  out.grid_shifts[0] = 1;
  for (int i = 0; i < kShifts; ++i) out.grid_shifts[1 + i] = kGridShifts[i];
  return out;
}

}  // namespace nf4
