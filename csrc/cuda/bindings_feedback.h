// The classes of nf4format._cuda_encode that are bound in a file of their own.
#pragma once

#include <pybind11/pybind11.h>

// Adds Feedback. CudaFailure becomes the module's CudaError.
void bind_feedback(pybind11::module_& m);
