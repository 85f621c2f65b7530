// Block scales with AVX-512 (VBMI): the 256-entry map as four planes of bytes, each in four registers, so
// that two permutes and a blend look 64 codes up in a plane.
#include <immintrin.h>

#include "kernels.h"

namespace nf4 {
namespace {

// Entries 64 part .. 64 part + 63 of a plane.
struct Plane {
  __m512i parts[4];
};

__m512i look_up(const Plane& plane, __m512i codes) {
  const __m512i low = _mm512_permutex2var_epi8(plane.parts[0], codes, plane.parts[1]);
  const __m512i high = _mm512_permutex2var_epi8(plane.parts[2], codes, plane.parts[3]);
  return _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(codes), high);
}

}  // namespace

void scale_blocks_avx512(const ScaleMap& map, const uint8_t* codes, int64_t count, float factor, float offset,
                         float* out) {
  Plane planes[4];
  for (int byte = 0; byte < 4; ++byte) {
    for (int part = 0; part < 4; ++part) {
      planes[byte].parts[part] = _mm512_loadu_si512(map.planes[byte] + 64 * part);
    }
  }
  // Interleaving works on 128-bit lanes, so the codes are transposed in groups of four: lane i of the result
  // number j then holds values 16 j + 4 i and so on.
  const __m512i transpose = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512 factors = _mm512_set1_ps(factor), offsets = _mm512_set1_ps(offset);
  for (int64_t i = 0; i < count; i += 64) {
    const int64_t left = count - i;
    const __mmask64 wanted = left >= 64 ? ~__mmask64(0) : (__mmask64(1) << left) - 1;
    const __m512i index = _mm512_permutexvar_epi32(transpose, _mm512_maskz_loadu_epi8(wanted, codes + i));
    __m512i bytes[4];
#pragma GCC unroll 4
    for (int byte = 0; byte < 4; ++byte) bytes[byte] = look_up(planes[byte], index);
    const __m512i low_words[2] = {_mm512_unpacklo_epi8(bytes[0], bytes[1]),
                                  _mm512_unpackhi_epi8(bytes[0], bytes[1])};
    const __m512i high_words[2] = {_mm512_unpacklo_epi8(bytes[2], bytes[3]),
                                   _mm512_unpackhi_epi8(bytes[2], bytes[3])};
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512i low = low_words[j / 2], high = high_words[j / 2];
      const __m512i bits = j % 2 == 0 ? _mm512_unpacklo_epi16(low, high) : _mm512_unpackhi_epi16(low, high);
      const __m512 product = _mm512_mul_ps(_mm512_castsi512_ps(bits), factors);
      _mm512_mask_storeu_ps(out + i + 16 * j, __mmask16(wanted >> (16 * j)), _mm512_add_ps(product, offsets));
    }
  }
}

}  // namespace nf4
