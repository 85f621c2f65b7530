// AdamW over pages and the norm of gradients, bound to Python.
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "bindings.h"
#include "launchers.h"

namespace py = pybind11;

namespace {

using Setting = std::array<double, 6>;  // lr, beta1, beta2, eps, weight_decay, step

// What both kernels take, checked: chunks, pages and settings as the launchers want them.
struct Sweep {
  std::vector<void*> pages;
  std::vector<Nf4AdamwSetting> settings;

  Sweep(int64_t num_chunks, const std::vector<uintptr_t>& addresses, const std::vector<Setting>& given) {
    require(num_chunks >= 0, "num_chunks", "at least 0", num_chunks);
    require(addresses.size() <= NF4_MOST_PAGES, "pages", "at most 256",
            static_cast<int64_t>(addresses.size()));
    require(!given.empty(), "settings", "at least one", 0);
    for (const Setting& s : given) {
      const int64_t step = static_cast<int64_t>(s[5]);
      require(step >= 1, "step", "at least 1", step);
      settings.push_back({s[0], s[1], s[2], s[3], s[4], step});
    }
    for (const uintptr_t page : addresses) pages.push_back(pointer<void>(page));
  }
};

void adamw(uintptr_t chunks, int64_t num_chunks, int first_page, const std::vector<uintptr_t>& pages,
           int64_t page_elements, const std::vector<Setting>& settings, uintptr_t gradient_factor,
           uintptr_t stream) {
  const Sweep sweep(num_chunks, pages, settings);
  check("adamw", nf4_adamw(pointer<const Nf4AdamwChunk>(chunks), num_chunks, first_page,
                           static_cast<int>(sweep.pages.size()), sweep.pages.data(), page_elements,
                           sweep.settings.data(), static_cast<int>(sweep.settings.size()),
                           pointer<const float>(gradient_factor), pointer<CUstream_st>(stream)));
}

void adamw_8bit(uintptr_t chunks, int64_t num_chunks, int first_page, const std::vector<uintptr_t>& pages,
                int64_t page_elements, const std::vector<Setting>& settings, uintptr_t gradient_factor,
                uintptr_t tables, uintptr_t stream) {
  const Sweep sweep(num_chunks, pages, settings);
  require(page_elements >= 0 && page_elements % 256 == 0, "page_elements", "a multiple of 256",
          page_elements);
  for (const uintptr_t page : pages) {
    require(page % 8 == 0, "page", "an address that 8 divides", static_cast<int64_t>(page));
  }
  check("adamw_8bit", nf4_adamw_8bit(pointer<const Nf4AdamwChunk>(chunks), num_chunks, first_page,
                                     static_cast<int>(sweep.pages.size()), sweep.pages.data(), page_elements,
                                     sweep.settings.data(), static_cast<int>(sweep.settings.size()),
                                     pointer<const float>(gradient_factor), pointer<const float>(tables),
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
  m.def("adamw_8bit", &adamw_8bit, "chunks"_a, "num_chunks"_a, "first_page"_a, "pages"_a, "page_elements"_a,
        "settings"_a, "gradient_factor"_a, "tables"_a, "stream"_a);
  m.def("gradient_norm", &gradient_norm, "chunks"_a, "num_chunks"_a, "sums_of_squares"_a, "norm"_a,
        "stream"_a);
  m.attr("ADAMW_PAGES") = NF4_MOST_PAGES;
}
