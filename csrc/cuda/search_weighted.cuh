// Scales for weighted errors, for one thread and one block: the bits of csrc/cpu/search_weighted.cpp. See
// encode.cuh, whose search this is with squared distances times what they matter.
#pragma once

#include "feedback.cuh"

namespace nf4 {

constexpr int kLanes = 16;            // in which squares are added up
constexpr float kAboveZero = 1e-30f;  // added to errors: none times infinity is a NaN

struct SearchArguments {
  const float* values;   // [blocks of 64], zeros from n on; 16-byte aligned
  const float* weights;  // [period]
  uint8_t* absmax;       // [blocks]
  float* nested_absmax;  // [groups]
  int64_t n, period;
};

// What the errors of a block's values count; nothing past the end.
NF4_DEVICE void load_weights(const SearchArguments& a, int64_t block, float* weights) {
  const int64_t first = block * kBlock;
  int64_t column = first % a.period;
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    weights[i] = first + i < a.n ? a.weights[column] : 0.0f;
    column = column + 1 == a.period ? 0 : column + 1;
  }
}

// Distance of y from the nearest level.
template <bool has_bins>
NF4_DEVICE int distance_of(const EncodeTables& tables, int sign, int y) {
  if (has_bins) {
    const uint32_t bin = tables.bins[sign][(y >> kBinShift) & (kBins - 1)];
    return distance_plus(y, static_cast<int>(bin) >> 16, static_cast<int16_t>(bin & 0xffffu));
  }
  return distance_in_pairs(tables.pairs[sign], y);
}

// `sign`, `magnitude`: of the scale's inverse.
template <bool has_bins>
NF4_DEVICE float weighted_error(const EncodeTables& tables, const int* x, const float* weights, int sign,
                                int magnitude) {
  float lanes[kLanes];
#pragma unroll
  for (int i = 0; i < kLanes; ++i) lanes[i] = 0.0f;
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    const int y = (x[i] * magnitude + (1 << 14)) >> 15;
    const auto distance = static_cast<float>(distance_of<has_bins>(tables, sign, y));
    lanes[i % kLanes] = added(lanes[i % kLanes], multiplied(multiplied(distance, distance), weights[i]));
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) lanes[i] = added(lanes[i], lanes[i + 8]);
#pragma unroll
  for (int i = 0; i < 4; ++i) lanes[i] = added(lanes[i], lanes[i + 4]);
  lanes[0] = added(added(lanes[0], lanes[2]), added(lanes[1], lanes[3]));
  return lanes[0];
}

// absmax times the best multiplier and sign, the first of equally good ones; 0 if every error is infinite.
template <bool has_bins>
NF4_DEVICE float best_weighted_scale(const FeedbackTables& tables, const int* x, const float* weights,
                                     float absmax) {
  float least = from_bits(kInfinityBits), scale = 0.0f;
#pragma unroll 1
  for (int candidate = 0; candidate < 2 * kMultipliers; ++candidate) {
    const int sign = candidate >= kMultipliers;
    const int i = sign ? candidate - kMultipliers : candidate;
    const float multiplier = tables.multipliers[i];
    const float sum = weighted_error<has_bins>(tables.encode, x, weights, sign, tables.inverses[i]);
    const float error = multiplied(sum, multiplied(multiplier, multiplier));
    if (!(error < least)) continue;
    least = error;
    const float wanted = multiplied(absmax, multiplier);
    const float magnitude = wanted < kLargest ? wanted : kLargest;
    scale = sign ? -magnitude : magnitude;
  }
  return scale;
}

// The best of the three entries of the map next to a scale.
template <bool has_bins>
NF4_DEVICE int best_weighted_entry(const EncodeTables& tables, const int* x, const float* weights,
                                   float absmax, float nested_absmax, float scale) {
  const float relative = multiplied(scale, limited(divided(1.0f, nested_absmax)));
  int nearest = 0;  // midpoints below
#pragma unroll
  for (int step = 128; step > 0; step /= 2) {
    if (relative > tables.midpoints[nearest + step - 1]) nearest += step;
  }
  float least = from_bits(kInfinityBits);
  int best = nearest;
#pragma unroll 1
  for (int tried = 0; tried < 3; ++tried) {
    const int lower = nearest - (nearest > 0), upper = nearest + (nearest < 255);
    const int entry = tried == 0 ? nearest : tried == 1 ? lower : upper;
    const float ratio = divided(absmax, multiplied(tables.nested_map[entry], nested_absmax));
    const float fixed = multiplied(ratio, static_cast<float>(kUnit));
    // Not if it is NaN: scales that are zero, or so small that values lie far outside of the levels.
    const bool compared = (fixed < 0.0f ? -fixed : fixed) <= static_cast<float>(kLargestInverse);
    const int inverse = nearest_integer(compared ? fixed : 0.0f);
    const float factor = compared ? divided(1.0f, multiplied(ratio, ratio)) : from_bits(kInfinityBits);
    const float sum =
        weighted_error<has_bins>(tables, x, weights, inverse < 0, inverse < 0 ? -inverse : inverse);
    const float error = multiplied(added(sum, kAboveZero), factor);
    if (!(error < least)) continue;
    least = error;
    best = entry;
  }
  return best;
}

}  // namespace nf4
