// csrc/cuda/feedback.cuh and search_weighted.cuh on the CPU: loops over threads in place of the kernels of
// csrc/cuda/feedback.cu. Functions have the arguments of nf4format._cuda_encode.Feedback, with tables in
// front.
#include <vector>

#include "../../csrc/cuda/feedback.cuh"
#include "../../csrc/cuda/search_weighted.cuh"

using namespace nf4;

namespace {

FeedbackTables tables_of(const float* levels, const float* thresholds) {
  return feedback_tables(search_tables(levels, thresholds));
}

template <bool has_bins>
void search_group(const FeedbackTables& tables, const SearchArguments& a, int64_t first, int64_t count) {
  std::vector<int> x(count * kBlock);
  std::vector<float> absmax(count), scales(count), weights(count * kBlock);
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const void* const block = block_at(a.values, Dtype::float32, first + i);
    absmax[i] = from_bits(largest_bits(block, Dtype::float32));
    load_fixed(block, Dtype::float32, absmax[i], &x[i * kBlock]);
    load_weights(a, first + i, &weights[i * kBlock]);
    scales[i] = best_weighted_scale<has_bins>(tables, &x[i * kBlock], &weights[i * kBlock], absmax[i]);
    const uint32_t magnitude = bits(scales[i]) & 0x7fffffffu;
    if (magnitude > largest) largest = magnitude;
  }
  a.nested_absmax[first / kNestedBlock] = from_bits(largest);
  for (int64_t i = 0; i < count; ++i) {
    a.absmax[first + i] = uint8_t(best_weighted_entry<has_bins>(
        tables.encode, &x[i * kBlock], &weights[i * kBlock], absmax[i], from_bits(largest), scales[i]));
  }
}

}  // namespace

extern "C" void search(const float* levels, const float* thresholds, const float* values, int64_t n,
                       const float* weights, int64_t period, uint8_t* absmax, float* nested_absmax) {
  const FeedbackTables tables = tables_of(levels, thresholds);
  const bool has_bins = search_tables(levels, thresholds).has_bins;
  const SearchArguments arguments{values, weights, absmax, nested_absmax, n, period};
  const int64_t num_blocks = (n + kBlock - 1) / kBlock;
  for (int64_t first = 0; first < num_blocks; first += kNestedBlock) {
    const int64_t count = num_blocks - first < kNestedBlock ? num_blocks - first : kNestedBlock;
    (has_bins ? search_group<true> : search_group<false>)(tables, arguments, first, count);
  }
}

extern "C" void carry(const float* levels, const float* thresholds, const float* weight, const float* rest,
                      const float* factor, const int64_t* order, const float* scales, uint8_t* codes,
                      float* residual, float* errors, int64_t n, int64_t factor_stride, int width,
                      int scale_shift) {
  const FeedbackTables tables = tables_of(levels, thresholds);
  const CarryArguments arguments{weight,   rest,   factor, order,         scales, codes,
                                 residual, errors, n,      factor_stride, width,  scale_shift};
  std::vector<float> near(kCarried * kCarried);
  for (int i = 0; i < width; ++i) {
    for (int j = i; j < width; ++j) near[i * kCarried + j] = factor[i * factor_stride + j];
  }
  for (int64_t row = 0; row < n; ++row) carry_row(OneThread(), tables, arguments, near.data(), row);
}

extern "C" void descend(const float* levels, const float* thresholds, const float* weight, const float* slope,
                        const float* moment, const float* nested, uint8_t* entries, float* scales,
                        uint8_t* codes, float* residual, float* change, int64_t n, int64_t moment_stride,
                        int width) {
  const FeedbackTables tables = tables_of(levels, thresholds);
  const DescendArguments arguments{weight, slope,    moment, nested, entries,       scales,
                                   codes,  residual, change, n,      moment_stride, width};
  std::vector<float> local(kBlock * kBlock);
  for (int i = 0; i < width; ++i) {
    for (int j = 0; j < width; ++j) local[i * kBlock + j] = moment[i * moment_stride + j];
  }
  for (int64_t row = 0; row < n; ++row) descend_row(OneThread(), tables, arguments, local.data(), row);
}
