// Kernels of the encoder: chunks of a tensor on the device, to codes and scales. See encode.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../cpu/kernels.h"

namespace nf4 {

struct EncodeTables;

// Where the results of a chunk lie in one piece of memory, which leaves the device in one copy.
struct EncodedLayout {
  int64_t num_blocks, num_groups;  // of 64 values; of 256 blocks
  int64_t scales, scales_end;      // searched: uint8 [num_blocks]; otherwise float32 [num_blocks]
  int64_t nested;                  // searched: float32 [num_groups]
  int64_t bad;  // int32 [num_groups]: the group's first block with a NaN or infinity, or -1
  int64_t bytes;

  EncodedLayout(int64_t n, bool searched)
      : num_blocks((n + kBlock - 1) / kBlock),
        num_groups((num_blocks + kNestedBlock - 1) / kNestedBlock),
        scales(num_blocks * kBlockBytes),
        scales_end(scales + num_blocks * (searched ? 1 : 4)),
        nested((scales_end + 15) / 16 * 16),
        bad(nested + (searched ? num_groups * 4 : 0)),
        bytes(bad + num_groups * 4) {}
};

// Encodes whole blocks, starting with one at which a group begins; `values` are 16-byte aligned, and zeros
// from the tensor's end to that of its last block. `results`: as `layout` has it, codes first.
cudaError_t encode_chunk(const EncodeTables* tables, bool searched, bool has_bins, const void* values,
                         Dtype dtype, const EncodedLayout& layout, uint8_t* results, cudaStream_t stream);

}  // namespace nf4
