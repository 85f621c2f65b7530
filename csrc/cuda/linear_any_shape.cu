// y = x W^T (+ bias) from packed codes for shapes and alignments that no fast kernel takes: any M, N, K.
//
// A warp owns one row of W and 8 tokens. Lane l takes elements l, l + 32, ... of the row: scales are looked
// up element by element because a block of 64 may begin in one row and end in the next when K % 64 != 0. fp32
// products and sums, one shuffle tree at the end. Serves small or odd layers; it is bound by instructions.
#include "nf4.cuh"

namespace nf4 {
namespace {

constexpr int kThreads = 256;
constexpr int kTokens = 8;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    any_shape_kernel(Nf4Weight weight, const T* x, const T* bias, T* y, int num_tokens, int n, int k) {
  __shared__ float map[256];
  __shared__ float levels[16];
  let_next_start();
  const float own_level = threadIdx.x < 16 ? weight.levels[threadIdx.x] : 0.0f;
  for (int i = threadIdx.x; i < 256; i += kThreads) map[i] = weight.nested_map[i];
  if (threadIdx.x < 16) levels[threadIdx.x] = own_level;
  __syncthreads();
  wait_for_previous();

  const int lane = threadIdx.x % 32;
  const int row = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  const int first_token = blockIdx.y * kTokens;
  if (row >= n) return;
  float sums[kTokens] = {};
  for (int column = lane; column < k; column += 32) {
    const int64_t i = int64_t{row} * k + column;
    const int64_t block = i / kBlock;
    const float scale =
        decode_scale(map[weight.absmax[block]], weight.nested_absmax[block / kNestedBlock], weight.offset);
    const int byte = weight.codes[i / 2];
    const float value = levels[i % 2 ? byte & 15 : byte >> 4] * scale;
#pragma unroll
    for (int m = 0; m < kTokens; ++m) {
      if (first_token + m < num_tokens) {
        sums[m] = fmaf(value, static_cast<float>(x[int64_t{first_token + m} * k + column]), sums[m]);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kTokens; ++m) {
    float sum = sums[m];
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane == m && first_token + m < num_tokens) {
      if (bias) sum += static_cast<float>(bias[row]);
      y[int64_t{first_token + m} * n + row] = round_to<T>(sum);
    }
  }
}

template <typename T>
cudaError_t run(const Nf4Weight& weight, const void* x, const void* bias, void* y, int num_tokens, int n,
                int k, bool overlap, cudaStream_t stream) {
  Device device;
  if (cudaError_t error = current_device(&device)) return error;
  const dim3 grid((n + kThreads / 32 - 1) / (kThreads / 32), (num_tokens + kTokens - 1) / kTokens);
  return launch(any_shape_kernel<T>, grid, kThreads, 0, stream, overlap && device.major >= 9, weight,
                static_cast<const T*>(x), static_cast<const T*>(bias), static_cast<T*>(y), num_tokens, n, k);
}

}  // namespace
}  // namespace nf4

// The contract of nf4_linear_few_rows without its conditions on k and alignment; fp32 activations too.
extern "C" int nf4_linear_any_shape(const Nf4Weight* weight, const void* x, const void* bias, void* y,
                                    int num_tokens, int n, int k, int dtype, int overlap,
                                    cudaStream_t stream) {
  if (num_tokens < 1 || n < 1 || k < 1) return cudaErrorInvalidValue;
  switch (dtype) {
    case NF4_FLOAT32:
      return nf4::run<float>(*weight, x, bias, y, num_tokens, n, k, overlap, stream);
    case NF4_FLOAT16:
      return nf4::run<__half>(*weight, x, bias, y, num_tokens, n, k, overlap, stream);
    case NF4_BFLOAT16:
      return nf4::run<__nv_bfloat16>(*weight, x, bias, y, num_tokens, n, k, overlap, stream);
  }
  return cudaErrorInvalidValue;
}
