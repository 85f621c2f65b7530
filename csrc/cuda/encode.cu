// A thread encodes a block, a thread block the 256 blocks that share a nested scale. Threads read their 128
// or 256 bytes one after the other, through the first-level cache: next to the search that costs nothing.
#include "encode.cuh"
#include "encode.h"

namespace nf4 {
namespace {

constexpr int kThreads = static_cast<int>(kNestedBlock);

__device__ void copy_tables(const EncodeTables* tables, EncodeTables* shared) {
  const auto* source = reinterpret_cast<const uint32_t*>(tables);
  auto* target = reinterpret_cast<uint32_t*>(shared);
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(EncodeTables) / 4); i += kThreads)
    target[i] = source[i];
}

// The scale is the block's largest magnitude.
__global__ void __launch_bounds__(kThreads)
    encode_absmax(const EncodeTables* tables, const void* values, Dtype dtype, EncodedLayout layout,
                  uint8_t* results) {
  __shared__ EncodeTables shared;
  __shared__ unsigned first_bad;
  copy_tables(tables, &shared);
  if (threadIdx.x == 0) first_bad = UINT32_MAX;
  __syncthreads();
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (block < layout.num_blocks) {
    const void* const source = block_at(values, dtype, block);
    const uint32_t largest = largest_bits(source, dtype);
    if (largest >= kInfinityBits) {
      atomicMin(&first_bad, threadIdx.x);
    } else {
      const float absmax = from_bits(largest);
      reinterpret_cast<float*>(results + layout.scales)[block] = absmax;
      encode_block(shared, source, dtype, limited(divided(1.0f, absmax)),
                   reinterpret_cast<uint4*>(results + block * kBlockBytes));
    }
  }
  __syncthreads();
  if (threadIdx.x == 0)
    reinterpret_cast<int32_t*>(results + layout.bad)[blockIdx.x] = static_cast<int>(first_bad);
}

// Two thread blocks on each SM leave the 128 registers a thread that its values and sums need.
template <bool has_bins>
__global__ void __launch_bounds__(kThreads, 2)
    encode_search(const EncodeTables* tables, const void* values, Dtype dtype, EncodedLayout layout,
                  uint8_t* results) {
  __shared__ EncodeTables shared;
  __shared__ unsigned first_bad, largest_scale;  // the second as bits
  __shared__ int excess[1 + kShifts];            // of the group, on each grid
  copy_tables(tables, &shared);
  if (threadIdx.x <= kShifts) excess[threadIdx.x] = 0;
  if (threadIdx.x == 0) {
    first_bad = UINT32_MAX;
    largest_scale = 0;
  }
  __syncthreads();
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const void* const source = block_at(values, dtype, block);
  bool is_here = block < layout.num_blocks;
  float absmax = 0.0f;
  Wanted wanted = {};
  int x[kBlock];
  if (is_here) {
    const uint32_t largest = largest_bits(source, dtype);
    absmax = from_bits(largest);
    if (largest >= kInfinityBits) {
      atomicMin(&first_bad, threadIdx.x);
      is_here = false;
    }
  }
  if (is_here) {
    load_fixed(source, dtype, absmax, x);
    wanted = best_scales<has_bins>(shared, x, absmax);
    atomicMax(&largest_scale, bits(wanted.scales[0]) & 0x7fffffffu);
  }
  __syncthreads();
  float nested_absmax = 0.0f;
  int entry = 0, least = INT32_MAX;
  // All threads leave together: what they leave by is the group's.
#pragma unroll 1
  for (int attempt = 0; attempt <= kShifts && least > 0; ++attempt) {
    const float shifted = shifted_grid(shared, from_bits(largest_scale), attempt);
    Entry found = {};
    if (is_here) {
      found = best_entry<has_bins>(shared, x, absmax, wanted, attempt > 0, shifted);
      const int own = excess_on_grid(found.error, wanted.plain_error, absmax);
      if (own > 0) atomicAdd(&excess[attempt], own);
    }
    __syncthreads();
    if (excess[attempt] >= least) continue;
    least = excess[attempt];
    nested_absmax = shifted;
    entry = found.index;
  }
  if (threadIdx.x == 0) {
    reinterpret_cast<float*>(results + layout.nested)[blockIdx.x] = nested_absmax;
    reinterpret_cast<int32_t*>(results + layout.bad)[blockIdx.x] = static_cast<int>(first_bad);
  }
  if (!is_here) return;
  results[layout.scales + block] = static_cast<uint8_t>(entry);
  encode_block(shared, source, dtype, factor_of_scale(multiplied(shared.nested_map[entry], nested_absmax)),
               reinterpret_cast<uint4*>(results + block * kBlockBytes));
}

}  // namespace

cudaError_t encode_chunk(const EncodeTables* tables, bool searched, bool has_bins, const void* values,
                         Dtype dtype, const EncodedLayout& layout, uint8_t* results, cudaStream_t stream) {
  if (layout.num_groups == 0) return cudaSuccess;
  const auto kernel = !searched ? encode_absmax : has_bins ? encode_search<true> : encode_search<false>;
  kernel<<<static_cast<unsigned>(layout.num_groups), kThreads, 0, stream>>>(tables, values, dtype, layout,
                                                                            results);
  return cudaGetLastError();
}

}  // namespace nf4
