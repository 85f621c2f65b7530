// The Python module nf4._cuda: raw device addresses and a stream in, no torch. Its callers hold tensors to
// sizes, types and devices (nf4/ops/operands.py); what can be checked from numbers alone is checked here.
// Work is only started; the interpreter lock is kept, as no call waits.
#include "bindings.h"

#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <string>

#include "launchers.h"

namespace py = pybind11;

namespace {

PyObject* cuda_error = nullptr;  // nf4._cuda.CudaError, alive as long as the process

void raise_cuda_error(const CudaFailure& failure) {
  const std::string name = cudaGetErrorName(failure.code);
  const std::string text = cudaGetErrorString(failure.code);
  py::object error = py::reinterpret_borrow<py::object>(cuda_error)(
      failure.call + ": CUDA error " + std::to_string(failure.code) + ", " + name + ": " + text);
  error.attr("code") = static_cast<int>(failure.code);
  error.attr("name") = name;
  error.attr("text") = text;
  PyErr_SetObject(cuda_error, error.ptr());
}

void dequantize(uintptr_t codes, uintptr_t absmax, uintptr_t quant_map, uintptr_t nested_absmax,
                uintptr_t nested_quant_map, float nested_offset, int64_t start, int64_t stop, uintptr_t out,
                int out_dtype, bool overlap, uintptr_t stream) {
  require(start >= 0, "start", "at least 0", start);
  require(stop >= start, "stop", "at least start", stop);
  check_dtype("out_dtype", out_dtype);
  const Nf4Weight weight =
      weight_of(codes, absmax, quant_map, nested_absmax, nested_quant_map, nested_offset);
  check("dequantize", nf4_dequantize(&weight, start, stop, pointer<void>(out), out_dtype, overlap,
                                     pointer<CUstream_st>(stream)));
}

void embedding(uintptr_t codes, uintptr_t absmax, uintptr_t quant_map, uintptr_t nested_absmax,
               uintptr_t nested_quant_map, float nested_offset, uintptr_t ids, int64_t num_ids, int64_t rows,
               int64_t width, uintptr_t out, int out_dtype, bool overlap, uintptr_t stream) {
  require(num_ids >= 0, "num_ids", "at least 0", num_ids);
  require(rows >= 1, "rows", "at least 1", rows);
  require(width >= 1, "width", "at least 1", width);
  check_dtype("out_dtype", out_dtype);
  const Nf4Weight weight =
      weight_of(codes, absmax, quant_map, nested_absmax, nested_quant_map, nested_offset);
  check("embedding", nf4_embedding(&weight, pointer<const int64_t>(ids), num_ids, rows, width,
                                   pointer<void>(out), out_dtype, overlap, pointer<CUstream_st>(stream)));
}

void linear(uintptr_t x, int dtype, int64_t m, uintptr_t codes, uintptr_t absmax, uintptr_t quant_map,
            uintptr_t nested_absmax, uintptr_t nested_quant_map, float nested_offset, int64_t n, int64_t k,
            uintptr_t bias, uintptr_t out, bool overlap, uintptr_t stream) {
  require(m >= 1 && m <= 65535, "m", "1 to 65535", m);
  require(n >= 1 && n <= INT32_MAX, "n", "1 to 2147483647", n);
  require(k >= 1 && k <= INT32_MAX, "k", "1 to 2147483647", k);
  check_dtype("dtype", dtype);
  const int rows = static_cast<int>(m), outputs = static_cast<int>(n), inputs = static_cast<int>(k);
  const Nf4Weight weight =
      weight_of(codes, absmax, quant_map, nested_absmax, nested_quant_map, nested_offset);
  if (dtype != NF4_FLOAT32) {
    const Nf4Linear one = {weight, pointer<const void>(bias), pointer<void>(out), outputs};
    const int code = nf4_linear_few_rows(&one, 1, pointer<const void>(x), rows, inputs, dtype, overlap,
                                         pointer<CUstream_st>(stream));
    if (code != cudaErrorNotSupported) return check("linear_few_rows", code);
  }
  check("linear_any_shape",
        nf4_linear_any_shape(&weight, pointer<const void>(x), pointer<const void>(bias), pointer<void>(out),
                             rows, outputs, inputs, dtype, overlap, pointer<CUstream_st>(stream)));
}

// 0 where there is no driver.
int driver_version() {
  int version = 0;
  if (cudaDriverGetVersion(&version) != cudaSuccess) version = 0;
  return version;
}

py::dict build_info() {
  py::dict info;
  info["version"] = NF4_VERSION;
  info["archs"] = py::str(NF4_CUDA_ARCHS).attr("split")();
  info["nvcc"] = NF4_NVCC;
  info["runtime"] = CUDART_VERSION;
  return info;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  using namespace py::literals;
  m.doc() = "NF4 kernels for NVIDIA GPUs; see _cuda.pyi.";
  cuda_error = PyErr_NewException("nf4._cuda.CudaError", PyExc_RuntimeError, nullptr);
  m.add_object("CudaError", py::reinterpret_borrow<py::object>(cuda_error));
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const CudaFailure& failure) {
      raise_cuda_error(failure);
    }
  });
  m.def("dequantize", &dequantize, "codes"_a, "absmax"_a, "quant_map"_a, "nested_absmax"_a,
        "nested_quant_map"_a, "nested_offset"_a, "start"_a, "stop"_a, "out"_a, "out_dtype"_a, "overlap"_a,
        "stream"_a);
  m.def("embedding", &embedding, "codes"_a, "absmax"_a, "quant_map"_a, "nested_absmax"_a,
        "nested_quant_map"_a, "nested_offset"_a, "ids"_a, "num_ids"_a, "rows"_a, "width"_a, "out"_a,
        "out_dtype"_a, "overlap"_a, "stream"_a);
  m.def("linear", &linear, "x"_a, "dtype"_a, "m"_a, "codes"_a, "absmax"_a, "quant_map"_a, "nested_absmax"_a,
        "nested_quant_map"_a, "nested_offset"_a, "n"_a, "k"_a, "bias"_a, "out"_a, "overlap"_a, "stream"_a);
  bind_adamw(m);
  bind_group(m);
  bind_linear_wgmma(m);
  bind_training(m);
  bind_upload(m);
  m.def("driver_version", &driver_version);
  m.def("build_info", &build_info);
}
