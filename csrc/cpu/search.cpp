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

// The blocks of a group: whole ones, and perhaps a short one, filled up with zeros elsewhere.
struct Group {
  const void* values;
  uint8_t* codes;
  int64_t whole;
  const void* short_values;
  uint8_t* short_codes;
  int64_t count;  // all together
};

// A group's blocks in fixed point, and what was found for them.
struct Found {
  alignas(64) int16_t x[kNestedBlock * kBlock];
  float absmax[kNestedBlock];
  float wanted[kNestedBlock * kWanted];
};

// All blocks onto a grid, near the wanted scales [count, kNear].
template <int kNear>
void fit(const SearchTables& tables, const Found& found, const float* wanted, int64_t count,
         float nested_absmax, Fitted& fitted) {
  using Entries = Grid<kNear>;
  Entries grid;
  int32_t errors[kNestedBlock * Entries::kTried];
  grid.fill(found.absmax, wanted, count, nested_absmax);
  chosen_kernels().measure_blocks(tables, found.x, grid.inverses, count, Entries::kTried, errors);
  // + 1: not 0 times infinity.
  for (int64_t i = 0; i < count * Entries::kTried; ++i) grid.errors[i] = float(errors[i]) + 1.0f;
  grid.choose(count, fitted.entries, fitted.scales, fitted.errors);
}

// The excess of one block on a grid, near its wanted scales and absmax, as `fit` would leave it.
int32_t least_excess(const SearchTables& tables, const Found& found, int64_t block, float nested_absmax,
                     float plain_error) {
  using Entries = Grid<1>;
  const float absmax = found.absmax[block];
  int32_t least = INT32_MAX;
  for (int near = 0; near <= kWanted && least > 0; ++near) {
    const float wanted = near < kWanted ? found.wanted[block * kWanted + near] : absmax;
    Entries grid;
    grid.fill(&absmax, &wanted, 1, nested_absmax);
    int32_t errors[Entries::kTried];
    chosen_kernels().measure_blocks(tables, found.x + block * kBlock, grid.inverses, 1, Entries::kTried,
                                    errors);
    for (int i = 0; i < Entries::kTried; ++i) {
      const float error = (float(errors[i]) + 1.0f) * grid.weights[i];
      least = std::min(least, excess_of(error, plain_error, absmax));
    }
  }
  return least;
}

// If blocks have too much error on a grid: looks near absmax, too, and then on other grids, for the first one
// on which none has, or else for that with the least excess. Returns nested_absmax.
float shift_grid(const SearchTables& tables, const Found& found, int64_t count, float nested_absmax,
                 Fitted& fitted) {
  int16_t inverses[kNestedBlock];
  int32_t errors[kNestedBlock];
  std::fill(inverses, inverses + count, int16_t(kUnit));
  chosen_kernels().measure_blocks(tables, found.x, inverses, count, 1, errors);
  float plain[kNestedBlock];
  for (int64_t i = 0; i < count; ++i) plain[i] = float(errors[i]) + 1.0f;
  // Blocks that have lost on some grid come first: most grids are given up after a few of them.
  int order[kNestedBlock], losers = 0;
  int32_t least = 0;
  for (int i = 0; i < count; ++i) {
    const int32_t excess = excess_of(fitted.errors[i], plain[i], found.absmax[i]);
    least += excess;
    order[i] = i;
    if (excess > 0) std::swap(order[i], order[losers++]);
  }
  if (least == 0) return nested_absmax;

  float best = 0;
  for (int attempt = 0; attempt < kShifts && least > 0; ++attempt) {
    const float shifted = std::min(nested_absmax * kGridShifts[attempt], 0x1.fffffep127f);
    int32_t sum = 0;
    for (int i = 0, first = 0; i < count && sum < least; ++i) {
      const int32_t excess = least_excess(tables, found, order[i], shifted, plain[order[i]]);
      sum += excess;
      if (excess > 0) std::swap(order[i], order[first++]);
    }
    if (sum >= least) continue;
    least = sum;
    best = shifted;
  }
  if (best == 0) return nested_absmax;
  float wanted[kNestedBlock * (kWanted + 1)];
  for (int64_t i = 0; i < count; ++i) {
    std::copy_n(found.wanted + i * kWanted, kWanted, wanted + i * (kWanted + 1));
    wanted[i * (kWanted + 1) + kWanted] = found.absmax[i];
  }
  fit<kWanted + 1>(tables, found, wanted, count, best, fitted);
  return best;
}

// Encodes a group. Returns its first block with a NaN or an infinity, or -1.
int64_t encode_group(const SearchTables& tables, const Group& group, Dtype dtype, uint8_t* absmax,
                     float* nested_absmax) {
  const Kernels& kernels = chosen_kernels();
  const int64_t count = group.count, whole = group.whole;
  Found found;
  const int64_t bad =
      kernels.find_scales(tables, group.values, dtype, whole, found.x, found.absmax, found.wanted);
  if (bad >= 0) return bad;
  if (kernels.find_scales(tables, group.short_values, dtype, count - whole, found.x + whole * kBlock,
                          found.absmax + whole, found.wanted + whole * kWanted) >= 0) {
    return whole;
  }
  Fitted fitted;
  const float largest = largest_magnitude_of(found.wanted, count, kWanted);
  fit<kWanted>(tables, found, found.wanted, count, largest, fitted);
  *nested_absmax = shift_grid(tables, found, count, largest, fitted);
  memcpy(absmax, fitted.entries, size_t(count));
  const float* const scales = fitted.scales;
  kernels.encode_blocks(tables, group.values, dtype, whole, scales, group.codes);
  kernels.encode_blocks(tables, group.short_values, dtype, count - whole, scales + whole, group.short_codes);
  return -1;
}

}  // namespace

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
