// Driver of encoding: whole blocks by tasks, the short last block through a block of zeros (whose code 7 is
// also what the missing low nibble of an odd tensor holds).
#include <algorithm>
#include <atomic>
#include <cstring>

#include "float_environment.h"
#include "isa.h"
#include "search.h"
#include "thread_pool.h"

namespace nf4 {
namespace {

constexpr int64_t kTaskBlocks = 1024;  // 128 or 256 KiB of values: enough to outweigh handing out a task

// At most kTaskBlocks blocks. Other levels than NF4's have the same scales, so their codes are written over.
int64_t encode(const SearchTables* tables, const void* values, Dtype dtype, int64_t num_blocks,
               uint8_t* codes, float* absmax) {
  const Kernels& kernels = chosen_kernels();
  const int64_t bad = kernels.quantize_blocks(values, dtype, num_blocks, codes, absmax);
  if (tables == nullptr || bad >= 0) return bad;
  kernels.encode_blocks(*tables, values, dtype, num_blocks, absmax, codes);
  return -1;
}

int64_t quantize_all(const SearchTables* tables, const void* values, Dtype dtype, int64_t n, uint8_t* codes,
                     float* absmax, int threads) {
  const DefaultFloatEnvironment environment;
  const char* const source = static_cast<const char*>(values);
  const int64_t item = dtype_bytes(dtype);
  const int64_t whole = n / kBlock;
  std::atomic<int64_t> bad_block{INT64_MAX};
  parallel_for((whole + kTaskBlocks - 1) / kTaskBlocks, threads, [&](int64_t task) {
    const int64_t begin = task * kTaskBlocks;
    if (bad_block.load(std::memory_order_relaxed) < begin) return;
    const int64_t bad =
        encode(tables, source + begin * kBlock * item, dtype, std::min(kTaskBlocks, whole - begin),
               codes + begin * kBlockBytes, absmax + begin);
    if (bad < 0) return;
    int64_t earliest = bad_block.load(std::memory_order_relaxed);
    while (begin + bad < earliest && !bad_block.compare_exchange_weak(earliest, begin + bad)) {
    }
  });

  const int64_t rest = n - whole * kBlock;
  if (rest > 0) {
    char padded[kBlock * 4] = {};
    memcpy(padded, source + whole * kBlock * item, size_t(rest * item));
    uint8_t packed[kBlockBytes];
    if (encode(tables, padded, dtype, 1, packed, absmax + whole) < 0) {
      memcpy(codes + whole * kBlockBytes, packed, size_t((rest + 1) / 2));
    } else {
      bad_block = std::min(bad_block.load(), whole);
    }
  }
  if (bad_block == INT64_MAX) return -1;
  const int64_t begin = bad_block * kBlock;
  return begin + first_nonfinite(source + begin * item, dtype, std::min(kBlock, n - begin), false, 1);
}

}  // namespace

int64_t quantize_codes(const void* values, Dtype dtype, int64_t n, uint8_t* codes, float* absmax,
                       int threads) {
  return quantize_all(nullptr, values, dtype, n, codes, absmax, threads);
}

int64_t quantize_codes_onto(const float* levels, const float* thresholds, const void* values, Dtype dtype,
                            int64_t n, uint8_t* codes, float* absmax, int threads) {
  const SearchTables tables = search_tables(levels, thresholds);
  return quantize_all(&tables, values, dtype, n, codes, absmax, threads);
}

}  // namespace nf4
