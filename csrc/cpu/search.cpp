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
