// Fused product with AVX-512 (BW, VNNI), from packed codes to sums without writing a weight.
//
// A chunk is two blocks, 64 bytes: 32-bit lanes 0 to 7 hold the first block's codes, lanes 8 to 15 the
// second's. Plane j, the lanes (float32, eight planes) or words (integer, four planes) shifted right by 4 j,
// indexes a full-width permute, which ignores all but the low bits, so that nothing is masked. Integer:
// vpdpwssd multiplies 16-bit levels with 16-bit x and adds two products to a 32-bit lane, 8 products for each
// block: 8 * 16384 * 16000 < 2^31.
// x is stored plane by plane (linear_order_*), so that its loads are plain.
#include <immintrin.h>

#include "kernels.h"

namespace nf4 {
namespace {

constexpr int64_t kChunkBlocks = 2;

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

template <int m>
void rows_f32(const LinearRows& rows) {
  const __m512 table = _mm512_loadu_ps(rows.levels);
  for (int64_t row = 0; row < rows.num_rows; ++row) {
    const uint8_t* codes = rows.codes + row * rows.num_blocks * kBlockBytes;
    const float* const scales = rows.scales + row * rows.scale_stride;
    const float* x = static_cast<const float*>(rows.x);
    __m512 sums[m];
    for (int i = 0; i < m; ++i) sums[i] = _mm512_setzero_ps();
    for (int64_t block = 0; block < rows.num_blocks; block += kChunkBlocks) {
      const __m512i packed = load_chunk(codes, rows.num_blocks - block);
      __m512 products[m];
      for (int i = 0; i < m; ++i) products[i] = _mm512_setzero_ps();
#pragma GCC unroll 8
      for (int plane = 0; plane < 8; ++plane) {
        const __m512 levels = _mm512_permutexvar_ps(_mm512_srli_epi32(packed, 4 * plane), table);
        for (int i = 0; i < m; ++i) {
          products[i] =
              _mm512_fmadd_ps(levels, _mm512_loadu_ps(x + i * rows.x_stride + 16 * plane), products[i]);
        }
      }
      const __m512 scale = spread_pair(scales + block);
      for (int i = 0; i < m; ++i) sums[i] = _mm512_fmadd_ps(products[i], scale, sums[i]);
      codes += kChunkBlocks * kBlockBytes;
      x += kChunkBlocks * kBlock;
    }
    for (int i = 0; i < m; ++i) rows.y[i * rows.y_stride + row] = _mm512_reduce_add_ps(sums[i]);
  }
}

template <int m>
void rows_i16(const LinearRows& rows) {
  const __m512i table =
      _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows.levels_i16)));
  for (int64_t row = 0; row < rows.num_rows; ++row) {
    const uint8_t* codes = rows.codes + row * rows.num_blocks * kBlockBytes;
    const float* const scales = rows.scales + row * rows.scale_stride;
    const int16_t* x = static_cast<const int16_t*>(rows.x);
    __m512 sums[m];
    for (int i = 0; i < m; ++i) sums[i] = _mm512_setzero_ps();
    for (int64_t block = 0; block < rows.num_blocks; block += kChunkBlocks) {
      const __m512i packed = load_chunk(codes, rows.num_blocks - block);
      __m512i levels[4];
#pragma GCC unroll 4
      for (int plane = 0; plane < 4; ++plane) {
        levels[plane] = _mm512_permutexvar_epi16(_mm512_srli_epi16(packed, 4 * plane), table);
      }
      const __m512 scale = spread_pair(scales + block);
      for (int i = 0; i < m; ++i) {
        const int16_t* const x_planes = x + i * rows.x_stride;
        __m512i products = _mm512_setzero_si512();
#pragma GCC unroll 4
        for (int plane = 0; plane < 4; ++plane) {
          products = _mm512_dpwssd_epi32(products, levels[plane], _mm512_loadu_si512(x_planes + 32 * plane));
        }
        const __m512 x_scale = spread_pair(rows.x_scales + i * rows.scale_stride + block);
        sums[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), _mm512_mul_ps(scale, x_scale), sums[i]);
      }
      codes += kChunkBlocks * kBlockBytes;
      x += kChunkBlocks * kBlock;
    }
    for (int i = 0; i < m; ++i) rows.y[i * rows.y_stride + row] = _mm512_reduce_add_ps(sums[i]);
  }
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

void linear_f32_avx512(const LinearRows& rows) {
  constexpr void (*kByRows[])(const LinearRows&) = {rows_f32<1>, rows_f32<2>, rows_f32<3>, rows_f32<4>,
                                                    rows_f32<5>, rows_f32<6>, rows_f32<7>, rows_f32<8>};
  kByRows[rows.m - 1](rows);
}

void linear_i16_avx512(const LinearRows& rows) {
  constexpr void (*kByRows[])(const LinearRows&) = {rows_i16<1>, rows_i16<2>, rows_i16<3>, rows_i16<4>,
                                                    rows_i16<5>, rows_i16<6>, rows_i16<7>, rows_i16<8>};
  kByRows[rows.m - 1](rows);
}

}  // namespace nf4
