// What the files that bind kernels to Python share: errors, arguments and their checks, and the function each
// of them adds to the module nf4._cuda.
#pragma once

#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "launchers.h"

struct CudaFailure {  // becomes nf4._cuda.CudaError
  std::string call;
  cudaError_t code;
};

inline void check(const char* call, int code) {
  if (code == cudaSuccess) return;
  cudaGetLastError();  // this module's own copy of the runtime would report it again
  throw CudaFailure{call, static_cast<cudaError_t>(code)};
}

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline Nf4Weight weight_of(uintptr_t codes, uintptr_t absmax, uintptr_t quant_map, uintptr_t nested_absmax,
                           uintptr_t nested_quant_map, float nested_offset) {
  return {pointer<const uint8_t>(codes),          pointer<const uint8_t>(absmax),
          pointer<const float>(quant_map),        pointer<const float>(nested_absmax),
          pointer<const float>(nested_quant_map), nested_offset};
}

inline void require(bool holds, const char* name, const char* expected, int64_t got) {
  if (holds) return;
  throw std::invalid_argument(std::string(name) + ": expected " + expected + ", got " + std::to_string(got));
}

inline void check_dtype(const char* name, int dtype) {
  require(dtype >= 0 && dtype <= 2, name, "0 (float32), 1 (bfloat16) or 2 (float16)", dtype);
}

void bind_adamw(pybind11::module_& m);         // bindings_adamw.cpp
void bind_group(pybind11::module_& m);         // bindings_group.cpp
void bind_linear_wgmma(pybind11::module_& m);  // bindings_linear_wgmma.cpp
void bind_training(pybind11::module_& m);      // bindings_training.cpp
void bind_upload(pybind11::module_& m);        // bindings_upload.cpp
