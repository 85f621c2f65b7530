// The Python module nf4format._native: raw addresses in, no arrays and no torch. Its callers hold arrays to
// sizes and types (nf4format/blocks.py, nf4/ops/cpu.py); what can be checked from numbers alone is checked
// here. The interpreter lock is released while kernels run.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "isa.h"
#include "kernels.h"

namespace py = pybind11;

void bind_io(py::module_& m);  // bindings_io.cpp

namespace nf4 {
namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void require(bool holds, const char* name, const char* expected, int64_t got) {
  if (holds) return;
  throw std::invalid_argument(std::string(name) + ": expected " + expected + ", got " + std::to_string(got));
}

Dtype dtype_of(const char* name, int code) {
  require(code >= 0 && code <= 2, name, "0 (float32), 1 (bfloat16) or 2 (float16)", code);
  return Dtype(code);
}

void check_threads(int threads) { require(threads >= 1, "threads", "at least 1", threads); }

Packed packed_of(uintptr_t codes, uintptr_t absmax, uintptr_t quant_map, uintptr_t nested_absmax,
                 uintptr_t nested_quant_map, float nested_offset) {
  return {pointer<const uint8_t>(codes),          pointer<const uint8_t>(absmax),
          pointer<const float>(quant_map),        pointer<const float>(nested_absmax),
          pointer<const float>(nested_quant_map), nested_offset};
}

int64_t quantize_codes_at(uintptr_t src, int dtype, int64_t n, uintptr_t codes, uintptr_t absmax_f32,
                          int threads) {
  require(n >= 0, "n", "at least 0", n);
  check_threads(threads);
  const Dtype type = dtype_of("dtype", dtype);
  const py::gil_scoped_release unlocked;
  return quantize_codes(pointer<const void>(src), type, n, pointer<uint8_t>(codes),
                        pointer<float>(absmax_f32), threads);
}

int64_t quantize_codes_onto_at(uintptr_t levels, uintptr_t thresholds, uintptr_t src, int dtype, int64_t n,
                               uintptr_t codes, uintptr_t absmax_f32, int threads) {
  require(n >= 0, "n", "at least 0", n);
  check_threads(threads);
  const Dtype type = dtype_of("dtype", dtype);
  const py::gil_scoped_release unlocked;
  return quantize_codes_onto(pointer<const float>(levels), pointer<const float>(thresholds),
                             pointer<const void>(src), type, n, pointer<uint8_t>(codes),
                             pointer<float>(absmax_f32), threads);
}

int64_t quantize_search_at(uintptr_t levels, uintptr_t thresholds, uintptr_t src, int dtype, int64_t n,
                           uintptr_t codes, uintptr_t absmax_u8, uintptr_t nested_absmax, int threads) {
  require(n >= 0, "n", "at least 0", n);
  check_threads(threads);
  const Dtype type = dtype_of("dtype", dtype);
  const py::gil_scoped_release unlocked;
  return quantize_search(pointer<const float>(levels), pointer<const float>(thresholds),
                         pointer<const void>(src), type, n, pointer<uint8_t>(codes),
                         pointer<uint8_t>(absmax_u8), pointer<float>(nested_absmax), threads);
}

void scale_search_at(uintptr_t levels, uintptr_t thresholds, uintptr_t values, int64_t n, uintptr_t weights,
                     int64_t period, uintptr_t absmax_u8, uintptr_t nested_absmax, int threads) {
  require(n >= 0, "n", "at least 0", n);
  require(period >= 1, "period", "at least 1", period);
  check_threads(threads);
  const py::gil_scoped_release unlocked;
  scale_search(pointer<const float>(levels), pointer<const float>(thresholds), pointer<const float>(values),
               n, pointer<const float>(weights), period, pointer<uint8_t>(absmax_u8),
               pointer<float>(nested_absmax), threads);
}

float quantize_absmax_at(uintptr_t absmax_f32, int64_t n, uintptr_t absmax_u8, uintptr_t nested_absmax) {
  require(n >= 0, "n", "at least 0", n);
  const py::gil_scoped_release unlocked;
  return quantize_absmax(pointer<const float>(absmax_f32), n, pointer<uint8_t>(absmax_u8),
                         pointer<float>(nested_absmax));
}

int64_t first_nonfinite_at(uintptr_t src, int dtype, int64_t n, bool nan_only, int threads) {
  require(n >= 0, "n", "at least 0", n);
  check_threads(threads);
  const Dtype type = dtype_of("dtype", dtype);
  const py::gil_scoped_release unlocked;
  return first_nonfinite(pointer<const void>(src), type, n, nan_only, threads);
}

void dequantize_at(uintptr_t codes, uintptr_t absmax, uintptr_t quant_map, uintptr_t nested_absmax,
                   uintptr_t nested_quant_map, float nested_offset, int64_t start, int64_t stop,
                   uintptr_t out, int out_dtype, int threads) {
  require(start >= 0, "start", "at least 0", start);
  require(stop >= start, "stop", "at least start", stop);
  check_threads(threads);
  const Dtype type = dtype_of("out_dtype", out_dtype);
  const Packed packed = packed_of(codes, absmax, quant_map, nested_absmax, nested_quant_map, nested_offset);
  const py::gil_scoped_release unlocked;
  dequantize(packed, start, stop, pointer<void>(out), type, threads);
}

void linear_at(uintptr_t x, int x_dtype, int m, uintptr_t codes, uintptr_t absmax, uintptr_t quant_map,
               uintptr_t nested_absmax, uintptr_t nested_quant_map, float nested_offset, int64_t n, int64_t k,
               uintptr_t out, int out_dtype, int threads) {
  require(m >= 1 && m <= kMaxRows, "m", "1 to 8", m);
  require(n >= 0, "n", "at least 0", n);
  require(k >= 1, "k", "at least 1", k);
  check_threads(threads);
  const Dtype x_type = dtype_of("x_dtype", x_dtype), out_type = dtype_of("out_dtype", out_dtype);
  const Packed packed = packed_of(codes, absmax, quant_map, nested_absmax, nested_quant_map, nested_offset);
  const py::gil_scoped_release unlocked;
  linear(pointer<const void>(x), x_type, m, packed, n, k, pointer<void>(out), out_type, threads);
}

py::dict build_info() {
  py::dict info;
  info["version"] = NF4_VERSION;
  info["compiler"] = NF4_COMPILER;
  info["isa"] = chosen_kernels().isa;
  info["isas"] = py::str(compiled_isas()).attr("split")();
  return info;
}

}  // namespace
}  // namespace nf4

PYBIND11_MODULE(_native, m) {
  using namespace py::literals;
  m.doc() = "NF4 kernels for the CPU; see _native.pyi.";
  m.def("quantize_codes", &nf4::quantize_codes_at, "src"_a, "dtype"_a, "n"_a, "codes"_a, "absmax_f32"_a,
        "threads"_a);
  m.def("quantize_codes_onto", &nf4::quantize_codes_onto_at, "levels"_a, "thresholds"_a, "src"_a, "dtype"_a,
        "n"_a, "codes"_a, "absmax_f32"_a, "threads"_a);
  m.def("quantize_search", &nf4::quantize_search_at, "levels"_a, "thresholds"_a, "src"_a, "dtype"_a, "n"_a,
        "codes"_a, "absmax_u8"_a, "nested_absmax"_a, "threads"_a);
  m.def("scale_search", &nf4::scale_search_at, "levels"_a, "thresholds"_a, "values"_a, "n"_a, "weights"_a,
        "period"_a, "absmax_u8"_a, "nested_absmax"_a, "threads"_a);
  m.def("quantize_absmax", &nf4::quantize_absmax_at, "absmax_f32"_a, "n"_a, "absmax_u8"_a, "nested_absmax"_a);
  m.def("first_nonfinite", &nf4::first_nonfinite_at, "src"_a, "dtype"_a, "n"_a, "nan_only"_a, "threads"_a);
  m.def("dequantize", &nf4::dequantize_at, "codes"_a, "absmax"_a, "quant_map"_a, "nested_absmax"_a,
        "nested_quant_map"_a, "nested_offset"_a, "start"_a, "stop"_a, "out"_a, "out_dtype"_a, "threads"_a);
  m.def("linear", &nf4::linear_at, "x"_a, "x_dtype"_a, "m"_a, "codes"_a, "absmax"_a, "quant_map"_a,
        "nested_absmax"_a, "nested_quant_map"_a, "nested_offset"_a, "n"_a, "k"_a, "out"_a, "out_dtype"_a,
        "threads"_a);
  bind_io(m);
  m.def("build_info", &nf4::build_info);
}
