// Driver of the searching encoder: groups of 256 blocks, each by itself, because with an offset of zero a
// group's scales depend on nothing outside of it. See search.h.
#include "search.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "float_environment.h"
#include "isa.h"
#include "search_grid.h"
#include "thread_pool.h"

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

// The blocks of a group: whole ones, and perhaps a short one, filled up with zeros elsewhere.
struct Group {
  const void* values;
  uint8_t* codes;
  int64_t whole;
  const void* short_values;
  uint8_t* short_codes;
  int64_t count;  // all together
};

// Encodes a group. Returns its first block with a NaN or an infinity, or -1.
int64_t encode_group(const SearchTables& tables, const Group& group, Dtype dtype, uint8_t* absmax,
                     float* nested_absmax) {
  const Kernels& kernels = chosen_kernels();
  const int64_t count = group.count, whole = group.whole;
  alignas(64) int16_t x[kNestedBlock * kBlock];
  float magnitudes[kNestedBlock], scales[kNestedBlock];
  const int64_t bad = kernels.find_scales(tables, group.values, dtype, whole, x, magnitudes, scales);
  if (bad >= 0) return bad;
  if (kernels.find_scales(tables, group.short_values, dtype, count - whole, x + whole * kBlock,
                          magnitudes + whole, scales + whole) >= 0) {
    return whole;
  }
  Grid grid;
  int32_t errors[kNestedBlock * kTried];
  *nested_absmax = grid.fill(magnitudes, scales, count);
  kernels.measure_blocks(tables, x, grid.inverses, count, kTried, errors);
  // + 1: not 0 times infinity.
  for (int64_t i = 0; i < count * kTried; ++i) grid.errors[i] = float(errors[i]) + 1.0f;
  grid.choose(count, absmax, scales);
  kernels.encode_blocks(tables, group.values, dtype, whole, scales, group.codes);
  kernels.encode_blocks(tables, group.short_values, dtype, count - whole, scales + whole, group.short_codes);
  return -1;
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

int64_t quantize_search(const float* levels, const float* thresholds, const void* values, Dtype dtype,
                        int64_t n, uint8_t* codes, uint8_t* absmax, float* nested_absmax, int threads) {
  const DefaultFloatEnvironment environment;
  const SearchTables tables = search_tables(levels, thresholds);
  const char* const source = static_cast<const char*>(values);
  const int64_t item = dtype_bytes(dtype);
  const int64_t whole = n / kBlock, rest = n % kBlock;
  const int64_t num_blocks = whole + (rest > 0);
  char padded[kBlock * 4] = {};
  memcpy(padded, source + whole * kBlock * item, size_t(rest * item));
  uint8_t padded_codes[kBlockBytes];

  std::atomic<int64_t> bad_block{INT64_MAX};
  parallel_for((num_blocks + kNestedBlock - 1) / kNestedBlock, threads, [&](int64_t group) {
    const int64_t begin = group * kNestedBlock;
    if (bad_block.load(std::memory_order_relaxed) < begin) return;
    const int64_t count = std::min(kNestedBlock, num_blocks - begin);
    const int64_t in_place = std::min(count, whole - begin);
    const Group blocks = {
        source + begin * kBlock * item, codes + begin * kBlockBytes, in_place, padded, padded_codes, count};
    const int64_t bad = encode_group(tables, blocks, dtype, absmax + begin, nested_absmax + group);
    if (bad < 0) return;
    int64_t earliest = bad_block.load(std::memory_order_relaxed);
    while (begin + bad < earliest && !bad_block.compare_exchange_weak(earliest, begin + bad)) {
    }
  });
  if (bad_block == INT64_MAX) {
    memcpy(codes + whole * kBlockBytes, padded_codes, size_t((rest + 1) / 2));
    return -1;
  }
  const int64_t begin = bad_block * kBlock;
  return begin + first_nonfinite(source + begin * item, dtype, std::min(kBlock, n - begin), false, 1);
}

}  // namespace nf4
