// csrc/cuda/encode.cuh on the CPU: a loop over threads in place of the kernels of csrc/cuda/encode.cu.
#include <cstring>
#include <vector>

#include "../../csrc/cuda/encode.cuh"

using namespace nf4;

namespace {

template <bool has_bins>
void search_group(const EncodeTables& tables, const void* values, Dtype dtype, int64_t begin, int64_t count,
                  uint8_t* codes, uint8_t* entries, float* nested) {
  std::vector<int> x(count * kBlock);
  std::vector<float> absmax(count);
  std::vector<Wanted> wanted(count);
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const void* block = block_at(values, dtype, begin + i);
    absmax[i] = from_bits(largest_bits(block, dtype));
    load_fixed(block, dtype, absmax[i], &x[i * kBlock]);
    wanted[i] = best_scales<has_bins>(tables, &x[i * kBlock], absmax[i]);
    const uint32_t magnitude = bits(wanted[i].scales[0]) & 0x7fffffffu;
    if (magnitude > largest) largest = magnitude;
  }
  int least = INT32_MAX;
  for (int attempt = 0; attempt <= kShifts && least > 0; ++attempt) {
    const float shifted = shifted_grid(tables, from_bits(largest), attempt);
    std::vector<uint8_t> found(count);
    int excess = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Entry entry =
          best_entry<has_bins>(tables, &x[i * kBlock], absmax[i], wanted[i], attempt > 0, shifted);
      found[i] = uint8_t(entry.index);
      excess += excess_on_grid(entry.error, wanted[i].plain_error, absmax[i]);
    }
    if (excess >= least) continue;
    least = excess;
    *nested = shifted;
    memcpy(entries, found.data(), found.size());
  }
  for (int64_t i = 0; i < count; ++i) {
    uint4 words[2];
    const float factor = factor_of_scale(multiplied(tables.nested_map[entries[i]], *nested));
    encode_block(tables, block_at(values, dtype, begin + i), dtype, factor, words);
    memcpy(codes + i * kBlockBytes, words, sizeof words);
  }
}

}  // namespace

// Whole blocks of finite values. `nested`: null for scales that are the largest magnitudes, float32 then.
extern "C" void encode_on_host(const float* levels, const float* thresholds, const void* values, int dtype,
                               int64_t num_blocks, uint8_t* codes, void* scales, float* nested) {
  const SearchTables search = search_tables(levels, thresholds);
  const EncodeTables tables = encode_tables(search);
  const Dtype type = Dtype(dtype);
  for (int64_t begin = 0; nested != nullptr && begin < num_blocks; begin += kNestedBlock) {
    const int64_t count = num_blocks - begin < kNestedBlock ? num_blocks - begin : kNestedBlock;
    const auto encode = search.has_bins ? search_group<true> : search_group<false>;
    encode(tables, values, type, begin, count, codes + begin * kBlockBytes,
           static_cast<uint8_t*>(scales) + begin, nested + begin / kNestedBlock);
  }
  for (int64_t block = 0; nested == nullptr && block < num_blocks; ++block) {
    const void* source = block_at(values, type, block);
    const float absmax = from_bits(largest_bits(source, type));
    static_cast<float*>(scales)[block] = absmax;
    uint4 words[2];
    encode_block(tables, source, type, limited(divided(1.0f, absmax)), words);
    memcpy(codes + block * kBlockBytes, words, sizeof words);
  }
}

// Whether the search of these levels looks up bins.
extern "C" bool has_bins(const float* levels, const float* thresholds) {
  return search_tables(levels, thresholds).has_bins;
}
