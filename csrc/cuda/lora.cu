// The thin matrices of LoRA adapters beside the decoded weights of layers that share an input.
//
// Weights W_i [n_i, k] lie below each other, A_i [r_i, k] below them, and B_i [n_i, r_i] at their side, each
// in columns of its own, in one matrix of n = sum(n_i) + r rows and k + r columns, r >= sum(r_i):
//
//   | W_1   s_1 B_1  0     0 |      [x | x A^T] times the transpose of the upper part gives every output,
//   | W_2   0     s_2 B_2  0 |      [gy | gy B] times the left part the gradient of x.
//   | A_1                    |
//   | A_2    (not written)   |
//   | 0                      |
//
// pack writes everything but W from fp32 masters, rounded once. unpack takes gradients of the same two
// places, [n, r] and [r, k], to fp32 gradients of the masters.
#include "vector.cuh"

namespace nf4 {
namespace {

constexpr int kThreads = 256;

struct Adapters {
  Nf4Adapter all[NF4_MOST_ADAPTERS];
  int count;
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(Adapters adapters, T* matrix, int64_t stride, int n, int k, int r) {
  int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index < int64_t{n} * r) {
    const int row = static_cast<int>(index / r), column = static_cast<int>(index % r);
    float value = 0.0f;
    for (int i = 0; i < adapters.count; ++i) {
      const Nf4Adapter& a = adapters.all[i];
      const int own_row = row - a.first_row, own_column = column - a.first_rank;
      if (own_row >= 0 && own_row < a.rows && own_column >= 0 && own_column < a.rank)
        value = a.scaling * a.b[int64_t{own_row} * a.rank + own_column];
    }
    matrix[row * stride + k + column] = round_to<T>(value);
    return;
  }
  index -= int64_t{n} * r;
  if (index >= int64_t{r} * k) return;
  const int row = static_cast<int>(index / k), column = static_cast<int>(index % k);
  float value = 0.0f;
  for (int i = 0; i < adapters.count; ++i) {
    const Nf4Adapter& a = adapters.all[i];
    const int own_row = row - a.first_rank;
    if (own_row >= 0 && own_row < a.rank) value = a.a[int64_t{own_row} * k + column];
  }
  matrix[(n + row) * stride + column] = round_to<T>(value);
}

// grad_b is [r, n], the transpose of the place of B; an adapter's fp32 gradients are written or added to.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    unpack_kernel(Adapters adapters, const T* grad_a, const T* grad_b, int n, int k, bool add) {
  const Nf4Adapter& a = adapters.all[blockIdx.y];
  const int64_t size_a = grad_a ? int64_t{a.rank} * k : 0, size_b = grad_b ? int64_t{a.rows} * a.rank : 0;
  int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index < size_a) {
    const float value = to_float(grad_a[a.first_rank * int64_t{k} + index]);
    a.grad_a[index] = add ? a.grad_a[index] + value : value;
    return;
  }
  index -= size_a;
  if (index >= size_b) return;
  const int64_t row = index / a.rank, column = index % a.rank;
  const float value = a.scaling * to_float(grad_b[(a.first_rank + column) * n + a.first_row + row]);
  a.grad_b[index] = add ? a.grad_b[index] + value : value;
}

cudaError_t copy(const Nf4Adapter* adapters, int count, Adapters* copied) {
  if (count < 0 || count > NF4_MOST_ADAPTERS) return cudaErrorInvalidValue;
  copied->count = count;
  for (int i = 0; i < count; ++i) copied->all[i] = adapters[i];
  return cudaSuccess;
}

}  // namespace
}  // namespace nf4

extern "C" int nf4_lora_pack(const Nf4Adapter* adapters, int count, void* matrix, int64_t stride, int n,
                             int k, int r, int dtype, cudaStream_t stream) {
  nf4::Adapters copied;
  if (cudaError_t error = nf4::copy(adapters, count, &copied)) return error;
  const int64_t blocks = (int64_t{r} * (int64_t{n} + k) + nf4::kThreads - 1) / nf4::kThreads;
  if (blocks == 0) return cudaSuccess;
  return nf4::with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return nf4::launch(nf4::pack_kernel<T>, dim3(static_cast<unsigned>(blocks)), nf4::kThreads, 0, stream,
                       false, copied, static_cast<T*>(matrix), stride, n, k, r);
  });
}

extern "C" int nf4_lora_unpack(const Nf4Adapter* adapters, int count, const void* grad_a, const void* grad_b,
                               int n, int k, int add, int dtype, cudaStream_t stream) {
  nf4::Adapters copied;
  if (cudaError_t error = nf4::copy(adapters, count, &copied)) return error;
  int64_t largest = 0;
  for (int i = 0; i < count; ++i) {
    const int64_t size = int64_t{adapters[i].rank} * ((grad_a ? k : 0) + (grad_b ? adapters[i].rows : 0));
    largest = size > largest ? size : largest;
  }
  if (largest == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>((largest + nf4::kThreads - 1) / nf4::kThreads), count);
  return nf4::with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return nf4::launch(nf4::unpack_kernel<T>, grid, nf4::kThreads, 0, stream, false, copied,
                       static_cast<const T*>(grad_a), static_cast<const T*>(grad_b), n, k, add != 0);
  });
}
