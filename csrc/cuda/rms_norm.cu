// RMSNorm over rows, forward (with the residual sum in front of it) and backward. One block a row; sums in
// fp32, one rounding at the end. The second pass over a row finds it in L1 or L2.
//
//   forward    sum = x + residual                       where a residual is given; rounded, as it is kept
//              y = sum * r * weight                     r = rsqrt(mean(sum^2) + eps)
//   backward   gx = passed + r * (gy * weight - sum * r^2 * mean(gy * weight * sum))
//
// `passed` is the gradient that reaches the sum past the norm. The weight is frozen and gets none. Outputs
// may lie in the place of inputs: a thread reads and writes the same elements of a row.
#include "vector.cuh"

namespace nf4 {
namespace {

constexpr int kThreads = 256;

template <typename T, int kWidth, bool kResidual>
__global__ void __launch_bounds__(kThreads) forward_kernel(Nf4Rows x, Nf4Rows residual, Nf4Rows sum,
                                                           const T* weight, Nf4Rows y, int size, float eps) {
  const T* x_row = row_of<T>(x, blockIdx.x);
  const T* residual_row = row_of<T>(residual, blockIdx.x);
  T* sum_row = row_of<T>(sum, blockIdx.x);
  T* y_row = row_of<T>(y, blockIdx.x);
  float squares = 0.0f;
  for (int i = threadIdx.x * kWidth; i < size; i += kThreads * kWidth) {
    float values[kWidth];
    load<kWidth>(x_row + i, values);
    if constexpr (kResidual) {
      float added[kWidth];
      load<kWidth>(residual_row + i, added);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) values[j] = to_float(round_to<T>(values[j] + added[j]));
      store<kWidth>(sum_row + i, values);
    }
#pragma unroll
    for (int j = 0; j < kWidth; ++j) squares += values[j] * values[j];
  }
  const float inverse = rsqrtf(block_sum<kThreads>(squares) / size + eps);
  const T* source = kResidual ? sum_row : x_row;
  for (int i = threadIdx.x * kWidth; i < size; i += kThreads * kWidth) {
    float values[kWidth], weights[kWidth];
    load<kWidth>(source + i, values);
    load<kWidth>(weight + i, weights);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) values[j] = values[j] * inverse * weights[j];
    store<kWidth>(y_row + i, values);
  }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(Nf4Rows grad_y, Nf4Rows x, const T* weight, Nf4Rows passed, Nf4Rows grad_x, int size,
                    float eps) {
  const T* grad_y_row = row_of<T>(grad_y, blockIdx.x);
  const T* x_row = row_of<T>(x, blockIdx.x);
  const T* passed_row = row_of<T>(passed, blockIdx.x);
  T* grad_x_row = row_of<T>(grad_x, blockIdx.x);
  float squares = 0.0f, products = 0.0f;
  for (int i = threadIdx.x * kWidth; i < size; i += kThreads * kWidth) {
    float grads[kWidth], values[kWidth], weights[kWidth];
    load<kWidth>(grad_y_row + i, grads);
    load<kWidth>(x_row + i, values);
    load<kWidth>(weight + i, weights);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      squares += values[j] * values[j];
      products += grads[j] * weights[j] * values[j];
    }
  }
  const float inverse = rsqrtf(block_sum<kThreads>(squares) / size + eps);
  const float along = block_sum<kThreads>(products) / size * inverse * inverse;
  for (int i = threadIdx.x * kWidth; i < size; i += kThreads * kWidth) {
    float grads[kWidth], values[kWidth], weights[kWidth], added[kWidth];
    load<kWidth>(grad_y_row + i, grads);
    load<kWidth>(x_row + i, values);
    load<kWidth>(weight + i, weights);
    load<kWidth>(passed_row + i, added);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) added[j] += inverse * (grads[j] * weights[j] - values[j] * along);
    store<kWidth>(grad_x_row + i, added);
  }
}

template <typename T>
Aligned<T> aligned_rows(std::initializer_list<Nf4Rows> all, const void* weight, int64_t size) {
  Aligned<T> aligned;
  aligned.address(weight).elements(size);
  for (const Nf4Rows& rows : all) aligned.address(rows.data).elements(rows.stride);
  return aligned;
}

template <typename T>
cudaError_t forward(const Nf4Rows& x, const Nf4Rows* residual, const Nf4Rows* sum, const void* weight,
                    const Nf4Rows& y, int num_rows, int size, float eps, cudaStream_t stream) {
  constexpr int kWide = nf4::kWide<T>;
  const Nf4Rows added = residual ? *residual : x, kept = residual ? *sum : y;
  const bool wide = aligned_rows<T>({x, added, kept, y}, weight, size).holds;
  auto kernel = residual ? (wide ? forward_kernel<T, kWide, true> : forward_kernel<T, 1, true>)
                         : (wide ? forward_kernel<T, kWide, false> : forward_kernel<T, 1, false>);
  return launch(kernel, dim3(num_rows), kThreads, 0, stream, false, x, added, kept,
                static_cast<const T*>(weight), y, size, eps);
}

template <typename T>
cudaError_t backward(const Nf4Rows& grad_y, const Nf4Rows& x, const void* weight, const Nf4Rows& passed,
                     const Nf4Rows& grad_x, int num_rows, int size, float eps, cudaStream_t stream) {
  const bool wide = aligned_rows<T>({grad_y, x, passed, grad_x}, weight, size).holds;
  auto kernel = wide ? backward_kernel<T, kWide<T>> : backward_kernel<T, 1>;
  return launch(kernel, dim3(num_rows), kThreads, 0, stream, false, grad_y, x, static_cast<const T*>(weight),
                passed, grad_x, size, eps);
}

}  // namespace
}  // namespace nf4

extern "C" int nf4_rms_norm(const Nf4Rows* x, const Nf4Rows* residual, const Nf4Rows* sum, const void* weight,
                            const Nf4Rows* y, int num_rows, int size, float eps, int dtype,
                            cudaStream_t stream) {
  if (num_rows == 0 || size == 0) return cudaSuccess;
  return nf4::with_type(dtype, [&](auto type) {
    return nf4::forward<decltype(type)>(*x, residual, sum, weight, *y, num_rows, size, eps, stream);
  });
}

extern "C" int nf4_rms_norm_backward(const Nf4Rows* grad_y, const Nf4Rows* x, const void* weight,
                                     const Nf4Rows* passed, const Nf4Rows* grad_x, int num_rows, int size,
                                     float eps, int dtype, cudaStream_t stream) {
  if (num_rows == 0 || size == 0) return cudaSuccess;
  return nf4::with_type(dtype, [&](auto type) {
    return nf4::backward<decltype(type)>(*grad_y, *x, weight, *passed, *grad_x, num_rows, size, eps, stream);
  });
}
