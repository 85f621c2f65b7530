// Rows copied between matrices of different strides, 16 bytes a thread.
#include "vector.cuh"

namespace nf4 {
namespace {

constexpr int kThreads = 256;

template <typename Word>
__global__ void __launch_bounds__(kThreads)
    copy_kernel(const Word* source, int64_t source_stride, Word* target, int64_t target_stride,
                int64_t num_rows, int words) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t row = index / words;
  if (row >= num_rows) return;
  const int64_t column = index - row * words;
  target[row * target_stride + column] = source[row * source_stride + column];
}

template <typename Word>
cudaError_t copy(const Nf4Rows& source, const Nf4Rows& target, int64_t num_rows, int64_t row_bytes,
                 int element_bytes, cudaStream_t stream) {
  const int64_t words = row_bytes / static_cast<int64_t>(sizeof(Word));
  const int64_t blocks = (num_rows * words + kThreads - 1) / kThreads;
  if (blocks > INT32_MAX || words > INT32_MAX) return cudaErrorInvalidValue;
  const auto stride = [&](const Nf4Rows& rows) {
    return rows.stride * element_bytes / static_cast<int64_t>(sizeof(Word));
  };
  return launch(copy_kernel<Word>, dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream, false,
                static_cast<const Word*>(source.data), stride(source), static_cast<Word*>(target.data),
                stride(target), num_rows, static_cast<int>(words));
}

}  // namespace
}  // namespace nf4

extern "C" int nf4_copy_rows(const Nf4Rows* source, const Nf4Rows* target, int64_t num_rows, int64_t size,
                             int dtype, cudaStream_t stream) {
  if (num_rows == 0 || size == 0) return cudaSuccess;
  return nf4::with_type(dtype, [&](auto type) {
    using T = decltype(type);
    nf4::Aligned<T> aligned;
    aligned.address(source->data).address(target->data).elements(size);
    const bool wide = aligned.elements(source->stride).elements(target->stride).holds;
    const int64_t row_bytes = size * static_cast<int64_t>(sizeof(T));
    return wide ? nf4::copy<uint4>(*source, *target, num_rows, row_bytes, sizeof(T), stream)
                : nf4::copy<T>(*source, *target, num_rows, row_bytes, sizeof(T), stream);
  });
}
