// Binding of the product of several weights with one input, in one launch.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "bindings.h"
#include "launchers.h"

namespace py = pybind11;

namespace {

// codes, absmax, quant_map, nested_absmax, nested_quant_map, nested_offset, n, out
using Weight = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, float, int64_t, uintptr_t>;

bool linear_group(uintptr_t x, int dtype, int64_t m, int64_t k, const std::vector<Weight>& weights,
                  bool overlap, uintptr_t stream) {
  require(m >= 1 && m <= 65535, "m", "1 to 65535", m);
  require(k >= 1 && k <= INT32_MAX, "k", "1 to 2147483647", k);
  require(dtype == NF4_BFLOAT16 || dtype == NF4_FLOAT16, "dtype", "1 (bfloat16) or 2 (float16)", dtype);
  const auto size = static_cast<int64_t>(weights.size());
  require(size >= 1 && size <= NF4_MOST_WEIGHTS, "weights", "1 to 4", size);
  std::vector<Nf4Linear> linears;
  for (const auto& [codes, absmax, quant_map, nested_absmax, nested_quant_map, nested_offset, n, out] :
       weights) {
    require(n >= 1 && n <= INT32_MAX, "n", "1 to 2147483647", n);
    const Nf4Weight weight =
        weight_of(codes, absmax, quant_map, nested_absmax, nested_quant_map, nested_offset);
    linears.push_back({weight, nullptr, pointer<void>(out), static_cast<int>(n)});
  }
  const int code =
      nf4_linear_few_rows(linears.data(), static_cast<int>(size), pointer<const void>(x), static_cast<int>(m),
                          static_cast<int>(k), dtype, overlap, pointer<CUstream_st>(stream));
  if (code == cudaErrorNotSupported) return false;
  check("linear_group", code);
  return true;
}

}  // namespace

void bind_group(py::module_& m) {
  using namespace py::literals;
  m.def("linear_group", &linear_group, "x"_a, "dtype"_a, "m"_a, "k"_a, "weights"_a, "overlap"_a, "stream"_a);
}
