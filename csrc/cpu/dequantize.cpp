// Driver of decoding: cuts [start, stop) into tasks of whole blocks, and decodes the blocks that are cut by
// an end of the range, or by the end of the tensor, through a block-sized buffer.
#include <algorithm>
#include <cstring>

#include "float_environment.h"
#include "isa.h"
#include "kernels.h"
#include "thread_pool.h"

namespace nf4 {
namespace {

constexpr int64_t kTaskBlocks = 1024;  // 32 KiB of codes: enough to outweigh handing out a task

// Elements [begin, end) of one block, which may be the tensor's last and short.
void decode_part(const Kernels& kernels, const Packed& packed, const Scales& scales, int64_t block,
                 int64_t begin, int64_t end, char* out, Dtype out_dtype) {
  uint8_t codes[kBlockBytes] = {};
  memcpy(codes, packed.codes + block * kBlockBytes, size_t((end + 1) / 2));
  float scale;
  scales.decode(block, 1, &scale);
  alignas(64) char values[kBlock * 4];
  kernels.dequantize_blocks(codes, &scale, packed.quant_map, 1, values, out_dtype);
  const int64_t item = dtype_bytes(out_dtype);
  memcpy(out, values + begin * item, size_t((end - begin) * item));
}

}  // namespace

void dequantize(const Packed& packed, int64_t start, int64_t stop, void* out, Dtype out_dtype, int threads) {
  const DefaultFloatEnvironment environment;
  if (start >= stop) return;
  const Kernels& kernels = chosen_kernels();
  const Scales all_scales(packed, (stop - start) / kBlock);
  const int64_t item = dtype_bytes(out_dtype);
  char* const base = static_cast<char*>(out) - start * item;  // where element 0 would be

  const int64_t first_whole = (start + kBlock - 1) / kBlock;
  const int64_t last_whole = stop / kBlock;
  if (start % kBlock != 0) {
    const int64_t block = start / kBlock;
    decode_part(kernels, packed, all_scales, block, start % kBlock, std::min(kBlock, stop - block * kBlock),
                base + start * item, out_dtype);
  }
  if (stop % kBlock != 0 && last_whole >= first_whole) {
    decode_part(kernels, packed, all_scales, last_whole, 0, stop % kBlock, base + last_whole * kBlock * item,
                out_dtype);
  }
  if (last_whole <= first_whole) return;

  const int64_t num_tasks = (last_whole - first_whole + kTaskBlocks - 1) / kTaskBlocks;
  parallel_for(num_tasks, threads, [&](int64_t task) {
    const int64_t end = std::min(last_whole, first_whole + (task + 1) * kTaskBlocks);
    float scales[kNestedBlock];
    for (int64_t block = first_whole + task * kTaskBlocks; block < end; block += kNestedBlock) {
      const int64_t count = std::min(kNestedBlock, end - block);
      all_scales.decode(block, count, scales);
      kernels.dequantize_blocks(packed.codes + block * kBlockBytes, scales, packed.quant_map, count,
                                base + block * kBlock * item, out_dtype);
    }
  });
}

}  // namespace nf4
