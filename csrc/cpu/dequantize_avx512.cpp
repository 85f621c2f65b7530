// Decoding with AVX-512 (BW, VBMI). The 16 results of a block fill a register, twice over for 16-bit outputs,
// and a full-width permute looks 32 (16 for float32) codes up at once. The permute reads only the low bits of
// an index, and the table repeats where it reads one bit too many, so that nibbles need shifting but no
// masking.
#include <immintrin.h>

#include "kernels.h"

namespace nf4 {
namespace {

// The 16 results of a block as words, repeated: entries i and i + 16 are equal.
template <Dtype dtype>
__m512i scaled_words(__m512 levels, __m512 scale) {
  const __m512 product = _mm512_mul_ps(levels, scale);
  if (dtype == Dtype::bfloat16) {
    // Not vcvtneps2bf16: it flushes subnormals.
    const __m512i bits = _mm512_castps_si512(product);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(product, product, _CMP_UNORD_Q);
    sum = _mm512_mask_mov_epi32(sum, is_nan, _mm512_set1_epi32(0x7fc00000));
    const __m512i upper_words =
        _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1,  //
                         31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_permutexvar_epi16(upper_words, sum);
  }
  return _mm512_broadcast_i64x4(_mm512_cvtps_ph(product, _MM_FROUND_TO_NEAREST_INT));
}

template <Dtype dtype>
void decode_words(const uint8_t* codes, const float* scales, const float* quant_map, int64_t num_blocks,
                  uint16_t* out) {
  const __m512 levels = _mm512_loadu_ps(quant_map);
  // Both words of 32-bit lane i hold code byte i (in their low half; the upper half is shifted out or
  // ignored).
  alignas(64) uint8_t places[64];
  for (int i = 0; i < 64; ++i) places[i] = uint8_t(i / 4);
  const __m512i first_bytes = _mm512_load_si512(places);
  const __m512i second_bytes = _mm512_add_epi8(first_bytes, _mm512_set1_epi8(16));
  const __m512i shifts = _mm512_set1_epi32(4);  // the even word takes the high nibble
  for (int64_t block = 0; block < num_blocks; ++block) {
    const __m512i table = scaled_words<dtype>(levels, _mm512_set1_ps(scales[block]));
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    const __m512i packed = _mm512_castsi256_si512(half);
    const __m512i first = _mm512_srlv_epi16(_mm512_permutexvar_epi8(first_bytes, packed), shifts);
    const __m512i second = _mm512_srlv_epi16(_mm512_permutexvar_epi8(second_bytes, packed), shifts);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(first, table));
    _mm512_storeu_si512(out + 32, _mm512_permutexvar_epi16(second, table));
    codes += kBlockBytes;
    out += kBlock;
  }
}

void decode_floats(const uint8_t* codes, const float* scales, const float* quant_map, int64_t num_blocks,
                   float* out) {
  const __m512 levels = _mm512_loadu_ps(quant_map);
  // 8 code bytes give 16 elements: the first four lanes 0 to 7, the second four lanes 8 to 15.
  const __m512i shifts = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
  const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  for (int64_t block = 0; block < num_blocks; ++block) {
    const __m512 table = _mm512_mul_ps(levels, _mm512_set1_ps(scales[block]));
    const __m512i packed =
        _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    for (int i = 0; i < 4; ++i) {
      const __m512i words =
          _mm512_permutexvar_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(2 * i)), packed);
      const __m512i index = _mm512_srlv_epi32(words, shifts);
      _mm512_storeu_si512(out + 16 * i, _mm512_castps_si512(_mm512_permutexvar_ps(index, table)));
    }
    codes += kBlockBytes;
    out += kBlock;
  }
}

}  // namespace

void dequantize_blocks_avx512(const uint8_t* codes, const float* scales, const float* quant_map,
                              int64_t num_blocks, void* out, Dtype out_dtype) {
  auto* const words = static_cast<uint16_t*>(out);
  switch (out_dtype) {
    case Dtype::float32:
      return decode_floats(codes, scales, quant_map, num_blocks, static_cast<float*>(out));
    case Dtype::bfloat16:
      return decode_words<Dtype::bfloat16>(codes, scales, quant_map, num_blocks, words);
    case Dtype::float16:
      return decode_words<Dtype::float16>(codes, scales, quant_map, num_blocks, words);
  }
}

}  // namespace nf4
