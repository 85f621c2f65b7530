// Scales for weighted errors: the search of search.h with squared distances times what they matter, in
// float32 and in 16 lanes. Plain loops: whoever knows such weights spends far more time elsewhere.
#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "float_environment.h"
#include "rounding.h"
#include "search.h"
#include "search_grid.h"
#include "thread_pool.h"

namespace nf4 {
namespace {

constexpr int kLanes = 16;
constexpr float kAboveZero = 1e-30f;  // so that no error times infinity is a NaN

template <bool has_bins>
float error_with(const FixedLevels& levels, const int32_t* x, const float* weights, int32_t inverse) {
  float lanes[kLanes] = {};
  for (int64_t begin = 0; begin < kBlock; begin += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const int32_t y = (x[begin + i] * inverse + (1 << 14)) >> 15;
      const float distance = float(distance_from_level<has_bins>(levels, y));
      lanes[i] += distance * distance * weights[begin + i];
    }
  }
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// `inverse`: of the scale, with its sign.
float error_of(const SearchTables& tables, const int32_t* x, const float* weights, int32_t inverse) {
  const FixedLevels& levels = inverse < 0 ? tables.minus : tables.plus;
  const int32_t magnitude = std::abs(inverse);
  return tables.has_bins ? error_with<true>(levels, x, weights, magnitude)
                         : error_with<false>(levels, x, weights, magnitude);
}

// One block: values and weights, zeros past the end.
struct Block {
  int32_t x[kBlock];
  float weights[kBlock];

  // Returns the largest magnitude.
  float load(const float* values, int64_t n, const float* all_weights, int64_t period, int64_t first) {
    float largest = 0;
    for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(values[first + i]));
    const float factor = limited_inverse(32767.0f, largest);
    for (int64_t i = 0, column = first % period; i < kBlock; ++i) {
      x[i] = i < n ? int32_t(bits_of(values[first + i] * factor + kMagic) - bits_of(kMagic)) : 0;
      weights[i] = i < n ? all_weights[column] : 0.0f;
      column = column + 1 == period ? 0 : column + 1;
    }
    return largest;
  }
};

}  // namespace

void scale_search(const float* levels, const float* thresholds, const float* values, int64_t n,
                  const float* weights, int64_t period, uint8_t* absmax, float* nested_absmax, int threads) {
  const DefaultFloatEnvironment environment;
  const SearchTables tables = search_tables(levels, thresholds);
  const int64_t num_blocks = (n + kBlock - 1) / kBlock;
  parallel_for((num_blocks + kNestedBlock - 1) / kNestedBlock, threads, [&](int64_t group) {
    const int64_t first = group * kNestedBlock, count = std::min(kNestedBlock, num_blocks - first);
    float magnitudes[kNestedBlock], scales[kNestedBlock];
    const auto load = [&](Block& block, int64_t i) {
      const int64_t begin = (first + i) * kBlock;
      return block.load(values, std::min(kBlock, n - begin), weights, period, begin);
    };
    Block block;
    for (int64_t i = 0; i < count; ++i) {
      magnitudes[i] = load(block, i);
      scales[i] = 0;
      float least = INFINITY;
      for (int candidate = 0; candidate < 2 * kMultipliers; ++candidate) {
        const bool minus = candidate >= kMultipliers;
        const int index = minus ? candidate - kMultipliers : candidate;
        const float multiplier = nominal_multiplier(index);
        const int32_t magnitude = int32_t(std::nearbyint(kUnit / double(multiplier)));
        const int32_t inverse = minus ? -magnitude : magnitude;
        const float error = error_of(tables, block.x, block.weights, inverse) * (multiplier * multiplier);
        if (!(error < least)) continue;
        least = error;
        scales[i] = scale_of(multiplier, minus, magnitudes[i]);
      }
    }
    using Entries = Grid<1>;
    Entries grid;
    nested_absmax[group] = largest_magnitude_of(scales, count, 1);
    grid.fill(magnitudes, scales, count, nested_absmax[group]);
    for (int64_t i = 0; i < count; ++i) {
      load(block, i);
      for (int64_t at = i * Entries::kTried; at < (i + 1) * Entries::kTried; ++at) {
        grid.errors[at] = error_of(tables, block.x, block.weights, grid.inverses[at]) + kAboveZero;
      }
    }
    float errors[kNestedBlock];
    grid.choose(count, absmax + first, scales, errors);
  });
}

}  // namespace nf4
