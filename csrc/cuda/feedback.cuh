// The steps of -O2 and -O3 that go one column after another (compiler/qcompile/feedback.py), for one row of
// the weight; what lies between them are products of matrices, which are others' work. Matrices are [columns,
// n], features first.
//
// A row's steps depend on each other, some 350 cycles from one column to the next (two divisions, four reads
// that look the code up, a shuffle), and there are a few thousand rows only: latency decides. So a few
// threads share a row: each keeps columns `lane`, `lane + size` ... in registers, all find the same code for
// the column at hand, and each corrects its own columns behind it. What a column adds up comes in the order
// of the columns, whatever the number of threads.
//
// One rounding for each operation, in the order of the numpy code, without contraction: what is carried
// within a panel has its bits. Compiled for the host too, with one thread for a row, see encode.cuh.
#pragma once

#include "encode.cuh"

namespace nf4 {

constexpr int kCarried = 128;    // columns at a time whose errors are carried to each other
constexpr int kZeroEntry = 127;  // of kNestedMap: a scale of zero

struct FeedbackTables {
  EncodeTables encode;
  float levels[16];
  float multipliers[16];  // of the weighted search: 0.70, 0.75 ...
  int inverses[16];       // of them, in units of 1 / kUnit
};

FeedbackTables feedback_tables(const SearchTables& tables);

// Columns [begin, begin + width) in the order in which they are rounded.
struct CarryArguments {
  const float* weight;   // [k, n], columns as in the weight
  const float* rest;     // [width, n]: what is to be rounded
  const float* factor;   // [width, factor_stride]: the inverse's, from row and column `begin`
  const int64_t* order;  // [width]: of each, its column in the weight
  const float* scales;   // of column c: row c >> scale_shift of [.., n]
  uint8_t* codes;        // [k, n]
  float* residual;       // [k, n]: weight minus what codes decode to
  float* errors;         // [width, n]
  int64_t n, factor_stride;
  int width, scale_shift;
};

// Columns of the weight, one block of each row if blocks are whole.
struct DescendArguments {
  const float* weight;  // [width, n]
  const float* slope;   // [width, n]: minus half the gradient of the cost
  const float* moment;  // [width, moment_stride]: H, from the first column's row and column
  const float* nested;  // [n], or null: scales stay
  uint8_t* entries;     // [n] of kNestedMap, if there is `nested`
  float* scales;        // [n]; without `nested` [width, n]
  uint8_t* codes;       // [width, n]
  float* residual;      // [width, n]: weight minus what codes decode to
  float* change;        // [width, n]: of what they decode to
  int64_t n, moment_stride;
  int width;
};

#ifdef __CUDACC__
NF4_DEVICE float subtracted(float a, float b) { return __fsub_rn(a, b); }
#else
NF4_DEVICE float subtracted(float a, float b) { return a - b; }
#endif

#ifndef __CUDACC__
// A row's threads where there is one.
struct OneThread {
  static constexpr int kSize = 1;
  int lane() const { return 0; }
  float of(float value, int) const { return value; }
  void meet() const {}
};
#endif

// The nearest code, and what it decodes to.
NF4_DEVICE uint8_t nearest_code(const FeedbackTables& tables, float value, float scale, float* decoded) {
  const uint32_t code = code_of(tables.encode, scale == 0.0f ? 0.0f : divided(value, scale));
  *decoded = multiplied(tables.levels[code], scale);
  return static_cast<uint8_t>(code);
}

// Rounds a row's columns, each one's error carried to those behind it.
// `factor` [width, kCarried]: a copy that is near.
template <typename Group>
NF4_DEVICE void carry_row(const Group& group, const FeedbackTables& tables, const CarryArguments& a,
                          const float* factor, int64_t row) {
  constexpr int kEach = kCarried / Group::kSize;
  float values[kEach], scales[kEach], weights[kEach];
#pragma unroll
  for (int m = 0; m < kEach; ++m) {
    const int i = m * Group::kSize + group.lane();
    const int64_t column = i < a.width ? a.order[i] : 0;
    values[m] = i < a.width ? a.rest[i * a.n + row] : 0.0f;
    scales[m] = a.scales[(column >> a.scale_shift) * a.n + row];
    weights[m] = a.weight[column * a.n + row];
  }
#pragma unroll
  for (int m = 0; m < kEach; ++m) {
#pragma unroll 1
    for (int lane = 0; lane < Group::kSize; ++lane) {
      const int i = m * Group::kSize + lane;
      if (i >= a.width) return;
      const float value = group.of(values[m], lane);
      const float* const from = factor + i * kCarried;
      float decoded;
      const uint8_t code = nearest_code(tables, value, group.of(scales[m], lane), &decoded);
      const float error = divided(subtracted(value, decoded), from[i]);
      if (group.lane() == lane) {
        const int64_t at = a.order[i] * a.n + row;
        a.codes[at] = code;
        a.residual[at] = subtracted(weights[m], decoded);
        a.errors[i * a.n + row] = error;
      }
#pragma unroll
      for (int later = m; later < kEach; ++later) {  // of columns up to i, nothing is read any more
        const float by = multiplied(from[later * Group::kSize + group.lane()], error);
        values[later] = subtracted(values[later], by);
      }
    }
  }
}

// The entry of kNestedMap next to the scale that lowers the cost of a row's block most, or the one that it
// has; in `moved` how far the scale goes with it. `curvature`, `pull`: of the cost along the scale, and minus
// half its slope.
NF4_DEVICE int refitted_entry(const FeedbackTables& tables, float curvature, float pull, float nested,
                              float scale, int entry_now, float* moved) {
  const float wanted = curvature > 0.0f ? added(scale, divided(pull, curvature)) : scale;
  const float relative = nested > 0.0f ? divided(wanted, nested) : 0.0f;
  int entry = 0;  // midpoints below
  for (int half = 128; half > 0; half /= 2) {
    if (relative > tables.encode.midpoints[entry + half - 1]) entry += half;
  }
  const float distance = subtracted(multiplied(tables.encode.nested_map[entry], nested), scale);
  const float by = multiplied(distance, subtracted(multiplied(distance, curvature), multiplied(2.0f, pull)));
  const bool better = by < 0.0f && entry != kZeroEntry;
  *moved = better ? distance : 0.0f;
  return better ? entry : entry_now;
}

// Moves the scale of a row's block, then its codes one by one, wherever that lowers the cost.
// `local` [width, kBlock]: a copy of H that is near; up to kBlock its rows hold zeros.
template <typename Group>
NF4_DEVICE void descend_row(const Group& group, const FeedbackTables& tables, const DescendArguments& a,
                            const float* local, int64_t row) {
  constexpr int kEach = kBlock / Group::kSize;
  const bool refits = a.nested != nullptr;
  const int own = group.lane();
  float slopes[kEach], units[kEach], before[kEach], scales[kEach], weights[kEach];
#pragma unroll
  for (int m = 0; m < kEach; ++m) {
    const int i = m * Group::kSize + own;
    const int64_t at = i * a.n + row;
    const bool is_here = i < a.width;
    slopes[m] = is_here ? a.slope[at] : 0.0f;
    weights[m] = is_here ? a.weight[at] : 0.0f;
    units[m] = is_here ? tables.levels[a.codes[at]] : 0.0f;
    scales[m] = refits ? a.scales[row] : is_here ? a.scales[at] : 0.0f;
    before[m] = multiplied(units[m], scales[m]);
  }
  if (refits) {
    float products[kEach] = {};  // H times units
#pragma unroll
    for (int m = 0; m < kEach; ++m) {
#pragma unroll 1
      for (int lane = 0; lane < Group::kSize && m * Group::kSize + lane < a.width; ++lane) {
        const float unit = group.of(units[m], lane);
        const float* const from = local + (m * Group::kSize + lane) * kBlock + own;
#pragma unroll
        for (int other = 0; other < kEach; ++other)
          products[other] = added(products[other], multiplied(from[other * Group::kSize], unit));
      }
    }
    float curvature = 0.0f, pull = 0.0f;
#pragma unroll
    for (int m = 0; m < kEach; ++m) {
      const float bent = multiplied(units[m], products[m]), pulled = multiplied(units[m], slopes[m]);
#pragma unroll
      for (int lane = 0; lane < Group::kSize; ++lane) {
        curvature = added(curvature, group.of(bent, lane));
        pull = added(pull, group.of(pulled, lane));
      }
    }
    float moved;
    const int entry =
        refitted_entry(tables, curvature, pull, a.nested[row], scales[0], a.entries[row], &moved);
    const float scale = multiplied(tables.encode.nested_map[entry], a.nested[row]);
    group.meet();  // all have read what is now overwritten
    if (own == 0) {
      a.entries[row] = static_cast<uint8_t>(entry);
      a.scales[row] = scale;
    }
#pragma unroll
    for (int m = 0; m < kEach; ++m) {
      slopes[m] = subtracted(slopes[m], multiplied(moved, products[m]));
      scales[m] = scale;
    }
  }
#pragma unroll
  for (int m = 0; m < kEach; ++m) {
    const float decoded_here = multiplied(units[m], scales[m]);
#pragma unroll 1
    for (int lane = 0; lane < Group::kSize; ++lane) {
      const int i = m * Group::kSize + lane;
      if (i >= a.width) return;
      const float* const from = local + i * kBlock;
      const float decoded = group.of(decoded_here, lane);
      const float wanted = added(decoded, divided(group.of(slopes[m], lane), from[i]));
      float after;
      const uint8_t code = nearest_code(tables, wanted, group.of(scales[m], lane), &after);
      if (own == lane) {
        const int64_t at = i * a.n + row;
        a.codes[at] = code;
        a.change[at] = subtracted(after, before[m]);
        a.residual[at] = subtracted(weights[m], after);
      }
      const float change = subtracted(after, decoded);
#pragma unroll
      for (int later = m; later < kEach; ++later) {
        const float by = multiplied(from[later * Group::kSize + own], change);
        slopes[later] = subtracted(slopes[later], by);
      }
    }
  }
}

}  // namespace nf4
