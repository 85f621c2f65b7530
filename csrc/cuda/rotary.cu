// Rotary position embedding of heads that lie side by side in a row; pairs are (d, d + D/2). In place where x
// and y are the same. The backward pass is the rotation by the negative angles.
//
//   y[d]       = x[d] * cos[d] - x[d + D/2] * sin[d]
//   y[d + D/2] = x[d + D/2] * cos[d] + x[d] * sin[d]
//
// cos and sin are rows of D/2 values, `table_stride` apart; row r of x takes row r % table_rows of them.
#include "vector.cuh"

namespace nf4 {
namespace {

constexpr int kThreads = 256;

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    rotary_kernel(Nf4Rows x, Nf4Rows y, int64_t num_rows, int num_heads, int half, const T* cosines,
                  const T* sines, int64_t table_rows, int64_t table_stride, float sign) {
  const int per_head = half / kWidth, per_row = num_heads * per_head;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t row = index / per_row;
  if (row >= num_rows) return;
  const int within = static_cast<int>(index - row * per_row);
  const int head = within / per_head, pair = (within - head * per_head) * kWidth;
  const int64_t angle = row % table_rows * table_stride + pair;
  const T* source = row_of<T>(x, row) + int64_t{head} * 2 * half + pair;
  T* target = row_of<T>(y, row) + int64_t{head} * 2 * half + pair;

  float first[kWidth], second[kWidth], cosine[kWidth], sine[kWidth];
  load<kWidth>(source, first);
  load<kWidth>(source + half, second);
  load<kWidth>(cosines + angle, cosine);
  load<kWidth>(sines + angle, sine);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const float a = first[i], b = second[i], s = sine[i] * sign;
    first[i] = a * cosine[i] - b * s;
    second[i] = b * cosine[i] + a * s;
  }
  store<kWidth>(target, first);
  store<kWidth>(target + half, second);
}

template <typename T>
cudaError_t rotate(const Nf4Rows& x, const Nf4Rows& y, int64_t num_rows, int num_heads, int half,
                   const void* cosines, const void* sines, int64_t table_rows, int64_t table_stride,
                   bool backward, cudaStream_t stream) {
  Aligned<T> aligned;
  aligned.address(x.data).address(y.data).address(cosines).address(sines);
  const bool wide = aligned.elements(x.stride).elements(y.stride).elements(table_stride).elements(half).holds;
  const int64_t threads = num_rows * num_heads * (half / (wide ? kWide<T> : 1));
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  auto kernel = wide ? rotary_kernel<T, kWide<T>> : rotary_kernel<T, 1>;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream, false, x, y, num_rows,
                num_heads, half, static_cast<const T*>(cosines), static_cast<const T*>(sines), table_rows,
                table_stride, backward ? -1.0f : 1.0f);
}

}  // namespace
}  // namespace nf4

extern "C" int nf4_rotary(const Nf4Rows* x, const Nf4Rows* y, int64_t num_rows, int num_heads, int head_size,
                          const void* cosines, const void* sines, int64_t table_rows, int64_t table_stride,
                          int backward, int dtype, cudaStream_t stream) {
  if (num_rows == 0 || num_heads == 0) return cudaSuccess;
  if (head_size < 2 || head_size % 2 || table_rows < 1) return cudaErrorInvalidValue;
  return nf4::with_type(dtype, [&](auto type) {
    return nf4::rotate<decltype(type)>(*x, *y, num_rows, num_heads, head_size / 2, cosines, sines, table_rows,
                                       table_stride, backward != 0, stream);
  });
}
