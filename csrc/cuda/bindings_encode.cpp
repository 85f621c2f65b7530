// The Python module nf4format._cuda_encode: the encoder for NVIDIA GPUs, apart from the runtime's kernels
// because the compiler does not need the runtime. Its caller (nf4format/encode_cuda.py) holds arrays to sizes
// and types.
#include <pybind11/pybind11.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "bindings_feedback.h"
#include "encoder.h"

namespace py = pybind11;

namespace {

PyObject* cuda_error = nullptr;  // nf4format._cuda_encode.CudaError, alive as long as the process

void require(bool holds, const char* name, const char* expected, int64_t got) {
  if (holds) return;
  throw std::invalid_argument(std::string(name) + ": expected " + expected + ", got " + std::to_string(got));
}

std::unique_ptr<nf4::ChunkEncoder> make_encoder(int device, uintptr_t levels, uintptr_t thresholds,
                                                bool searched, int64_t chunk_bytes, int slots) {
  const int64_t group_bytes = nf4::kBlock * nf4::kNestedBlock * 4;
  require(chunk_bytes > 0 && chunk_bytes % group_bytes == 0, "chunk_bytes", "a multiple of 65536",
          chunk_bytes);
  require(slots >= 1, "slots", "at least 1", slots);
  const py::gil_scoped_release unlocked;
  return std::make_unique<nf4::ChunkEncoder>(device, reinterpret_cast<const float*>(levels),
                                             reinterpret_cast<const float*>(thresholds), searched,
                                             chunk_bytes, slots);
}

void check_slot(const nf4::ChunkEncoder& encoder, int slot) {
  require(slot >= 0 && slot < encoder.num_slots(), "slot", "one of the encoder's", slot);
}

void start(nf4::ChunkEncoder& encoder, int slot, uintptr_t values, int dtype, int64_t n) {
  check_slot(encoder, slot);
  require(dtype >= 0 && dtype <= 2, "dtype", "0 (float32), 1 (bfloat16) or 2 (float16)", dtype);
  const auto type = nf4::Dtype(dtype);
  require(n >= 0 && n <= encoder.chunk_bytes() / nf4::dtype_bytes(type), "n", "0 to a chunk", n);
  const py::gil_scoped_release unlocked;
  encoder.start(slot, reinterpret_cast<const void*>(values), type, n);
}

py::memoryview memory(nf4::ChunkEncoder& encoder, int slot) {
  check_slot(encoder, slot);
  return py::memoryview::from_memory(static_cast<void*>(encoder.memory(slot)), encoder.chunk_bytes());
}

py::tuple finish(nf4::ChunkEncoder& encoder, int slot) {
  check_slot(encoder, slot);
  const auto encoded = [&] {
    const py::gil_scoped_release unlocked;
    return encoder.finish(slot);
  }();
  const nf4::EncodedLayout& layout = encoded.layout;
  const auto part = [&](int64_t begin, int64_t end) {
    return py::memoryview::from_memory(static_cast<const void*>(encoded.results + begin), end - begin);
  };
  return py::make_tuple(encoded.nonfinite, part(0, (encoded.n + 1) / 2),
                        part(layout.scales, layout.scales_end), part(layout.nested, layout.bad));
}

void raise_cuda_error(const nf4::CudaFailure& failure) {
  const std::string name = cudaGetErrorName(failure.code), text = cudaGetErrorString(failure.code);
  py::object error =
      py::reinterpret_borrow<py::object>(cuda_error)(std::string(failure.call) + ": " + name + ": " + text);
  error.attr("code") = static_cast<int>(failure.code);
  PyErr_SetObject(cuda_error, error.ptr());
}

// Compute capability 10 * major + minor of each GPU; raises CudaError where there is no driver or no GPU.
py::list devices() {
  const auto check = [](const char* call, cudaError_t code) {
    if (code == cudaSuccess) return;
    cudaGetLastError();
    throw nf4::CudaFailure{call, code};
  };
  int count = 0;
  check("cudaGetDeviceCount", cudaGetDeviceCount(&count));
  py::list capabilities;
  for (int device = 0; device < count; ++device) {
    int major = 0, minor = 0;
    check("cudaDeviceGetAttribute",
          cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    check("cudaDeviceGetAttribute",
          cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    capabilities.append(10 * major + minor);
  }
  return capabilities;
}

}  // namespace

PYBIND11_MODULE(_cuda_encode, m) {
  using namespace py::literals;
  m.doc() = "The NF4 encoder for NVIDIA GPUs; see _cuda_encode.pyi.";
  cuda_error = PyErr_NewException("nf4format._cuda_encode.CudaError", PyExc_RuntimeError, nullptr);
  m.add_object("CudaError", py::reinterpret_borrow<py::object>(cuda_error));
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const nf4::CudaFailure& failure) {
      raise_cuda_error(failure);
    }
  });
  py::class_<nf4::ChunkEncoder>(m, "ChunkEncoder")
      .def(py::init(&make_encoder), "device"_a, "levels"_a, "thresholds"_a, "searched"_a, "chunk_bytes"_a,
           "slots"_a)
      .def("start", &start, "slot"_a, "values"_a, "dtype"_a, "n"_a)
      .def("memory", &memory, "slot"_a)
      .def("finish", &finish, "slot"_a);
  m.def("devices", &devices);
  bind_feedback(m);
}
