#include <pybind11/pybind11.h>

PYBIND11_MODULE(_native, m) { m.doc() = "NF4 kernels for the CPU."; }
