// AdamW over pages and the norm of gradients, bound to Python.
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "bindings.h"
#include "launchers.h"

namespace py = pybind11;

namespace {

using Setting = std::array<double, 6>;  // lr, beta1, beta2, eps, weight_decay, step

void adamw(uintptr_t chunks, int64_t num_chunks, int first_page, const std::vector<uintptr_t>& pages,
           int64_t page_elements, const std::vector<Setting>& settings, uintptr_t gradient_factor,
           uintptr_t stream) {
  require(num_chunks >= 0, "num_chunks", "at least 0", num_chunks);
  require(pages.size() <= NF4_MOST_PAGES, "pages", "at most 256", static_cast<int64_t>(pages.size()));
  require(!settings.empty(), "settings", "at least one", 0);
  std::vector<Nf4AdamwSetting> given;
  for (const Setting& s : settings) {
    const int64_t step = static_cast<int64_t>(s[5]);
    require(step >= 1, "step", "at least 1", step);
    given.push_back({s[0], s[1], s[2], s[3], s[4], step});
  }
  std::vector<void*> addresses;
  for (const uintptr_t page : pages) addresses.push_back(pointer<void>(page));
  check("adamw", nf4_adamw(pointer<const Nf4AdamwChunk>(chunks), num_chunks, first_page,
                           static_cast<int>(addresses.size()), addresses.data(), page_elements, given.data(),
                           static_cast<int>(given.size()), pointer<const float>(gradient_factor),
                           pointer<CUstream_st>(stream)));
}

void gradient_norm(uintptr_t chunks, int64_t num_chunks, uintptr_t sums_of_squares, uintptr_t norm,
                   uintptr_t stream) {
  require(num_chunks >= 0, "num_chunks", "at least 0", num_chunks);
  check("gradient_norm", nf4_gradient_norm(pointer<const Nf4GradientChunk>(chunks), num_chunks,
                                           pointer<float>(sums_of_squares), pointer<float>(norm),
                                           pointer<CUstream_st>(stream)));
}

}  // namespace

static_assert(sizeof(Nf4AdamwChunk) == 32 && sizeof(Nf4GradientChunk) == 16,
              "as nf4/paging/fused_adamw.py packs them");

void bind_adamw(py::module_& m) {
  using namespace py::literals;
  m.def("adamw", &adamw, "chunks"_a, "num_chunks"_a, "first_page"_a, "pages"_a, "page_elements"_a,
        "settings"_a, "gradient_factor"_a, "stream"_a);
  m.def("gradient_norm", &gradient_norm, "chunks"_a, "num_chunks"_a, "sums_of_squares"_a, "norm"_a,
        "stream"_a);
  m.attr("ADAMW_PAGES") = NF4_MOST_PAGES;
}
