// Cross entropy of a chunk of logits [rows, vocabulary]: the loss of each row, and its gradient in the
// logits' place.
//
//   loss[r]       = log(sum(exp(logits[r]))) - logits[r, target]
//   logits[r, v] <- scale * (softmax(logits[r])[v] - (v == target))          unless only the loss is asked
//   for
//
// One block a row, two passes: maximum and sum together (a running maximum rescales the sum), then the
// gradient. fp32 inside, so no fp32 copy of the logits exists. A target outside the vocabulary gives NaN.
#include "vector.cuh"

namespace nf4 {
namespace {

constexpr int kThreads = 512;

struct Partial {  // of a softmax: the largest value seen, and sum(exp(value - largest))
  float largest;
  float sum;
};

__device__ inline Partial join(Partial a, Partial b) {
  const float largest = fmaxf(a.largest, b.largest);
  if (largest == -INFINITY) return {largest, 0.0f};
  return {largest, a.sum * __expf(a.largest - largest) + b.sum * __expf(b.largest - largest)};
}

__device__ inline Partial join_lanes(Partial partial) {
  for (int distance = 16; distance; distance /= 2) {
    partial = join(partial, {__shfl_xor_sync(~0u, partial.largest, distance),
                             __shfl_xor_sync(~0u, partial.sum, distance)});
  }
  return partial;
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    cross_entropy_kernel(Nf4Rows logits, const int64_t* targets, float* losses, int size, bool gradient,
                         float scale) {
  __shared__ Partial parts[kThreads / 32];
  T* row = row_of<T>(logits, blockIdx.x);
  const int64_t target = targets[blockIdx.x];
  const bool known = target >= 0 && target < size;
  const float aimed = known ? to_float(row[target]) : NAN;

  Partial partial = {-INFINITY, 0.0f};
  for (int i = threadIdx.x * kWidth; i < size; i += kThreads * kWidth) {
    float values[kWidth];
    load<kWidth>(row + i, values);
    float largest = partial.largest;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) largest = fmaxf(largest, values[j]);
    if (largest == -INFINITY) continue;
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sum += __expf(values[j] - largest);
    partial = {largest, partial.sum * __expf(partial.largest - largest) + sum};
  }
  partial = join_lanes(partial);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = partial;
  __syncthreads();  // from here on the target's logit has been read by every thread
  partial = join_lanes(parts[threadIdx.x % (kThreads / 32)]);  // each part twice in 32 lanes: halved below
  const float sum = partial.sum * (kThreads / 32) / 32;
  if (threadIdx.x == 0) losses[blockIdx.x] = logf(sum) + partial.largest - aimed;
  if (!gradient) return;

  const float inverse = known ? scale / sum : NAN;
  for (int i = threadIdx.x * kWidth; i < size; i += kThreads * kWidth) {
    float values[kWidth];
    load<kWidth>(row + i, values);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      values[j] = __expf(values[j] - partial.largest) * inverse - (i + j == target ? scale : 0.0f);
    }
    store<kWidth>(row + i, values);
  }
}

template <typename T>
cudaError_t run(const Nf4Rows& logits, const int64_t* targets, float* losses, int num_rows, int size,
                bool gradient, float scale, cudaStream_t stream) {
  Aligned<T> aligned;
  const bool wide = aligned.address(logits.data).elements(logits.stride).elements(size).holds;
  auto kernel = wide ? cross_entropy_kernel<T, kWide<T>> : cross_entropy_kernel<T, 1>;
  return launch(kernel, dim3(num_rows), kThreads, 0, stream, false, logits, targets, losses, size, gradient,
                scale);
}

}  // namespace
}  // namespace nf4

extern "C" int nf4_cross_entropy(const Nf4Rows* logits, const int64_t* targets, float* losses, int num_rows,
                                 int size, int gradient, float scale, int dtype, cudaStream_t stream) {
  if (num_rows == 0) return cudaSuccess;
  if (size < 1) return cudaErrorInvalidValue;
  return nf4::with_type(dtype, [&](auto type) {
    return nf4::run<decltype(type)>(*logits, targets, losses, num_rows, size, gradient != 0, scale, stream);
  });
}
