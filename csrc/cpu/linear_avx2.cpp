// Fused product with AVX2, from packed codes to sums without writing a weight.
//
// float32: a block's 32 bytes are eight 32-bit lanes of eight codes. Plane j, the lanes shifted right by 4 j,
// gives eight levels by two 8-entry permutes and a blend. Integer: levels as 16-bit integers in two byte
// planes; two byte shuffles and an interleave give 16 levels, and pmaddwd multiplies them with 16-bit x and
// adds neighbours. A 32-bit lane sums 8 products: 8 * 16384 * 16000 < 2^31. x is stored plane by plane
// (linear_order_*), so that its loads are plain.
#include <immintrin.h>

#include "kernels.h"

namespace nf4 {
namespace {

float sum_of(__m256 value) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

template <int m>
void rows_f32(const LinearRows& rows) {
  const __m256 low_levels = _mm256_loadu_ps(rows.levels), high_levels = _mm256_loadu_ps(rows.levels + 8);
  for (int row = 0; row < rows.num_rows; ++row) {
    const uint8_t* codes = rows.codes + row * rows.num_blocks * kBlockBytes;
    const float* const scales = rows.scales + row * rows.scale_stride;
    const float* x = static_cast<const float*>(rows.x);
    __m256 sums[m];
#pragma GCC unroll 8
    for (int i = 0; i < m; ++i) sums[i] = _mm256_setzero_ps();
    for (int64_t block = 0; block < rows.num_blocks; ++block) {
      const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
      _mm_prefetch(codes + kGroupRows * rows.num_blocks * kBlockBytes, _MM_HINT_T1);
      __m256 products[m];
#pragma GCC unroll 8
      for (int i = 0; i < m; ++i) products[i] = _mm256_setzero_ps();
#pragma GCC unroll 8
      for (int plane = 0; plane < 8; ++plane) {
        const __m256i index = _mm256_srli_epi32(packed, 4 * plane);
        const __m256 low = _mm256_permutevar8x32_ps(low_levels, index);
        const __m256 high = _mm256_permutevar8x32_ps(high_levels, index);
        const __m256 upper =
            _mm256_castsi256_ps(_mm256_slli_epi32(packed, 28 - 4 * plane));  // bit 3 to the sign
        const __m256 levels = _mm256_blendv_ps(low, high, upper);
#pragma GCC unroll 8
        for (int i = 0; i < m; ++i) {
          products[i] = _mm256_fmadd_ps(levels, _mm256_loadu_ps(x + 64 * i + 8 * plane), products[i]);
        }
      }
      const __m256 scale = _mm256_broadcast_ss(scales + block);
#pragma GCC unroll 8
      for (int i = 0; i < m; ++i) sums[i] = _mm256_fmadd_ps(products[i], scale, sums[i]);
      codes += kBlockBytes;
      x += kBlock * m;
    }
#pragma GCC unroll 8
    for (int i = 0; i < m; ++i) rows.y[i * kGroupRows + row] = sum_of(sums[i]);
  }
}

template <int m>
void rows_i16(const LinearRows& rows) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows.levels_i16));
  const __m256i split = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15,  //
                                         0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  const __m256i planes = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(words, split), 0xd8);
  const __m256i low_bytes = _mm256_permute4x64_epi64(planes, 0x44);
  const __m256i high_bytes = _mm256_permute4x64_epi64(planes, 0xee);
  const __m256i nibble = _mm256_set1_epi8(0x0f);
  for (int row = 0; row < rows.num_rows; ++row) {
    const uint8_t* codes = rows.codes + row * rows.num_blocks * kBlockBytes;
    const float* const scales = rows.scales + row * rows.scale_stride;
    const int16_t* x = static_cast<const int16_t*>(rows.x);
    __m256 sums[m];
#pragma GCC unroll 8
    for (int i = 0; i < m; ++i) sums[i] = _mm256_setzero_ps();
    for (int64_t block = 0; block < rows.num_blocks; ++block) {
      const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
      _mm_prefetch(codes + kGroupRows * rows.num_blocks * kBlockBytes, _MM_HINT_T1);
      const __m256i even = _mm256_and_si256(_mm256_srli_epi16(packed, 4), nibble);
      const __m256i odd = _mm256_and_si256(packed, nibble);
      const __m256i even_low = _mm256_shuffle_epi8(low_bytes, even);
      const __m256i even_high = _mm256_shuffle_epi8(high_bytes, even);
      const __m256i odd_low = _mm256_shuffle_epi8(low_bytes, odd);
      const __m256i odd_high = _mm256_shuffle_epi8(high_bytes, odd);
      const __m256i levels[4] = {
          _mm256_unpacklo_epi8(even_low, even_high), _mm256_unpackhi_epi8(even_low, even_high),
          _mm256_unpacklo_epi8(odd_low, odd_high), _mm256_unpackhi_epi8(odd_low, odd_high)};
      const __m256 scale = _mm256_broadcast_ss(scales + block);
#pragma GCC unroll 8
      for (int i = 0; i < m; ++i) {
        const __m256i* const x_planes = reinterpret_cast<const __m256i*>(x + 64 * i);
        __m256i products = _mm256_madd_epi16(levels[0], _mm256_loadu_si256(x_planes));
        for (int plane = 1; plane < 4; ++plane) {
          products = _mm256_add_epi32(products,
                                      _mm256_madd_epi16(levels[plane], _mm256_loadu_si256(x_planes + plane)));
        }
        const __m256 x_scale = _mm256_broadcast_ss(rows.x_scales + block * m + i);
        sums[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), _mm256_mul_ps(scale, x_scale), sums[i]);
      }
      codes += kBlockBytes;
      x += kBlock * m;
    }
#pragma GCC unroll 8
    for (int i = 0; i < m; ++i) rows.y[i * kGroupRows + row] = sum_of(sums[i]);
  }
}

}  // namespace

// Lane i of plane j holds codes of byte 4 i + j / 2: the low nibble, an odd element, for even j.
int linear_order_f32_avx2(int position) {
  const int plane = position / 8, lane = position % 8;
  return 2 * (4 * lane + plane / 2) + (plane % 2 == 0 ? 1 : 0);
}

// Planes: even elements of bytes 0-7 and 16-23, of bytes 8-15 and 24-31, then the odd ones likewise.
int linear_order_i16_avx2(int position) {
  const int plane = position / 16, word = position % 16;
  const int byte = word % 8 + (word / 8) * 16 + (plane % 2) * 8;
  return 2 * byte + plane / 2;
}

void linear_f32_avx2(const LinearRows& rows) {
  constexpr void (*kByRows[])(const LinearRows&) = {rows_f32<1>, rows_f32<2>, rows_f32<3>, rows_f32<4>,
                                                    rows_f32<5>, rows_f32<6>, rows_f32<7>, rows_f32<8>};
  kByRows[rows.m - 1](rows);
}

void linear_i16_avx2(const LinearRows& rows) {
  constexpr void (*kByRows[])(const LinearRows&) = {rows_i16<1>, rows_i16<2>, rows_i16<3>, rows_i16<4>,
                                                    rows_i16<5>, rows_i16<6>, rows_i16<7>, rows_i16<8>};
  kByRows[rows.m - 1](rows);
}

}  // namespace nf4
