// Driver of the fused product y = x W^T for a few rows of x. float32 x takes the float32 kernel (relative
// error of the order 1e-7); 16-bit x takes the integer kernel, whose error, some 1e-4, is far below the
// rounding of a 16-bit result, unless x or the levels hold values that integers cannot stand for.
//
// Rows of W are the tasks, each summed in one order, so the number of threads does not change the result.
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "float_environment.h"
#include "isa.h"
#include "kernels.h"
#include "rounding.h"
#include "thread_pool.h"

namespace nf4 {
namespace {

constexpr int64_t kTaskRows = 32;
constexpr float kLargestLevel = 16384.0f;
constexpr float kLargestX = 16000.0f;

float load(const void* values, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::bfloat16:
      return bf16_to_float(static_cast<const uint16_t*>(values)[i]);
    case Dtype::float16:
      return fp16_to_float(static_cast<const uint16_t*>(values)[i]);
    default:
      return static_cast<const float*>(values)[i];
  }
}

void store(void* values, Dtype dtype, int64_t i, float value) {
  switch (dtype) {
    case Dtype::bfloat16:
      static_cast<uint16_t*>(values)[i] = float_to_bf16(value);
      return;
    case Dtype::float16:
      static_cast<uint16_t*>(values)[i] = float_to_fp16(value);
      return;
    default:
      static_cast<float*>(values)[i] = value;
  }
}

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// x as float32 [m, stride], zeros after column k.
std::vector<float> widen(const void* x, Dtype dtype, int m, int64_t k, int64_t stride) {
  std::vector<float> wide(size_t(m * stride));
  for (int row = 0; row < m; ++row) {
    for (int64_t i = 0; i < k; ++i) wide[size_t(row * stride + i)] = load(x, dtype, row * k + i);
  }
  return wide;
}

// Puts the elements of every chunk in the kernel's order.
template <typename T>
std::vector<T> rearrange(const std::vector<T>& values, const LinearKernel& kernel) {
  std::vector<T> arranged(values.size());
  std::vector<int> order(size_t(kernel.chunk));
  for (int p = 0; p < kernel.chunk; ++p) order[size_t(p)] = kernel.order(p);
  for (size_t begin = 0; begin < values.size(); begin += order.size()) {
    for (size_t p = 0; p < order.size(); ++p) arranged[begin + p] = values[begin + size_t(order[p])];
  }
  return arranged;
}

float largest_of(const float* values, int64_t n) {
  float largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(values[i]));
  return largest;
}

bool all_finite(const float* values, int64_t n) {
  return first_nonfinite(values, Dtype::float32, n, false, 1) < 0;
}

// The levels as 16-bit integers and the value of one unit.
struct IntegerLevels {
  int16_t values[16];
  float unit;
  explicit IntegerLevels(const float* levels) : unit(largest_of(levels, 16) / kLargestLevel) {
    for (int i = 0; i < 16; ++i) values[i] = int16_t(std::lrint(levels[i] / unit));
  }
};

// x as 16-bit integers with a scale for each 64 elements.
struct IntegerRows {
  std::vector<int16_t> values;
  std::vector<float> scales;  // [m, stride / 64]
  IntegerRows(const std::vector<float>& x, float unit) : values(x.size()), scales(x.size() / kBlock) {
    for (size_t block = 0; block < scales.size(); ++block) {
      const float* const from = x.data() + block * kBlock;
      const float scale = largest_of(from, kBlock) / kLargestX;
      const float inverse = 1.0f / scale;
      scales[block] = scale * unit;
      if (!std::isfinite(inverse)) {  // all below 2^-114, or zero
        scales[block] = 0;
        continue;
      }
      for (int64_t i = 0; i < kBlock; ++i) {
        values[block * kBlock + size_t(i)] = int16_t(std::lrint(from[i] * inverse));
      }
    }
  }
};

// k is a multiple of 64: rows are whole blocks.
void linear_blocks(const std::vector<float>& wide, bool integers, int m, const Packed& packed, int64_t n,
                   int64_t k, void* out, Dtype out_dtype, int threads) {
  const Kernels& kernels = chosen_kernels();
  const LinearKernel& kernel = integers ? kernels.linear_i16 : kernels.linear_f32;
  const int64_t num_blocks = k / kBlock;
  LinearRows common{};
  common.levels = packed.quant_map;
  common.m = m;
  common.num_blocks = num_blocks;
  common.x_stride = int64_t(wide.size()) / m;
  common.scale_stride = common.x_stride / kBlock;
  common.y_stride = kTaskRows;

  std::unique_ptr<IntegerLevels> levels;
  std::unique_ptr<IntegerRows> rows;
  std::vector<int16_t> x_i16;
  std::vector<float> x_f32;
  if (integers) {
    levels = std::make_unique<IntegerLevels>(packed.quant_map);
    rows = std::make_unique<IntegerRows>(wide, levels->unit);
    x_i16 = rearrange(rows->values, kernel);
    common.x = x_i16.data();
    common.levels_i16 = levels->values;
    common.x_scales = rows->scales.data();
  } else {
    x_f32 = rearrange(wide, kernel);
    common.x = x_f32.data();
  }

  const int64_t num_tasks = (n + kTaskRows - 1) / kTaskRows;
  parallel_for(num_tasks, threads, [&](int64_t task) {
    const int64_t begin = task * kTaskRows;
    LinearRows part = common;
    part.num_rows = std::min(kTaskRows, n - begin);
    part.codes = packed.codes + begin * num_blocks * kBlockBytes;
    thread_local std::vector<float> scales;
    scales.assign(size_t(part.num_rows * part.scale_stride), 0.0f);
    for (int64_t row = 0; row < part.num_rows; ++row) {
      decode_scales(packed, (begin + row) * num_blocks, num_blocks, scales.data() + row * part.scale_stride);
    }
    part.scales = scales.data();
    float y[kMaxRows * kTaskRows];
    part.y = y;
    kernel.run(part);
    for (int i = 0; i < m; ++i) {
      for (int64_t row = 0; row < part.num_rows; ++row) {
        store(out, out_dtype, i * n + begin + row, y[i * kTaskRows + row]);
      }
    }
  });
}

// Any k: blocks run across rows, so every row is decoded to a buffer first.
void linear_any(const std::vector<float>& x, int m, const Packed& packed, int64_t n, int64_t k, void* out,
                Dtype out_dtype, int threads) {
  const int64_t stride = int64_t(x.size()) / m;
  parallel_for((n + kTaskRows - 1) / kTaskRows, threads, [&](int64_t task) {
    thread_local std::vector<float> weights;
    weights.assign(size_t(stride), 0.0f);
    const int64_t end = std::min(n, (task + 1) * kTaskRows);
    for (int64_t row = task * kTaskRows; row < end; ++row) {
      dequantize(packed, row * k, (row + 1) * k, weights.data(), Dtype::float32, 1);
      for (int i = 0; i < m; ++i) {
        float lanes[8] = {};
        for (int64_t j = 0; j < stride; j += 8) {
          for (int64_t lane = 0; lane < 8; ++lane) {
            lanes[lane] += weights[size_t(j + lane)] * x[size_t(i * stride + j + lane)];
          }
        }
        const float sum =
            ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
        store(out, out_dtype, i * n + row, sum);
      }
    }
  });
}

}  // namespace

void linear(const void* x, Dtype x_dtype, int m, const Packed& packed, int64_t n, int64_t k, void* out,
            Dtype out_dtype, int threads) {
  const DefaultFloatEnvironment environment;
  const Kernels& kernels = chosen_kernels();
  if (k % kBlock != 0) {
    return linear_any(widen(x, x_dtype, m, k, round_up(k, 8)), m, packed, n, k, out, out_dtype, threads);
  }
  const bool integers = x_dtype != Dtype::float32 && kernels.linear_i16.run != nullptr &&
                        largest_of(packed.quant_map, 16) > 0 && all_finite(packed.quant_map, 16) &&
                        first_nonfinite(x, x_dtype, m * k, false, 1) < 0;
  const int chunk = integers ? kernels.linear_i16.chunk : kernels.linear_f32.chunk;
  linear_blocks(widen(x, x_dtype, m, k, round_up(k, chunk)), integers, m, packed, n, k, out, out_dtype,
                threads);
}

}  // namespace nf4
