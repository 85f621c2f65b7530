// Rows of a packed table: out [num_ids, width] = W[ids], W [rows, width] in NF4, to fp32, fp16 or bf16.
//
// A CTA decodes one row, element by element: rows need not begin at a block or even at a byte, and what is
// looked up is small beside the table. Rounding: the two rules of nf4.cuh. An id outside the table gives a
// row of NaN, because a kernel cannot raise an error without stopping the stream.
#include "nf4.cuh"

namespace nf4 {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    embedding_kernel(Nf4Weight weight, const int64_t* ids, int64_t rows, int64_t width, T* out) {
  __shared__ float map[256];
  __shared__ float levels[16];
  let_next_start();
  const float own_level = threadIdx.x < 16 ? weight.levels[threadIdx.x] : 0.0f;
  for (int i = threadIdx.x; i < 256; i += kThreads) map[i] = weight.nested_map[i];
  if (threadIdx.x < 16) levels[threadIdx.x] = own_level;
  __syncthreads();
  wait_for_previous();

  const int64_t id = ids[blockIdx.x];
  T* target = out + int64_t{blockIdx.x} * width;
  if (id < 0 || id >= rows) {
    for (int64_t i = threadIdx.x; i < width; i += kThreads)
      target[i] = round_to<T>(__int_as_float(0x7fc00000));
    return;
  }
  for (int64_t column = threadIdx.x; column < width; column += kThreads) {
    const int64_t i = id * width + column;
    const int64_t block = i / kBlock;
    const float scale =
        decode_scale(map[weight.absmax[block]], weight.nested_absmax[block / kNestedBlock], weight.offset);
    const int byte = weight.codes[i / 2];
    target[column] = round_to<T>(__fmul_rn(levels[i % 2 ? byte & 15 : byte >> 4], scale));
  }
}

template <typename T>
cudaError_t run(const Nf4Weight& weight, const int64_t* ids, int64_t num_ids, int64_t rows, int64_t width,
                void* out, bool overlap, cudaStream_t stream) {
  Device device;
  if (cudaError_t error = current_device(&device)) return error;
  if (num_ids > INT32_MAX) return cudaErrorInvalidValue;
  return launch(embedding_kernel<T>, dim3(static_cast<unsigned>(num_ids)), kThreads, 0, stream,
                overlap && device.major >= 9, weight, ids, rows, width, static_cast<T*>(out));
}

}  // namespace
}  // namespace nf4

extern "C" int nf4_embedding(const Nf4Weight* weight, const int64_t* ids, int64_t num_ids, int64_t rows,
                             int64_t width, void* out, int dtype, int overlap, cudaStream_t stream) {
  if (num_ids < 0 || rows < 1 || width < 1) return cudaErrorInvalidValue;
  if (num_ids == 0) return cudaSuccess;
  switch (dtype) {
    case NF4_FLOAT32:
      return nf4::run<float>(*weight, ids, num_ids, rows, width, out, overlap, stream);
    case NF4_FLOAT16:
      return nf4::run<__half>(*weight, ids, num_ids, rows, width, out, overlap, stream);
    case NF4_BFLOAT16:
      return nf4::run<__nv_bfloat16>(*weight, ids, num_ids, rows, width, out, overlap, stream);
  }
  return cudaErrorInvalidValue;
}
