#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace nf4 {
namespace {

bool cpu_has(const char* isa) {
#ifdef NF4_X86
  if (strcmp(isa, "avx512") == 0) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") && cpu_has("avx2");
  }
  if (strcmp(isa, "avx2") == 0) {
    // Every CPU with AVX2 has F16C.
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
#endif
  return strcmp(isa, "portable") == 0;
}

const Kernels* const kCompiled[] = {
// best first
#ifdef NF4_X86
    &kernels_avx512,
    &kernels_avx2,
#endif
    &kernels_portable,
};

const Kernels& choose() {
  const char* wanted = getenv("NF4_CPU_ISA");
  for (const Kernels* kernels : kCompiled) {
    if (wanted != nullptr && *wanted != '\0' && strcmp(wanted, kernels->isa) != 0) continue;
    if (cpu_has(kernels->isa)) return *kernels;
  }
  throw std::invalid_argument("NF4_CPU_ISA: expected an instruction set of this build and this CPU (built: " +
                              std::string(compiled_isas()) + "), got '" + wanted + "'");
}

}  // namespace

const Kernels& chosen_kernels() {
  static const Kernels& kernels = choose();
  return kernels;
}

const char* compiled_isas() {
  static const std::string names = [] {
    std::string joined;
    for (const Kernels* kernels : kCompiled)
      joined += (joined.empty() ? "" : " ") + std::string(kernels->isa);
    return joined;
  }();
  return names.c_str();
}

}  // namespace nf4
