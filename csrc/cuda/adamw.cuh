// What the kernels of AdamW share, whatever the form of the moments: the arguments of a sweep over pages, the
// arithmetic of one element, and the launches.
//
// The order of operations is that of torch.optim.AdamW: decay, moments, bias corrections in the step size and
// under the root. All in fp32.
#pragma once

#include <cmath>

#include "nf4.cuh"

namespace nf4 {
namespace adamw {

constexpr int kThreads = 256;

struct Step {
  float decay;  // 1 - lr * weight_decay
  float beta1, beta2;
  float one_minus_beta1, one_minus_beta2;  // from the host's doubles: 1 - 0.999f is off by 1e-5 of itself
  float step_size;                         // lr / (1 - beta1^t)
  float inverse_root;                      // 1 / sqrt(1 - beta2^t)
  float eps;
};

struct Sweep {
  const Nf4AdamwChunk* chunks;
  const float* gradient_factor;
  int64_t page_elements;
  int first_page, first_setting;
  Step steps[NF4_MOST_SETTINGS];
  void* pages[NF4_MOST_PAGES];
};

__device__ inline bool is_aligned(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Every contraction is written out: a page border decides which of the two ways below an element goes, and
// both must give the same bits.
__device__ inline float updated(float parameter, float gradient, float& exp_avg, float& exp_avg_sq,
                                const Step& s) {
  parameter = __fmul_rn(parameter, s.decay);
  exp_avg = fmaf(s.one_minus_beta1, __fsub_rn(gradient, exp_avg), exp_avg);
  exp_avg_sq = fmaf(s.one_minus_beta2, __fmul_rn(gradient, gradient), __fmul_rn(exp_avg_sq, s.beta2));
  const float denominator = __fadd_rn(__fmul_rn(__fsqrt_rn(exp_avg_sq), s.inverse_root), s.eps);
  return fmaf(-s.step_size, __fdiv_rn(exp_avg, denominator), parameter);
}

inline Step step_of(const Nf4AdamwSetting& s) {
  const double t = static_cast<double>(s.step);
  return {static_cast<float>(1.0 - s.lr * s.weight_decay),
          static_cast<float>(s.beta1),
          static_cast<float>(s.beta2),
          static_cast<float>(1.0 - s.beta1),
          static_cast<float>(1.0 - s.beta2),
          static_cast<float>(s.lr / (1.0 - pow(s.beta1, t))),
          static_cast<float>(1.0 / sqrt(1.0 - pow(s.beta2, t))),
          static_cast<float>(s.eps)};
}

// Launches `kernel` over all chunks, once for each NF4_MOST_SETTINGS settings.
template <typename... Params, typename... Args>
int launch_sweep(void (*kernel)(Params...), const Nf4AdamwChunk* chunks, int64_t num_chunks, int first_page,
                 int num_pages, void* const* pages, int64_t page_elements, const Nf4AdamwSetting* settings,
                 int num_settings, const float* gradient_factor, cudaStream_t stream, Args... args) {
  if (num_chunks < 0 || num_chunks > INT32_MAX) return cudaErrorInvalidValue;
  if (num_pages < 0 || num_pages > NF4_MOST_PAGES) return cudaErrorInvalidValue;
  if (num_chunks == 0) return cudaSuccess;
  Sweep sweep = {};
  sweep.chunks = chunks;
  sweep.gradient_factor = gradient_factor;
  sweep.page_elements = page_elements;
  sweep.first_page = first_page;
  for (int i = 0; i < num_pages; ++i) sweep.pages[i] = pages[i];
  for (int first = 0; first < num_settings; first += NF4_MOST_SETTINGS) {
    sweep.first_setting = first;
    for (int i = 0; i < NF4_MOST_SETTINGS && first + i < num_settings; ++i) {
      sweep.steps[i] = step_of(settings[first + i]);
    }
    const int code =
        launch(kernel, dim3(static_cast<unsigned>(num_chunks)), kThreads, 0, stream, false, sweep, args...);
    if (code != cudaSuccess) return code;
  }
  return cudaSuccess;
}

// fn(parameter, gradient) with pointers of the types that the chunk names, float or __nv_bfloat16.
template <typename Function>
__device__ inline void with_types(const Nf4AdamwChunk& chunk, Function fn) {
  auto* const narrow_p = static_cast<__nv_bfloat16*>(chunk.parameter);
  auto* const narrow_g = static_cast<const __nv_bfloat16*>(chunk.gradient);
  auto* const p = static_cast<float*>(chunk.parameter);
  auto* const g = static_cast<const float*>(chunk.gradient);
  if (chunk.parameter_dtype == NF4_FLOAT32) {
    chunk.gradient_dtype == NF4_FLOAT32 ? fn(p, g) : fn(p, narrow_g);
  } else {
    chunk.gradient_dtype == NF4_FLOAT32 ? fn(narrow_p, g) : fn(narrow_p, narrow_g);
  }
}

}  // namespace adamw
}  // namespace nf4
