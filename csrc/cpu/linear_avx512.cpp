// Fused product with AVX-512 (BW, VNNI), from packed codes to sums without writing a weight.
//
// A chunk is two blocks, 64 bytes: 32-bit lanes 0 to 7 hold the first block's codes, lanes 8 to 15 the
// second's. Plane j, the lanes (float32, eight planes) or words (integer, four planes) shifted right by 4 j,
// indexes a full-width permute, which ignores all but the low bits, so that nothing is masked. Integer:
// vpdpwssd multiplies 16-bit levels with 16-bit x and adds two products to a 32-bit lane, 8 products for each
// block: 8 * 16384 * 16000 < 2^31.
// x is stored plane by plane (linear_order_*), so that its loads are plain.
//
// Rows of W are taken in pairs, for each load of x to serve two, and x in segments that stay in the
// first-level cache while all rows of the task pass.
#include <immintrin.h>

#include "kernels.h"

namespace nf4 {
namespace {

constexpr int64_t kChunkBlocks = 2;
constexpr int64_t kScaleCopies = 8;  // a scale of x for each lane of its block

// The codes of a chunk; of a row's last odd block, with zeros after it.
__m512i load_chunk(const uint8_t* codes, int64_t blocks_left) {
  if (blocks_left >= kChunkBlocks) return _mm512_loadu_si512(codes);
  return _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
}

// Two floats, the first in lanes 0 to 7, the second in lanes 8 to 15.
__m512 spread_pair(const float* pair) {
  double bits;
  __builtin_memcpy(&bits, pair, sizeof bits);
  const __m512i selector = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  return _mm512_permutevar_ps(_mm512_castpd_ps(_mm512_set1_pd(bits)), selector);
}

constexpr int64_t kSegmentBytes = 16384;  // of x: half of a first-level cache

// Running sums of a task, by row of W and row of x.
using Sums = __m512[kGroupRows][kMaxRows];

// Adds blocks [begin, end) of `pair` rows of W, from `row` on, to their sums.
template <int m, int pair>
void add_f32(const LinearRows& rows, int row, int64_t begin, int64_t end, Sums& all_sums) {
  const __m512 table = _mm512_loadu_ps(rows.levels);
  const int64_t row_bytes = rows.num_blocks * kBlockBytes;
  __m512 sums[pair][m];
#pragma GCC unroll 8
  for (int r = 0; r < pair; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < m; ++i) sums[r][i] = all_sums[row + r][i];
  }
  for (int64_t block = begin; block < end; block += kChunkBlocks) {
    const float* const x = static_cast<const float*>(rows.x) + block * kBlock * m;
    __m512i packed[pair];
    __m512 products[pair][m];
#pragma GCC unroll 8
    for (int r = 0; r < pair; ++r) {
      const uint8_t* const codes = rows.codes + (row + r) * row_bytes + block * kBlockBytes;
      packed[r] = load_chunk(codes, rows.num_blocks - block);
      _mm_prefetch(codes + kGroupRows * row_bytes, _MM_HINT_T1);
#pragma GCC unroll 8
      for (int i = 0; i < m; ++i) products[r][i] = _mm512_setzero_ps();
    }
#pragma GCC unroll 8
    for (int plane = 0; plane < 8; ++plane) {
      __m512 levels[pair];
#pragma GCC unroll 8
      for (int r = 0; r < pair; ++r) {
        levels[r] = _mm512_permutexvar_ps(_mm512_srli_epi32(packed[r], 4 * plane), table);
      }
#pragma GCC unroll 8
      for (int i = 0; i < m; ++i) {
        const __m512 x_plane = _mm512_loadu_ps(x + 128 * i + 16 * plane);
#pragma GCC unroll 8
        for (int r = 0; r < pair; ++r) products[r][i] = _mm512_fmadd_ps(levels[r], x_plane, products[r][i]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < pair; ++r) {
      const __m512 scale = spread_pair(rows.scales + (row + r) * rows.scale_stride + block);
#pragma GCC unroll 8
      for (int i = 0; i < m; ++i) sums[r][i] = _mm512_fmadd_ps(products[r][i], scale, sums[r][i]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < pair; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < m; ++i) all_sums[row + r][i] = sums[r][i];
  }
}

template <int m, int pair>
void add_i16(const LinearRows& rows, int row, int64_t begin, int64_t end, Sums& all_sums) {
  const __m512i table =
      _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows.levels_i16)));
  const int64_t row_bytes = rows.num_blocks * kBlockBytes;
  __m512 sums[pair][m];
#pragma GCC unroll 8
  for (int r = 0; r < pair; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < m; ++i) sums[r][i] = all_sums[row + r][i];
  }
  for (int64_t block = begin; block < end; block += kChunkBlocks) {
    const int16_t* const x = static_cast<const int16_t*>(rows.x) + block * kBlock * m;
    const float* const x_scales = rows.x_scales + block * kScaleCopies * m;
    __m512i levels[pair][4];
    __m512 scales[pair];
#pragma GCC unroll 8
    for (int r = 0; r < pair; ++r) {
      const uint8_t* const codes = rows.codes + (row + r) * row_bytes + block * kBlockBytes;
      const __m512i packed = load_chunk(codes, rows.num_blocks - block);
      _mm_prefetch(codes + kGroupRows * row_bytes, _MM_HINT_T1);
#pragma GCC unroll 4
      for (int plane = 0; plane < 4; ++plane) {
        levels[r][plane] = _mm512_permutexvar_epi16(_mm512_srli_epi16(packed, 4 * plane), table);
      }
      scales[r] = spread_pair(rows.scales + (row + r) * rows.scale_stride + block);
    }
#pragma GCC unroll 8
    for (int i = 0; i < m; ++i) {
      __m512i products[pair];
#pragma GCC unroll 8
      for (int r = 0; r < pair; ++r) products[r] = _mm512_setzero_si512();
#pragma GCC unroll 4
      for (int plane = 0; plane < 4; ++plane) {
        const __m512i x_plane = _mm512_loadu_si512(x + 128 * i + 32 * plane);
#pragma GCC unroll 8
        for (int r = 0; r < pair; ++r) {
          products[r] = _mm512_dpwssd_epi32(products[r], levels[r][plane], x_plane);
        }
      }
      const __m512 x_scale = _mm512_loadu_ps(x_scales + 16 * i);
#pragma GCC unroll 8
      for (int r = 0; r < pair; ++r) {
        const __m512 scale = _mm512_mul_ps(scales[r], x_scale);
        sums[r][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[r]), scale, sums[r][i]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < pair; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < m; ++i) all_sums[row + r][i] = sums[r][i];
  }
}

// Which of the two a task runs.
template <int m, bool integers, int pair>
void add(const LinearRows& rows, int row, int64_t begin, int64_t end, Sums& sums) {
  if (integers) {
    add_i16<m, pair>(rows, row, begin, end, sums);
  } else {
    add_f32<m, pair>(rows, row, begin, end, sums);
  }
}

template <int m, bool integers>
void run(const LinearRows& rows) {
  Sums sums;
  for (int row = 0; row < rows.num_rows; ++row) {
#pragma GCC unroll 8
    for (int i = 0; i < m; ++i) sums[row][i] = _mm512_setzero_ps();
  }
  constexpr int64_t kStep = kSegmentBytes / (m * kBlock * (integers ? 2 : 4)) / kChunkBlocks * kChunkBlocks;
  constexpr bool kPairs = integers || m <= 4;  // beyond, the sums of two rows would not fit the registers
  for (int64_t begin = 0; begin < rows.num_blocks; begin += kStep) {
    const int64_t end = begin + kStep < rows.num_blocks ? begin + kStep : rows.num_blocks;
    int row = 0;
    if (kPairs) {
      for (; row + 2 <= rows.num_rows; row += 2) add<m, integers, 2>(rows, row, begin, end, sums);
    }
    for (; row < rows.num_rows; ++row) add<m, integers, 1>(rows, row, begin, end, sums);
  }
  for (int row = 0; row < rows.num_rows; ++row) {
#pragma GCC unroll 8
    for (int i = 0; i < m; ++i) rows.y[i * kGroupRows + row] = _mm512_reduce_add_ps(sums[row][i]);
  }
}

template <bool integers>
void run_by_m(const LinearRows& rows) {
  constexpr void (*kByRows[kMaxRows])(const LinearRows&) = {
      run<1, integers>, run<2, integers>, run<3, integers>, run<4, integers>,
      run<5, integers>, run<6, integers>, run<7, integers>, run<8, integers>};
  kByRows[rows.m - 1](rows);
}

}  // namespace

// Lane i of plane j holds codes of byte 4 i + j / 2: the low nibble, an odd element, for even j.
int linear_order_f32_avx512(int position) {
  const int plane = position / 16, lane = position % 16;
  return 2 * (4 * lane + plane / 2) + (plane % 2 == 0 ? 1 : 0);
}

// Word i of plane j holds codes of byte 2 i + j / 2: the low nibble, an odd element, for even j.
int linear_order_i16_avx512(int position) {
  const int plane = position / 32, word = position % 32;
  return 2 * (2 * word + plane / 2) + (plane % 2 == 0 ? 1 : 0);
}

void linear_f32_avx512(const LinearRows& rows) { run_by_m<false>(rows); }

void linear_i16_avx512(const LinearRows& rows) { run_by_m<true>(rows); }

}  // namespace nf4
