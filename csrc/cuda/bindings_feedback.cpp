// The part of nf4format._cuda_encode that rounds by what layers read. Its caller (qcompile/feedback_cuda.py)
// holds arrays to sizes and types, and gives the stream on which they are.
#include "bindings_feedback.h"

#include <memory>

#include "encoder.h"
#include "feedback.cuh"
#include "feedback.h"
#include "search_weighted.cuh"

namespace py = pybind11;

namespace {

void check(const char* call, cudaError_t code) {
  if (code == cudaSuccess) return;
  cudaGetLastError();  // or it would be reported once more
  throw nf4::CudaFailure{call, code};
}

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

cudaStream_t stream_of(uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

class Feedback {
 public:
  Feedback(int device, uintptr_t levels, uintptr_t thresholds) : device_(device) {
    const nf4::SearchTables search =
        nf4::search_tables(pointer<const float>(levels), pointer<const float>(thresholds));
    has_bins_ = search.has_bins;
    const nf4::FeedbackTables tables = nf4::feedback_tables(search);
    check("cudaSetDevice", cudaSetDevice(device_));
    check("cudaMalloc", cudaMalloc(reinterpret_cast<void**>(&tables_), sizeof tables));
    const cudaError_t code = cudaMemcpy(tables_, &tables, sizeof tables, cudaMemcpyHostToDevice);
    if (code != cudaSuccess) cudaFree(tables_);
    check("cudaMemcpy", code);
  }
  ~Feedback() {
    cudaSetDevice(device_);
    cudaFree(tables_);
    cudaGetLastError();
  }
  Feedback(const Feedback&) = delete;
  Feedback& operator=(const Feedback&) = delete;

  void search(uintptr_t values, int64_t n, uintptr_t weights, int64_t period, uintptr_t absmax,
              uintptr_t nested_absmax, uintptr_t stream) const {
    const nf4::SearchArguments arguments{pointer<const float>(values),
                                         pointer<const float>(weights),
                                         pointer<uint8_t>(absmax),
                                         pointer<float>(nested_absmax),
                                         n,
                                         period};
    check("search_weighted", nf4::search_weighted(tables_, has_bins_, arguments, use(stream)));
  }

  void carry(uintptr_t weight, uintptr_t rest, uintptr_t factor, uintptr_t order, uintptr_t scales,
             uintptr_t codes, uintptr_t residual, uintptr_t errors, int64_t n, int64_t factor_stride,
             int width, int scale_shift, uintptr_t stream) const {
    if (width < 1 || width > nf4::kCarried) throw std::invalid_argument("width: expected 1 to 128");
    const nf4::CarryArguments arguments{pointer<const float>(weight),
                                        pointer<const float>(rest),
                                        pointer<const float>(factor),
                                        pointer<const int64_t>(order),
                                        pointer<const float>(scales),
                                        pointer<uint8_t>(codes),
                                        pointer<float>(residual),
                                        pointer<float>(errors),
                                        n,
                                        factor_stride,
                                        width,
                                        scale_shift};
    check("carry_errors", nf4::carry_errors(tables_, arguments, use(stream)));
  }

  void descend(uintptr_t weight, uintptr_t slope, uintptr_t moment, uintptr_t nested, uintptr_t entries,
               uintptr_t scales, uintptr_t codes, uintptr_t residual, uintptr_t change, int64_t n,
               int64_t moment_stride, int width, uintptr_t stream) const {
    if (width < 1 || width > nf4::kBlock) throw std::invalid_argument("width: expected 1 to 64");
    const nf4::DescendArguments arguments{pointer<const float>(weight),
                                          pointer<const float>(slope),
                                          pointer<const float>(moment),
                                          pointer<const float>(nested),
                                          pointer<uint8_t>(entries),
                                          pointer<float>(scales),
                                          pointer<uint8_t>(codes),
                                          pointer<float>(residual),
                                          pointer<float>(change),
                                          n,
                                          moment_stride,
                                          width};
    check("descend_block", nf4::descend_block(tables_, arguments, use(stream)));
  }

 private:
  cudaStream_t use(uintptr_t stream) const {
    check("cudaSetDevice", cudaSetDevice(device_));
    return stream_of(stream);
  }

  const int device_;
  bool has_bins_ = false;
  nf4::FeedbackTables* tables_ = nullptr;
};

}  // namespace

void bind_feedback(py::module_& m) {
  using namespace py::literals;
  py::class_<Feedback>(m, "Feedback")
      .def(py::init<int, uintptr_t, uintptr_t>(), "device"_a, "levels"_a, "thresholds"_a)
      .def("search", &Feedback::search, "values"_a, "n"_a, "weights"_a, "period"_a, "absmax"_a,
           "nested_absmax"_a, "stream"_a)
      .def("carry", &Feedback::carry, "weight"_a, "rest"_a, "factor"_a, "order"_a, "scales"_a, "codes"_a,
           "residual"_a, "errors"_a, "n"_a, "factor_stride"_a, "width"_a, "scale_shift"_a, "stream"_a)
      .def("descend", &Feedback::descend, "weight"_a, "slope"_a, "moment"_a, "nested"_a, "entries"_a,
           "scales"_a, "codes"_a, "residual"_a, "change"_a, "n"_a, "moment_stride"_a, "width"_a, "stream"_a);
}
