// One AdamW step over contiguous elements: parameters (fp32 or bf16), gradients (fp32 or bf16), both moments
// in fp32 (Loshchilov and Hutter, arXiv 1711.05101).
//
//   parameter |p p p p|...   gradient |g g g g|...   exp_avg |m m m m|...   exp_avg_sq |v v v v|...
//
// A thread takes 4 consecutive elements of each array: one 16-byte access where elements have 4 bytes, one of
// 8 where they have 2. Bytes moved an element, all fp32: 16 read, 12 written. The order of operations is that
// of torch.optim.AdamW: decay, moments, bias corrections in the step size and under the root. All arithmetic
// in fp32; a bf16 parameter is rounded to nearest once.
//
// The gradient is multiplied by *gradient_factor first, read on the device: the clipping factor of a norm
// that was computed there costs no host synchronization. Infinite or NaN factors go through as they are.
// H200, 67 M fp32 elements: the copy limit (torch's fused AdamW takes 1.25 times as long).
#include <cmath>

#include "nf4.cuh"

namespace nf4 {
namespace {

constexpr int kThreads = 256;

struct Step {
  float decay;  // 1 - lr * weight_decay
  float beta1, beta2;
  float one_minus_beta1, one_minus_beta2;  // from the host's doubles: 1 - 0.999f is off by 1e-5 of itself
  float step_size;                         // lr / (1 - beta1^t)
  float root_correction;                   // sqrt(1 - beta2^t)
  float eps;
};

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T value[4];
};

__device__ inline float updated(float parameter, float gradient, float& exp_avg, float& exp_avg_sq,
                                const Step& s) {
  parameter *= s.decay;
  exp_avg = fmaf(s.one_minus_beta1, gradient - exp_avg, exp_avg);
  exp_avg_sq = fmaf(s.one_minus_beta2 * gradient, gradient, exp_avg_sq * s.beta2);
  const float denominator = sqrtf(exp_avg_sq) / s.root_correction + s.eps;
  return parameter - s.step_size * (exp_avg / denominator);
}

template <typename P, typename G>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(P* parameter, const G* gradient, float* exp_avg, float* exp_avg_sq, int64_t count,
                 const float* gradient_factor, Step step, bool wide) {
  const float factor = gradient_factor ? *gradient_factor : 1.0f;
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * 4;
  if (first >= count) return;
  if (wide && first + 4 <= count) {
    Four<P> p = *reinterpret_cast<const Four<P>*>(parameter + first);
    const Four<G> g = *reinterpret_cast<const Four<G>*>(gradient + first);
    Four<float> m = *reinterpret_cast<const Four<float>*>(exp_avg + first);
    Four<float> v = *reinterpret_cast<const Four<float>*>(exp_avg_sq + first);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      p.value[i] =
          round_to<P>(updated(static_cast<float>(p.value[i]), static_cast<float>(g.value[i]) * factor,
                              m.value[i], v.value[i], step));
    }
    *reinterpret_cast<Four<P>*>(parameter + first) = p;
    *reinterpret_cast<Four<float>*>(exp_avg + first) = m;
    *reinterpret_cast<Four<float>*>(exp_avg_sq + first) = v;
  } else {
    for (int64_t i = first; i < first + 4 && i < count; ++i) {
      parameter[i] =
          round_to<P>(updated(static_cast<float>(parameter[i]), static_cast<float>(gradient[i]) * factor,
                              exp_avg[i], exp_avg_sq[i], step));
    }
  }
}

template <typename P, typename G>
cudaError_t adamw(void* parameter, const void* gradient, float* exp_avg, float* exp_avg_sq, int64_t count,
                  const float* factor, const Step& step, cudaStream_t stream) {
  const auto at = [](const void* pointer, size_t bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
  };
  const bool wide =
      at(parameter, 4 * sizeof(P)) && at(gradient, 4 * sizeof(G)) && at(exp_avg, 16) && at(exp_avg_sq, 16);
  const int64_t blocks = (count + 4 * kThreads - 1) / (4 * kThreads);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return launch(adamw_kernel<P, G>, dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream, false,
                static_cast<P*>(parameter), static_cast<const G*>(gradient), exp_avg, exp_avg_sq, count,
                factor, step, wide);
}

}  // namespace
}  // namespace nf4

// Step number `step` counts from 1. gradient_factor may be null. The scalars are combined in double.
extern "C" int nf4_adamw(void* parameter, const void* gradient, float* exp_avg, float* exp_avg_sq,
                         int64_t count, int parameter_dtype, int gradient_dtype, double lr, double beta1,
                         double beta2, double eps, double weight_decay, int64_t step,
                         const float* gradient_factor, cudaStream_t stream) {
  if (count < 0 || step < 1) return cudaErrorInvalidValue;
  if (count == 0) return cudaSuccess;
  nf4::Step s;
  s.decay = static_cast<float>(1.0 - lr * weight_decay);
  s.beta1 = static_cast<float>(beta1);
  s.beta2 = static_cast<float>(beta2);
  s.one_minus_beta1 = static_cast<float>(1.0 - beta1);
  s.one_minus_beta2 = static_cast<float>(1.0 - beta2);
  s.step_size = static_cast<float>(lr / (1.0 - pow(beta1, static_cast<double>(step))));
  s.root_correction = static_cast<float>(sqrt(1.0 - pow(beta2, static_cast<double>(step))));
  s.eps = static_cast<float>(eps);
  const auto call = [&](auto kernel) {
    return kernel(parameter, gradient, exp_avg, exp_avg_sq, count, gradient_factor, s, stream);
  };
  const bool wide_p = parameter_dtype == NF4_FLOAT32, wide_g = gradient_dtype == NF4_FLOAT32;
  if (!wide_p && parameter_dtype != NF4_BFLOAT16) return cudaErrorInvalidValue;
  if (!wide_g && gradient_dtype != NF4_BFLOAT16) return cudaErrorInvalidValue;
  if (wide_p && wide_g) return call(nf4::adamw<float, float>);
  if (wide_p) return call(nf4::adamw<float, __nv_bfloat16>);
  if (wide_g) return call(nf4::adamw<__nv_bfloat16, float>);
  return call(nf4::adamw<__nv_bfloat16, __nv_bfloat16>);
}
