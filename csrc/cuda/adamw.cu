// One AdamW step over many parameters whose moments lie in pages (Loshchilov and Hutter, arXiv 1711.05101),
// and the norm of their gradients.
//
//   page k, fp32     | exp_avg of E elements | exp_avg_sq of the same E elements |
//   chunks           parameter, gradient, where in which page, how many elements: a block of threads each
//
// The table of chunks lies on the device and changes only when a gradient moves; where the pages lie now, and
// the scalars of the step, travel with the launch. So hundreds of small parameters take one launch, and a
// page may lie elsewhere at every step.
//
// A thread takes 4 consecutive elements of each array: one 16-byte access where elements have 4 bytes, one of
// 8 where they have 2. Bytes moved an element, all fp32: 16 read, 12 written. The arithmetic is in adamw.cuh;
// a bf16 parameter is rounded to nearest once.
//
// The gradient is multiplied by *gradient_factor first, read on the device: neither the clipping factor nor
// the decision to leave a step out, a factor that is not finite, costs a host synchronization.
#include "adamw.cuh"

namespace nf4 {
namespace {

using namespace adamw;

constexpr int kStride = 4 * kThreads;

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T value[4];
};

template <typename P, typename G>
__device__ inline void update(P* parameter, const G* gradient, float* exp_avg, float* exp_avg_sq, int count,
                              float factor, const Step& step) {
  const bool wide = is_aligned(parameter, 4 * sizeof(P)) && is_aligned(gradient, 4 * sizeof(G)) &&
                    is_aligned(exp_avg, 16) && is_aligned(exp_avg_sq, 16);
  for (int first = 4 * threadIdx.x; first < count; first += kStride) {
    if (wide && first + 4 <= count) {
      Four<P> p = *reinterpret_cast<const Four<P>*>(parameter + first);
      const Four<G> g = *reinterpret_cast<const Four<G>*>(gradient + first);
      Four<float> m = *reinterpret_cast<const Four<float>*>(exp_avg + first);
      Four<float> v = *reinterpret_cast<const Four<float>*>(exp_avg_sq + first);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        p.value[i] = round_to<P>(updated(static_cast<float>(p.value[i]),
                                         __fmul_rn(static_cast<float>(g.value[i]), factor), m.value[i],
                                         v.value[i], step));
      }
      *reinterpret_cast<Four<P>*>(parameter + first) = p;
      *reinterpret_cast<Four<float>*>(exp_avg + first) = m;
      *reinterpret_cast<Four<float>*>(exp_avg_sq + first) = v;
    } else {
      for (int i = first; i < first + 4 && i < count; ++i) {
        parameter[i] = round_to<P>(updated(static_cast<float>(parameter[i]),
                                           __fmul_rn(static_cast<float>(gradient[i]), factor), exp_avg[i],
                                           exp_avg_sq[i], step));
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads) adamw_kernel(const __grid_constant__ Sweep sweep) {
  const Nf4AdamwChunk chunk = sweep.chunks[blockIdx.x];
  const unsigned setting = static_cast<unsigned>(chunk.setting - sweep.first_setting);
  if (setting >= NF4_MOST_SETTINGS) return;  // the turn of another launch
  const float factor = sweep.gradient_factor ? *sweep.gradient_factor : 1.0f;
  if (!isfinite(factor)) return;
  const Step step = sweep.steps[setting];
  float* exp_avg = static_cast<float*>(sweep.pages[chunk.page - sweep.first_page]) + chunk.at;
  float* exp_avg_sq = exp_avg + sweep.page_elements;
  with_types(chunk, [&](auto* parameter, const auto* gradient) {
    update(parameter, gradient, exp_avg, exp_avg_sq, chunk.count, factor, step);
  });
}

// The sum over the block, in every thread of the first warp; the same order at every run.
template <typename T>
__device__ inline T block_sum(T value, T* shared) {
  for (int step = 16; step; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  value = threadIdx.x < blockDim.x / 32 ? shared[threadIdx.x] : T(0);
  if (threadIdx.x < 32) {
    for (int step = 16; step; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  }
  return value;
}

template <typename G>
__device__ inline float squares(const G* gradient, int count) {
  float sum = 0.0f;
  const bool wide = is_aligned(gradient, 4 * sizeof(G));
  for (int first = 4 * threadIdx.x; first < count; first += kStride) {
    if (wide && first + 4 <= count) {
      const Four<G> g = *reinterpret_cast<const Four<G>*>(gradient + first);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum = fmaf(float(g.value[i]), float(g.value[i]), sum);
    } else {
      for (int i = first; i < first + 4 && i < count; ++i) {
        sum = fmaf(float(gradient[i]), float(gradient[i]), sum);
      }
    }
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads)
    squares_kernel(const Nf4GradientChunk* chunks, float* sum_of_squares) {
  __shared__ float shared[kThreads / 32];
  const Nf4GradientChunk chunk = chunks[blockIdx.x];
  const float sum = chunk.dtype == NF4_FLOAT32
                        ? squares(static_cast<const float*>(chunk.gradient), chunk.count)
                        : squares(static_cast<const __nv_bfloat16*>(chunk.gradient), chunk.count);
  const float total = block_sum(sum, shared);
  if (threadIdx.x == 0) sum_of_squares[blockIdx.x] = total;
}

constexpr int kNormThreads = 1024;

__global__ void __launch_bounds__(kNormThreads)
    norm_kernel(const float* sum_of_squares, int count, float* norm) {
  __shared__ double shared[kNormThreads / 32];
  double sum = 0.0;
  for (int i = threadIdx.x; i < count; i += kNormThreads) sum += sum_of_squares[i];
  const double total = block_sum(sum, shared);
  if (threadIdx.x == 0) *norm = static_cast<float>(sqrt(total));
}

}  // namespace
}  // namespace nf4

extern "C" int nf4_adamw(const Nf4AdamwChunk* chunks, int64_t num_chunks, int first_page, int num_pages,
                         void* const* pages, int64_t page_elements, const Nf4AdamwSetting* settings,
                         int num_settings, const float* gradient_factor, cudaStream_t stream) {
  return nf4::adamw::launch_sweep(nf4::adamw_kernel, chunks, num_chunks, first_page, num_pages, pages,
                                  page_elements, settings, num_settings, gradient_factor, stream);
}

extern "C" int nf4_gradient_norm(const Nf4GradientChunk* chunks, int64_t num_chunks, float* sums_of_squares,
                                 float* norm, cudaStream_t stream) {
  if (num_chunks < 0 || num_chunks > INT32_MAX) return cudaErrorInvalidValue;
  const int count = static_cast<int>(num_chunks);
  if (count > 0) {
    const int code = nf4::launch(nf4::squares_kernel, dim3(static_cast<unsigned>(count)), nf4::kThreads, 0,
                                 stream, false, chunks, sums_of_squares);
    if (code != cudaSuccess) return code;
  }
  return nf4::launch(nf4::norm_kernel, dim3(1), nf4::kNormThreads, 0, stream, false, sums_of_squares, count,
                     norm);
}
