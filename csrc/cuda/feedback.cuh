// The steps of -O2 and -O3 that go one column after another (compiler/qcompile/feedback.py), for one thread
// and one row of the weight; what lies between them are products of matrices, which are others' work.
// Matrices are [columns, n], features first: neighbouring threads read neighbouring values.
//
// A thread has thousands of dependent operations to do and there is a thread for each row only, so that
// latency decides, and not the number of instructions: 128 columns take some 40,000 cycles whatever n is.
// Beside the products, which are k / 128 times as many operations, that is little.
//
// One rounding for each operation, in the order of the numpy code, without contraction: what is carried
// within a panel has its bits. Compiled for the host too, see encode.cuh.
#pragma once

#include "encode.cuh"

namespace nf4 {

constexpr int kCarried = 128;    // columns at a time whose errors are carried to each other
constexpr int kZeroEntry = 127;  // of kNestedMap: a scale of zero

struct FeedbackTables {
  EncodeTables encode;
  float levels[16];
};

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

// The nearest code, and what it decodes to.
NF4_DEVICE uint8_t nearest_code(const FeedbackTables& tables, float value, float scale, float* decoded) {
  const uint32_t code = code_of(tables.encode, scale == 0.0f ? 0.0f : divided(value, scale));
  *decoded = multiplied(tables.levels[code], scale);
  return static_cast<uint8_t>(code);
}

// Rounds a row's columns, each one's error carried to those behind it.
// `transposed` [width, kCarried]: the factor, [i][j] of its row j and column i. `mine`: room for the row's
// errors, every `step` floats.
NF4_DEVICE void carry_row(const FeedbackTables& tables, const CarryArguments& a, const float* transposed,
                          float* mine, int step, int64_t row) {
  for (int i = 0; i < a.width; ++i) {
    float value = a.rest[i * a.n + row];
    const float* const from = transposed + i * kCarried;
#pragma unroll 4
    for (int j = 0; j < i; ++j) value = subtracted(value, multiplied(from[j], mine[j * step]));
    const int64_t column = a.order[i];
    float decoded;
    a.codes[column * a.n + row] =
        nearest_code(tables, value, a.scales[(column >> a.scale_shift) * a.n + row], &decoded);
    a.residual[column * a.n + row] = subtracted(a.weight[column * a.n + row], decoded);
    const float error = divided(subtracted(value, decoded), from[i]);
    mine[i * step] = error;
    a.errors[i * a.n + row] = error;
  }
}

// The entry of kNestedMap that lowers the cost of a row's block most, or the one that it has; in `moved` how
// far the scale goes with it. `units`, `products` [width]: levels of the codes; H times these.
NF4_DEVICE int refitted_entry(const FeedbackTables& tables, const DescendArguments& a, const float* units,
                              const float* products, int step, int64_t row, float* moved) {
  float curvature = 0.0f, pull = 0.0f;
  for (int i = 0; i < a.width; ++i) {
    curvature = added(curvature, multiplied(units[i * step], products[i * step]));
    pull = added(pull, multiplied(units[i * step], a.slope[i * a.n + row]));
  }
  const float nested = a.nested[row], scale = a.scales[row];
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
  return better ? entry : a.entries[row];
}

// Moves the scale of a row's block, then its codes one by one, wherever that lowers the cost.
// `local` [width, kBlock]: H. `mine`, `products`: room for `width` floats each, every `step`.
NF4_DEVICE void descend_row(const FeedbackTables& tables, const DescendArguments& a, const float* local,
                            float* mine, float* products, int step, int64_t row) {
  const bool refits = a.nested != nullptr;
  const float old_scale = refits ? a.scales[row] : 0.0f;
  float scale = old_scale, moved = 0.0f;
  if (refits) {
    for (int i = 0; i < a.width; ++i) mine[i * step] = tables.levels[a.codes[i * a.n + row]];
    for (int i = 0; i < a.width; ++i) {
      float product = 0.0f;
#pragma unroll 8
      for (int j = 0; j < a.width; ++j)
        product = added(product, multiplied(local[i * kBlock + j], mine[j * step]));
      products[i * step] = product;
    }
    const int entry = refitted_entry(tables, a, mine, products, step, row, &moved);
    a.entries[row] = static_cast<uint8_t>(entry);
    scale = a.scales[row] = multiplied(tables.encode.nested_map[entry], a.nested[row]);
  }
  for (int i = 0; i < a.width; ++i) {  // `mine`: changes from here on
    const int64_t at = i * a.n + row;
    const float* const from = local + i * kBlock;
    float slope = a.slope[at];
    if (refits) slope = subtracted(slope, multiplied(moved, products[i * step]));
#pragma unroll 4
    for (int j = 0; j < i; ++j) slope = subtracted(slope, multiplied(from[j], mine[j * step]));
    const float unit = tables.levels[a.codes[at]];
    if (!refits) scale = a.scales[at];
    const float before = multiplied(unit, refits ? old_scale : scale);
    const float decoded = multiplied(unit, scale);
    float after;
    a.codes[at] = nearest_code(tables, added(decoded, divided(slope, from[i])), scale, &after);
    mine[i * step] = subtracted(after, decoded);
    a.change[at] = subtracted(after, before);
    a.residual[at] = subtracted(a.weight[at], after);
  }
}

}  // namespace nf4
