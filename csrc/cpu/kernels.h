// The borders inside the CPU code: value types, the packed layout, and the table of kernels that each
// instruction set (ISA) fills. Kernels see whole blocks only; the drivers (dequantize.cpp, quantize.cpp,
// linear.cpp) deal with ragged ends, threads and rounding of results, and the bindings check arguments.
//
// Files named *_avx2.cpp and *_avx512.cpp are compiled for their ISA, so they, and the headers they include,
// use no inline function of the C++ library: the linker keeps one copy of such a function, and it could be
// the one that an older CPU cannot run. Functions in our headers are static for the same reason.
#pragma once

#include <cstdint>

namespace nf4 {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

constexpr int64_t kBlock = 64;         // elements under one scale
constexpr int64_t kBlockBytes = 32;    // their codes: two a byte, the first element in the high nibble
constexpr int64_t kNestedBlock = 256;  // scales under one second-level scale
constexpr int kMaxRows = 8;            // rows of x that a fused product takes
constexpr int kGroupRows = 16;         // rows of W that a kernel of the fused product takes at a time

static inline int64_t dtype_bytes(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// One NF4 tensor with double-quantized scales; sizes as in nf4format/blocks.py.
struct Packed {
  const uint8_t* codes;
  const uint8_t* absmax;
  const float* quant_map;
  const float* nested_absmax;
  const float* nested_quant_map;
  float nested_offset;
};

// Decodes num_blocks blocks to `out`. Stores are plain: whatever reads the result next finds part of it in
// cache. Past the caches non-temporal stores measured a quarter faster or slower (Zen 4, two threads), by the
// bandwidth that the neighbours on the machine left, and slower into new memory.
using DequantizeBlocks = void (*)(const uint8_t* codes, const float* scales, const float* quant_map,
                                  int64_t num_blocks, void* out, Dtype out_dtype);

// Encodes num_blocks blocks; returns the first block that holds a NaN or an infinity, or -1. Blocks after
// that one are not written.
using QuantizeBlocks = int64_t (*)(const void* values, Dtype dtype, int64_t num_blocks, uint8_t* codes,
                                   float* absmax);

// The searching encoder; search.h says what these do and to which bits. `x`: the blocks in fixed point, in an
// order that is the kernels' own affair.
struct SearchTables;
// absmax of each block, and the best two scales before snapping [num_blocks, 2], the first of equally good
// ones first. Returns the first block that holds a NaN or an infinity, or -1.
using FindScales = int64_t (*)(const SearchTables& tables, const void* values, Dtype dtype,
                               int64_t num_blocks, int16_t* x, float* absmax, float* wanted);
// The error of each block with each of its inverses, [num_blocks, per_block].
using MeasureBlocks = void (*)(const SearchTables& tables, const int16_t* x, const int16_t* inverses,
                               int64_t num_blocks, int per_block, int32_t* errors);
// Codes for given scales.
using EncodeBlocks = void (*)(const SearchTables& tables, const void* values, Dtype dtype, int64_t num_blocks,
                              const float* scales, uint8_t* codes);

// The map of block scales, and its entries byte by byte: planes[b][i] is byte b of values[i].
struct ScaleMap {
  const float* values;
  alignas(64) uint8_t planes[4][256];
};

// out[i] = round(round(map[codes[i]] * factor) + offset), i = 0 .. count - 1.
using ScaleBlocks = void (*)(const ScaleMap& map, const uint8_t* codes, int64_t count, float factor,
                             float offset, float* out);

// Some rows of a fused product y = x W^T over k = 64 * num_blocks, and x as the kernel wants it
// (LinearKernel).
struct LinearRows {
  // [num_rows, num_blocks * 32]. With each piece that it reads, a kernel prefetches the same piece of the
  // group of rows that follows in memory: rows are short for the processor to see a stream in them.
  const uint8_t* codes;
  const float* scales;  // [num_rows, scale_stride]: num_blocks scales, then zeros up to a whole chunk
  int64_t scale_stride;
  const float* levels;        // float32 [16]
  const int16_t* levels_i16;  // int16 [16] for the integer kernel
  const void* x;              // [chunks, m, chunk], float32 or int16, zeros past k
  const float* x_scales;      // [chunks, m, chunk / 64, scale_copies], for the integer kernel
  int m;
  int num_rows;  // 1 to kGroupRows
  int64_t num_blocks;
  float* y;  // [m, kGroupRows]
};

// A kernel reads x in chunks of `chunk` elements, rearranged once a call so that no shuffle is needed inside:
// position p of a chunk holds element order(p). Chunks of the rows of x lie side by side, and not a whole row
// apart, which in powers of two would put them all in the same few cache sets.
struct LinearKernel {
  int chunk;
  int scale_copies;  // how many times each scale of x is stored
  int (*order)(int position);
  void (*run)(const LinearRows& rows);  // null: this ISA has no such kernel
};

struct Kernels {
  const char* isa;
  ScaleBlocks scale_blocks;  // null: this ISA has nothing better than a loop
  DequantizeBlocks dequantize_blocks;
  QuantizeBlocks quantize_blocks;
  FindScales find_scales;
  MeasureBlocks measure_blocks;
  EncodeBlocks encode_blocks;
  LinearKernel linear_f32;  // float32 throughout
  LinearKernel linear_i16;  // 16-bit integer products, float32 scales and sums
};

extern const Kernels kernels_portable;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;

// dequantize.cpp: elements [start, stop), written to out[0 ..).
void dequantize(const Packed& packed, int64_t start, int64_t stop, void* out, Dtype out_dtype, int threads);

// quantize.cpp: codes [(n + 1) / 2], absmax [(n + 63) / 64]; returns -1 or the index of the first non-finite
// value.
int64_t quantize_codes(const void* values, Dtype dtype, int64_t n, uint8_t* codes, float* absmax,
                       int threads);
// The same onto other levels, whose thresholds lie between them.
int64_t quantize_codes_onto(const float* levels, const float* thresholds, const void* values, Dtype dtype,
                            int64_t n, uint8_t* codes, float* absmax, int threads);

// search.cpp: codes, absmax (the 8-bit one) and nested_absmax [ceil(blocks / 256)] for an offset of 0;
// returns as quantize_codes does.
int64_t quantize_search(const float* levels, const float* thresholds, const void* values, Dtype dtype,
                        int64_t n, uint8_t* codes, uint8_t* absmax, float* nested_absmax, int threads);

// search_weighted.cpp: absmax [ceil(n / 64)] and nested_absmax for finite values, when errors of value i
// matter by weights[i % period].
void scale_search(const float* levels, const float* thresholds, const float* values, int64_t n,
                  const float* weights, int64_t period, uint8_t* absmax, float* nested_absmax, int threads);

// nonfinite.cpp: index of the first NaN or infinity (NaN only, if so asked), or -1.
int64_t first_nonfinite(const void* values, Dtype dtype, int64_t n, bool nan_only, int threads);

// quantize_absmax.cpp: the entry of the 8-bit map that is nearest; of two the lower.
uint8_t nearest_nested(float value);

// quantize_absmax.cpp: second level; returns the offset.
float quantize_absmax(const float* absmax, int64_t n, uint8_t* codes, float* nested_absmax);

// linear.cpp: out[m, n] = x[m, k] W[n, k]^T, m = 1 .. kMaxRows.
void linear(const void* x, Dtype x_dtype, int m, const Packed& packed, int64_t n, int64_t k, void* out,
            Dtype out_dtype, int threads);

// scales.cpp: decodes float32 scales of blocks.
class Scales {
 public:
  // `num_blocks`, the number to be decoded in all, decides whether tables are worth making.
  Scales(const Packed& packed, int64_t num_blocks);
  // Those of blocks [first, first + count).
  void decode(int64_t first, int64_t count, float* out) const;

 private:
  const Packed& packed_;
  ScaleBlocks scale_blocks_;
  ScaleMap map_;
};

}  // namespace nf4
