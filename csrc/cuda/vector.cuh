// Elements of a row in fp32, kWidth at a time: 16 bytes in one access where addresses and sizes allow it,
// else 1.
#pragma once

#include "nf4.cuh"

namespace nf4 {

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T values[kWidth];
};

template <int kWidth, typename T>
__device__ inline void load(const T* source, float* values) {
  const Vector<T, kWidth> loaded = *reinterpret_cast<const Vector<T, kWidth>*>(source);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) values[i] = to_float(loaded.values[i]);
}

template <int kWidth, typename T>
__device__ inline void store(T* target, const float* values) {
  Vector<T, kWidth> stored;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) stored.values[i] = round_to<T>(values[i]);
  *reinterpret_cast<Vector<T, kWidth>*>(target) = stored;
}

template <typename T>
__device__ inline T* row_of(const Nf4Rows& rows, int64_t index) {
  return static_cast<T*>(rows.data) + index * rows.stride;
}

// Whether every one of these is a multiple of 16 bytes: addresses, and strides and sizes in elements of T.
template <typename T>
struct Aligned {
  bool holds = true;
  Aligned& address(const void* pointer) {
    holds &= reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
    return *this;
  }
  Aligned& elements(int64_t count) {
    holds &= count * static_cast<int64_t>(sizeof(T)) % 16 == 0;
    return *this;
  }
};

template <typename T>
constexpr int kWide = 16 / sizeof(T);

// The sum over all threads of a block of kThreads, in every one of them.
template <int kThreads>
__device__ inline float block_sum(float value) {
  __shared__ float parts[kThreads / 32];
  for (int distance = 16; distance; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  __syncthreads();  // parts may still be read from the sum before
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0.0f;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) value += parts[i];
  return value;
}

// fn(T{}) for the type that the code `dtype` means.
template <typename Function>
cudaError_t with_type(int dtype, Function fn) {
  switch (dtype) {
    case NF4_FLOAT32:
      return fn(float{});
    case NF4_FLOAT16:
      return fn(__half{});
    case NF4_BFLOAT16:
      return fn(__nv_bfloat16{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace nf4
