// Kernels of -O2 and -O3, one thread a row (feedback.cuh) or a block (search_weighted.cuh). All pointers are
// the device's.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../cpu/kernels.h"

namespace nf4 {

struct FeedbackTables;
struct CarryArguments;
struct DescendArguments;
struct SearchArguments;

cudaError_t search_weighted(const FeedbackTables* tables, bool has_bins, const SearchArguments& arguments,
                            cudaStream_t stream);
cudaError_t carry_errors(const FeedbackTables* tables, const CarryArguments& arguments, cudaStream_t stream);
cudaError_t descend_block(const FeedbackTables* tables, const DescendArguments& arguments,
                          cudaStream_t stream);

}  // namespace nf4
