// What every kernel over 4-bit weights shares: the rule of decoding, the launch conventions.
//
// A weight of n elements, flat and row-major:
//
//   codes          uint8 [ceil(n / 2)]            two codes a byte, the first element in the high nibble
//   absmax         uint8 [ceil(n / 64)]           index into nested_map, one for each block of 64 elements
//   levels         fp32  [16]                     what codes stand for: NF4's, or others in [-1, 1]
//   nested_absmax  fp32  [ceil(n / 64 / 256)]     one for each 256 blocks
//   nested_map     fp32  [256]
//
//   scale  = rn(rn(nested_map[absmax] * nested_absmax) + offset)     two fp32 roundings, never contracted
//   weight = rn(levels[code] * scale)                                one rounding to the output type
//
// The levels are the weight's own, because a file may hold others than NF4's. Kernels fetch them beside
// nested_map, into the tables that they look codes up in: whose they are costs nothing.
//
// Launchers return a cudaError_t as int and check nothing but what they need to choose a kernel: shapes and
// devices are checked by the caller.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "launchers.h"

namespace nf4 {

constexpr int kBlock = 64;         // elements that share a scale
constexpr int kNestedBlock = 256;  // scales that share a nested_absmax

__device__ inline float decode_scale(float mapped, float nested_absmax, float offset) {
  return __fadd_rn(__fmul_rn(mapped, nested_absmax), offset);
}

// Programmatic dependent launch (sm_90): a kernel launched with `overlap` may start while its predecessor in
// the stream still runs. Whatever it does before wait_for_previous() must touch constants only, that is
// weights which no kernel just before it wrote; everything else, stores included, comes after.
__device__ inline void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

template <typename T>
__device__ inline T round_to(float value);
template <>
__device__ inline float round_to<float>(float value) {
  return value;
}
template <>
__device__ inline __half round_to<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 round_to<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

}  // namespace nf4

namespace nf4 {

// The properties of the current device that launchers ask for, read once a device.
struct Device {
  int major = 0, minor = 0;
  int num_sms = 0;
  int shared_bytes_per_block = 0;
};

inline cudaError_t current_device(Device* device) {
  static Device known[64];
  int index = 0;
  if (cudaError_t error = cudaGetDevice(&index)) return error;
  if (index >= 64) return cudaErrorInvalidDevice;
  if (known[index].num_sms == 0) {
    Device fresh;
    cudaDeviceGetAttribute(&fresh.major, cudaDevAttrComputeCapabilityMajor, index);
    cudaDeviceGetAttribute(&fresh.minor, cudaDevAttrComputeCapabilityMinor, index);
    cudaDeviceGetAttribute(&fresh.shared_bytes_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    cudaDeviceGetAttribute(&fresh.num_sms, cudaDevAttrMultiProcessorCount, index);
    known[index] = fresh;  // two threads may write it at once, and write the same
  }
  *device = known[index];
  return cudaSuccess;
}

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes,
                   cudaStream_t stream, bool overlap, Args... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

}  // namespace nf4
