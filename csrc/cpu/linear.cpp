// Driver of the fused product y = x W^T for a few rows of x. float32 x takes the float32 kernel (relative
// error of the order 1e-7); 16-bit x takes the integer kernel, whose error, some 1e-4, is far below the
// rounding of a 16-bit result, unless x or the levels hold values that integers cannot stand for.
//
// Rows of W are the tasks, each summed in one order, so the number of threads does not change the result.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include "float_environment.h"
#include "isa.h"
#include "kernels.h"
#include "rounding.h"
#include "thread_pool.h"

namespace nf4 {
namespace {

// Integer kernels sum 8 products in 32 bits: 8 * 16384 * 16000 < 2^31.
constexpr float kLargestLevel = 16384.0f;
constexpr float kLargestX = 16000.0f;
constexpr int kMaxChunk = 128;       // elements, of the kernels' chunks
constexpr int64_t kTaskChunks = 16;  // to rearrange
constexpr int64_t kLineBytes = 64;   // of a cache line
// A task is several groups of rows, as what the last one prefetches is often the other threads' to read; and
// yet tasks are enough for every thread.
constexpr int64_t kTaskBytes = 256 << 10;  // of codes
constexpr int64_t kTasksPerThread = 4;

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

// Elements [begin, begin + count) of a row of x as float32.
void widen(const void* row, Dtype dtype, int64_t begin, int64_t count, float* wide) {
  switch (dtype) {
    case Dtype::float32:
      std::copy_n(static_cast<const float*>(row) + begin, count, wide);
      return;
    case Dtype::bfloat16:
      std::transform(static_cast<const uint16_t*>(row) + begin,
                     static_cast<const uint16_t*>(row) + begin + count, wide, bf16_to_float);
      return;
    case Dtype::float16:
      std::transform(static_cast<const uint16_t*>(row) + begin,
                     static_cast<const uint16_t*>(row) + begin + count, wide, fp16_to_float);
  }
}

float largest_of(const float* values, int64_t n) {
  float largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(values[i]));
  return largest;
}

// Nearest integer of a value within +-2^15; the sum leaves it in its low bits.
int16_t to_i16(float value) { return int16_t(uint16_t(bits_of(value + 0x1.8p23f))); }

// The levels as 16-bit integers, and the value of one unit.
struct IntegerLevels {
  int16_t values[16];
  float unit;
  explicit IntegerLevels(const float* levels) : unit(largest_of(levels, 16) / kLargestLevel) {
    for (int i = 0; i < 16; ++i) values[i] = to_i16(levels[i] / unit);
  }
};

// Returns the value of one unit.
float quantize_x(const float* x, int16_t* integers) {
  const float unit = largest_of(x, kBlock) / kLargestX;
  const float inverse = 1.0f / unit;
  if (!(inverse <= FLT_MAX)) {  // zeros, or as good as zeros: below 2^-114
    std::fill_n(integers, kBlock, int16_t(0));
    return 0.0f;
  }
  for (int64_t i = 0; i < kBlock; ++i) integers[i] = to_i16(x[i] * inverse);
  return unit;
}

// Numbers that begin at a cache line, so that no load of a kernel touches two.
template <typename T>
class Aligned {
 public:
  void resize(int64_t size) { lines_.resize(size_t((size * int64_t(sizeof(T)) + 63) / 64)); }
  T* data() { return reinterpret_cast<T*>(lines_.data()); }
  const T* data() const { return reinterpret_cast<const T*>(lines_.data()); }

 private:
  struct alignas(64) Line {
    char bytes[64];
  };
  std::vector<Line> lines_;
};

// x in the layout of a kernel (see LinearRows), as floats or integers.
class ArrangedX {
 public:
  ArrangedX(const void* x, Dtype dtype, int m, int64_t k, const LinearKernel& kernel, bool integers,
            float level_unit, int threads) {
    const int64_t chunk = kernel.chunk;
    const int64_t num_chunks = (k + chunk - 1) / chunk;
    const int64_t scales_per_chunk = chunk / kBlock * kernel.scale_copies;
    int order[kMaxChunk];
    for (int p = 0; p < chunk; ++p) order[p] = kernel.order(p);
    if (integers) {
      integers_.resize(num_chunks * m * chunk);
      scales_.resize(num_chunks * m * scales_per_chunk);
    } else {
      floats_.resize(num_chunks * m * chunk);
    }
    parallel_for((num_chunks + kTaskChunks - 1) / kTaskChunks, threads, [&](int64_t task) {
      const int64_t end = std::min(num_chunks, (task + 1) * kTaskChunks);
      for (int64_t c = task * kTaskChunks; c < end; ++c) {
        for (int row = 0; row < m; ++row) {
          const int64_t place = c * m + row;
          float wide[kMaxChunk] = {};
          widen(static_cast<const char*>(x) + row * k * dtype_bytes(dtype), dtype, c * chunk,
                std::min(chunk, k - c * chunk), wide);
          if (!integers) {
            float* const to = floats_.data() + place * chunk;
            for (int p = 0; p < chunk; ++p) to[p] = wide[order[p]];
            continue;
          }
          int16_t narrow[kMaxChunk];
          float* scales = scales_.data() + place * scales_per_chunk;
          for (int64_t i = 0; i < chunk; i += kBlock) {
            const float unit = quantize_x(wide + i, narrow + i);
            scales = std::fill_n(scales, kernel.scale_copies, unit * level_unit);
          }
          int16_t* const to = integers_.data() + place * chunk;
          for (int p = 0; p < chunk; ++p) to[p] = narrow[order[p]];
        }
      }
    });
  }

  const void* values() const {
    return integers_.data() ? static_cast<const void*>(integers_.data()) : floats_.data();
  }
  const float* scales() const { return scales_.data(); }

 private:
  Aligned<float> floats_;
  Aligned<int16_t> integers_;
  Aligned<float> scales_;
};

// k is a multiple of 64: rows are whole blocks.
void linear_blocks(const void* x, Dtype x_dtype, int m, const Packed& packed, int64_t n, int64_t k, void* out,
                   Dtype out_dtype, int threads) {
  const Kernels& kernels = chosen_kernels();
  const float largest_level = largest_of(packed.quant_map, 16);
  const bool integers = x_dtype != Dtype::float32 && kernels.linear_i16.run != nullptr && largest_level > 0 &&
                        first_nonfinite(packed.quant_map, Dtype::float32, 16, false, 1) < 0 &&
                        first_nonfinite(x, x_dtype, m * k, false, 1) < 0;
  const LinearKernel& kernel = integers ? kernels.linear_i16 : kernels.linear_f32;
  const IntegerLevels levels(packed.quant_map);
  const ArrangedX arranged(x, x_dtype, m, k, kernel, integers, levels.unit, threads);

  const int64_t num_blocks = k / kBlock;
  const Scales all_scales(packed, n * num_blocks);
  const int64_t chunk_blocks = kernel.chunk / kBlock;
  LinearRows common{};
  common.scale_stride = (num_blocks + chunk_blocks - 1) / chunk_blocks * chunk_blocks;
  common.levels = packed.quant_map;
  common.levels_i16 = levels.values;
  common.x = arranged.values();
  common.x_scales = arranged.scales();
  common.m = m;
  common.num_blocks = num_blocks;
  const auto multiply_group = [&](int64_t begin) {
    LinearRows rows = common;
    rows.num_rows = int(std::min<int64_t>(kGroupRows, n - begin));
    rows.codes = packed.codes + begin * num_blocks * kBlockBytes;
    const int64_t stride = rows.scale_stride, first_block = begin * num_blocks;
    thread_local std::vector<float> scales;
    scales.resize(size_t(kGroupRows * stride));
    if (stride == num_blocks) {
      all_scales.decode(first_block, rows.num_rows * num_blocks, scales.data());
    } else {
      for (int row = 0; row < rows.num_rows; ++row) {
        float* const row_scales = scales.data() + row * stride;
        all_scales.decode(first_block + row * num_blocks, num_blocks, row_scales);
        std::fill(row_scales + num_blocks, row_scales + stride, 0.0f);
      }
    }
    const uint8_t* const next_scales = packed.absmax + first_block + kGroupRows * num_blocks;
    for (int64_t i = 0; i < kGroupRows * num_blocks; i += kLineBytes) __builtin_prefetch(next_scales + i);
    rows.scales = scales.data();
    float y[kMaxRows * kGroupRows];
    rows.y = y;
    kernel.run(rows);
    for (int i = 0; i < m; ++i) {
      for (int row = 0; row < rows.num_rows; ++row) {
        store(out, out_dtype, i * n + begin + row, y[i * kGroupRows + row]);
      }
    }
  };
  const int64_t num_groups = (n + kGroupRows - 1) / kGroupRows;
  const int64_t task_groups =
      std::max<int64_t>(1, std::min(kTaskBytes / (kGroupRows * num_blocks * kBlockBytes),
                                    num_groups / (kTasksPerThread * threads)));
  parallel_for((num_groups + task_groups - 1) / task_groups, threads, [&](int64_t task) {
    const int64_t end = std::min(num_groups, (task + 1) * task_groups);
    for (int64_t group = task * task_groups; group < end; ++group) multiply_group(group * kGroupRows);
  });
}

// Any k: blocks run across rows, so every row is decoded to a buffer first.
void linear_any(const void* x, Dtype x_dtype, int m, const Packed& packed, int64_t n, int64_t k, void* out,
                Dtype out_dtype, int threads) {
  const int64_t stride = (k + 7) / 8 * 8;
  std::vector<float> wide(size_t(m * stride));
  for (int i = 0; i < m; ++i) {
    widen(static_cast<const char*>(x) + i * k * dtype_bytes(x_dtype), x_dtype, 0, k,
          wide.data() + i * stride);
  }
  parallel_for((n + kGroupRows - 1) / kGroupRows, threads, [&](int64_t task) {
    thread_local std::vector<float> weights;
    weights.assign(size_t(stride), 0.0f);
    const int64_t end = std::min(n, (task + 1) * kGroupRows);
    for (int64_t row = task * kGroupRows; row < end; ++row) {
      dequantize(packed, row * k, (row + 1) * k, weights.data(), Dtype::float32, 1);
      for (int i = 0; i < m; ++i) {
        float lanes[8] = {};
        for (int64_t j = 0; j < stride; j += 8) {
          for (int64_t lane = 0; lane < 8; ++lane) {
            lanes[lane] += weights[size_t(j + lane)] * wide[size_t(i * stride + j + lane)];
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
  const auto product = k % kBlock == 0 ? linear_blocks : linear_any;
  product(x, x_dtype, m, packed, n, k, out, out_dtype, threads);
}

}  // namespace nf4
