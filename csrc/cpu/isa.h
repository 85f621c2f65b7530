// Which instruction set runs.
#pragma once

#include "kernels.h"

namespace nf4 {

// The best that was compiled in and that this CPU has; NF4_CPU_ISA=portable|avx2|avx512 overrides (for
// tests), read at the first call. Throws std::invalid_argument if the override names one that cannot run.
const Kernels& chosen_kernels();

// Names of the instruction sets compiled in, separated by spaces.
const char* compiled_isas();

}  // namespace nf4
