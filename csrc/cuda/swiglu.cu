// SwiGLU over rows that hold gate and up side by side, [gate | up], forward and backward; fp32 inside.
//
//   forward    y = gate * sigmoid(gate) * up
//   backward   gate <- gy * up * s * (1 + gate * (1 - s)),  up <- gy * gate * s,  s = sigmoid(gate)
//
// Backward computes the sigmoid again and leaves the gradients where gate and up were.
#include "vector.cuh"

namespace nf4 {
namespace {

constexpr int kThreads = 256;

template <typename T, int kWidth, bool kBackward>
__global__ void __launch_bounds__(kThreads)
    swiglu_kernel(Nf4Rows gate_up, Nf4Rows y, int64_t num_rows, int size) {
  const int per_row = size / kWidth;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t row = index / per_row;
  if (row >= num_rows) return;
  const int column = static_cast<int>(index - row * per_row) * kWidth;
  T* gate_place = row_of<T>(gate_up, row) + column;
  T* up_place = gate_place + size;
  T* y_place = row_of<T>(y, row) + column;

  float gate[kWidth], up[kWidth], out[kWidth];
  load<kWidth>(gate_place, gate);
  load<kWidth>(up_place, up);
  if constexpr (kBackward) load<kWidth>(y_place, out);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const float sigmoid = 1.0f / (1.0f + __expf(-gate[i]));
    if constexpr (kBackward) {
      const float grad = out[i], swish = gate[i] * sigmoid;
      gate[i] = grad * up[i] * (sigmoid + swish * (1.0f - sigmoid));
      up[i] = grad * swish;
    } else {
      out[i] = gate[i] * sigmoid * up[i];
    }
  }
  if constexpr (kBackward) {
    store<kWidth>(gate_place, gate);
    store<kWidth>(up_place, up);
  } else {
    store<kWidth>(y_place, out);
  }
}

template <typename T>
cudaError_t swiglu(const Nf4Rows& gate_up, const Nf4Rows& y, int64_t num_rows, int size, bool backward,
                   cudaStream_t stream) {
  Aligned<T> aligned;
  aligned.address(gate_up.data).address(y.data);
  const bool wide = aligned.elements(gate_up.stride).elements(y.stride).elements(size).holds;
  const int64_t blocks = (num_rows * (size / (wide ? kWide<T> : 1)) + kThreads - 1) / kThreads;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  constexpr int kWide = nf4::kWide<T>;
  auto kernel = backward ? (wide ? swiglu_kernel<T, kWide, true> : swiglu_kernel<T, 1, true>)
                         : (wide ? swiglu_kernel<T, kWide, false> : swiglu_kernel<T, 1, false>);
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream, false, gate_up, y, num_rows,
                size);
}

}  // namespace
}  // namespace nf4

extern "C" int nf4_swiglu(const Nf4Rows* gate_up, const Nf4Rows* y, int64_t num_rows, int size, int backward,
                          int dtype, cudaStream_t stream) {
  if (num_rows == 0 || size == 0) return cudaSuccess;
  return nf4::with_type(dtype, [&](auto type) {
    return nf4::swiglu<decltype(type)>(*gate_up, *y, num_rows, size, backward != 0, stream);
  });
}
