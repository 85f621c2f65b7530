// nf4._cuda.linear_wgmma and the workspace it needs; where it was not built, no device takes it.
#include <climits>

#include "bindings.h"
#include "launchers.h"

namespace py = pybind11;

namespace {

int64_t linear_wgmma_workspace(int64_t m, int64_t n, int64_t k) {
  require(m >= 1 && m <= INT_MAX, "m", "1 to 2147483647", m);
  require(n >= 1 && n <= INT_MAX, "n", "1 to 2147483647", n);
  require(k >= 1 && k <= INT_MAX, "k", "1 to 2147483647", k);
#ifdef NF4_WGMMA
  return nf4_linear_wgmma_workspace(static_cast<int>(m), static_cast<int>(n), static_cast<int>(k));
#else
  return 0;
#endif
}

void linear_wgmma(uintptr_t x, int dtype, int64_t m, uintptr_t codes, uintptr_t absmax, uintptr_t quant_map,
                  uintptr_t nested_absmax, uintptr_t nested_quant_map, float nested_offset, int64_t n,
                  int64_t k, uintptr_t bias, uintptr_t out, uintptr_t workspace, int64_t workspace_bytes,
                  bool overlap, uintptr_t stream) {
  require(dtype == NF4_BFLOAT16 || dtype == NF4_FLOAT16, "dtype", "1 (bfloat16) or 2 (float16)", dtype);
  const int64_t needed = linear_wgmma_workspace(m, n, k);
  if (needed == 0) check("linear_wgmma", cudaErrorNotSupported);
  require(workspace_bytes >= needed, "workspace_bytes", "at least what linear_wgmma_workspace says",
          workspace_bytes);
#ifdef NF4_WGMMA
  const Nf4Weight weight =
      weight_of(codes, absmax, quant_map, nested_absmax, nested_quant_map, nested_offset);
  const Nf4Linear linear = {weight, pointer<const void>(bias), pointer<void>(out), static_cast<int>(n)};
  check("linear_wgmma",
        nf4_linear_wgmma(&linear, pointer<const void>(x), static_cast<int>(m), static_cast<int>(k), dtype,
                         pointer<void>(workspace), overlap, pointer<CUstream_st>(stream)));
#endif
}

}  // namespace

void bind_linear_wgmma(py::module_& m) {
  using namespace py::literals;
  m.def("linear_wgmma_workspace", &linear_wgmma_workspace, "m"_a, "n"_a, "k"_a);
  m.def("linear_wgmma", &linear_wgmma, "x"_a, "dtype"_a, "m"_a, "codes"_a, "absmax"_a, "quant_map"_a,
        "nested_absmax"_a, "nested_quant_map"_a, "nested_offset"_a, "n"_a, "k"_a, "bias"_a, "out"_a,
        "workspace"_a, "workspace_bytes"_a, "overlap"_a, "stream"_a);
}
