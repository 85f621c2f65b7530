// Kernels of -O2 and -O3; see feedback.cuh and search_weighted.cuh.
#include "feedback.cuh"
#include "feedback.h"
#include "search_weighted.cuh"

namespace nf4 {
namespace {

constexpr int kThreads = 256;

// The threads of a row: neighbours in a warp.
struct Group {
  static constexpr int kSize = 8;
  __device__ int lane() const { return threadIdx.x % kSize; }
  __device__ float of(float value, int lane) const { return __shfl_sync(mask(), value, lane, kSize); }
  __device__ void meet() const { __syncwarp(mask()); }
  __device__ unsigned mask() const { return 0xffu << (threadIdx.x % 32 / kSize * kSize); }
};

constexpr int kRows = kThreads / Group::kSize;  // of a thread block

__device__ int64_t row_of_thread() {
  return static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / Group::kSize;
}

constexpr int kSearchThreads = static_cast<int>(kNestedBlock);

__device__ void copy_tables(const FeedbackTables* tables, FeedbackTables* shared, int threads) {
  const auto* source = reinterpret_cast<const uint32_t*>(tables);
  auto* target = reinterpret_cast<uint32_t*>(shared);
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(FeedbackTables) / 4); i += threads)
    target[i] = source[i];
}

struct CarryMemory {
  FeedbackTables tables;
  float factor[kCarried * kCarried];
};

__global__ void __launch_bounds__(kThreads) carry(const FeedbackTables* tables, CarryArguments a) {
  extern __shared__ float4 memory[];
  CarryMemory& shared = *reinterpret_cast<CarryMemory*>(memory);
  copy_tables(tables, &shared.tables, kThreads);
  for (int at = threadIdx.x; at < a.width * kCarried; at += kThreads) {
    const int i = at / kCarried, j = at % kCarried;
    shared.factor[at] = j >= i && j < a.width ? a.factor[i * a.factor_stride + j] : 0.0f;
  }
  __syncthreads();
  const int64_t row = row_of_thread();
  if (row < a.n) carry_row(Group(), shared.tables, a, shared.factor, row);
}

__global__ void __launch_bounds__(kThreads) descend(const FeedbackTables* tables, DescendArguments a) {
  __shared__ FeedbackTables shared;
  __shared__ float local[kBlock * kBlock];
  copy_tables(tables, &shared, kThreads);
  for (int at = threadIdx.x; at < a.width * kBlock; at += kThreads) {
    const int i = at / kBlock, j = at % kBlock;
    local[at] = j < a.width ? a.moment[i * a.moment_stride + j] : 0.0f;
  }
  __syncthreads();
  const int64_t row = row_of_thread();
  if (row < a.n) descend_row(Group(), shared, a, local, row);
}

// A thread block for the 256 blocks that share a nested scale. One on each SM leaves a thread the registers
// for its values and their weights.
template <bool has_bins>
__global__ void __launch_bounds__(kSearchThreads, 1)
    search(const FeedbackTables* tables, SearchArguments a, int64_t num_blocks) {
  __shared__ FeedbackTables shared;
  __shared__ unsigned largest_scale;  // as bits
  copy_tables(tables, &shared, kSearchThreads);
  if (threadIdx.x == 0) largest_scale = 0;
  __syncthreads();
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kSearchThreads + threadIdx.x;
  float absmax = 0.0f, scale = 0.0f, weights[kBlock];
  int x[kBlock];
  if (block < num_blocks) {
    const void* const source = block_at(a.values, Dtype::float32, block);
    absmax = from_bits(largest_bits(source, Dtype::float32));
    load_fixed(source, Dtype::float32, absmax, x);
    load_weights(a, block, weights);
    scale = best_weighted_scale<has_bins>(shared, x, weights, absmax);
    atomicMax(&largest_scale, bits(scale) & 0x7fffffffu);
  }
  __syncthreads();
  const float nested_absmax = from_bits(largest_scale);
  if (threadIdx.x == 0) a.nested_absmax[blockIdx.x] = nested_absmax;
  if (block >= num_blocks) return;
  a.absmax[block] = static_cast<uint8_t>(
      best_weighted_entry<has_bins>(shared.encode, x, weights, absmax, nested_absmax, scale));
}

unsigned thread_blocks(int64_t n, int threads) { return static_cast<unsigned>((n + threads - 1) / threads); }

}  // namespace

cudaError_t search_weighted(const FeedbackTables* tables, bool has_bins, const SearchArguments& arguments,
                            cudaStream_t stream) {
  const int64_t num_blocks = (arguments.n + kBlock - 1) / kBlock;
  if (num_blocks == 0) return cudaSuccess;
  const auto kernel = has_bins ? search<true> : search<false>;
  kernel<<<thread_blocks(num_blocks, kSearchThreads), kSearchThreads, 0, stream>>>(tables, arguments,
                                                                                   num_blocks);
  return cudaGetLastError();
}

cudaError_t carry_errors(const FeedbackTables* tables, const CarryArguments& arguments, cudaStream_t stream) {
  if (arguments.n == 0) return cudaSuccess;
  const cudaError_t code =
      cudaFuncSetAttribute(carry, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(CarryMemory));
  if (code != cudaSuccess) return code;
  carry<<<thread_blocks(arguments.n, kRows), kThreads, sizeof(CarryMemory), stream>>>(tables, arguments);
  return cudaGetLastError();
}

cudaError_t descend_block(const FeedbackTables* tables, const DescendArguments& arguments,
                          cudaStream_t stream) {
  if (arguments.n == 0) return cudaSuccess;
  descend<<<thread_blocks(arguments.n, kRows), kThreads, 0, stream>>>(tables, arguments);
  return cudaGetLastError();
}

}  // namespace nf4
