// Decoding with AVX2. 16-bit outputs: the 16 levels are scaled and rounded once a block and split into a
// plane of low and a plane of high bytes; two byte shuffles look a code up in both, and an interleave joins
// them. float32: an 8-entry permute for each half of the levels, and a blend.
#include <immintrin.h>

#include "kernels.h"

namespace nf4 {
namespace {

// Levels 8 * half .. 8 * half + 7 times scale as bfloat16 bits, one in each 32-bit lane; NaN becomes 0x7fc0.
__m256i scaled_bf16(__m256 levels, __m256 scale) {
  const __m256 product = _mm256_mul_ps(levels, scale);
  const __m256i bits = _mm256_castps_si256(product);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256 is_nan = _mm256_cmp_ps(product, product, _CMP_UNORD_Q);
  return _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fc0),
                            _mm256_castps_si256(is_nan));
}

// The 16 results of a block as 16-bit words, in order.
template <Dtype dtype>
__m256i scaled_words(__m256 low_levels, __m256 high_levels, __m256 scale) {
  if (dtype == Dtype::bfloat16) {
    const __m256i words =
        _mm256_packus_epi32(scaled_bf16(low_levels, scale), scaled_bf16(high_levels, scale));
    return _mm256_permute4x64_epi64(words, 0xd8);
  }
  const __m128i low = _mm256_cvtps_ph(_mm256_mul_ps(low_levels, scale), _MM_FROUND_TO_NEAREST_INT);
  const __m128i high = _mm256_cvtps_ph(_mm256_mul_ps(high_levels, scale), _MM_FROUND_TO_NEAREST_INT);
  return _mm256_set_m128i(high, low);
}

template <Dtype dtype>
void decode_words(const uint8_t* codes, const float* scales, const float* quant_map, int64_t num_blocks,
                  uint16_t* out) {
  const __m256 low_levels = _mm256_loadu_ps(quant_map), high_levels = _mm256_loadu_ps(quant_map + 8);
  // Even bytes to the lower half of a 128-bit lane, odd bytes to the upper.
  const __m256i split = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15,  //
                                         0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  const __m256i nibble = _mm256_set1_epi16(0x0f0f);
  for (int64_t block = 0; block < num_blocks; ++block) {
    __m256i planes = scaled_words<dtype>(low_levels, high_levels, _mm256_set1_ps(scales[block]));
    planes = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(planes, split), 0xd8);
    const __m256i low_bytes = _mm256_permute4x64_epi64(planes, 0x44);
    const __m256i high_bytes = _mm256_permute4x64_epi64(planes, 0xee);
    for (int half = 0; half < 2; ++half) {
      const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes) + half);
      const __m256i wide = _mm256_cvtepu8_epi16(packed);
      // Byte 2i: the high nibble of code byte i; byte 2i + 1: its low nibble.
      const __m256i index =
          _mm256_and_si256(_mm256_or_si256(_mm256_srli_epi16(wide, 4), _mm256_slli_epi16(wide, 8)), nibble);
      const __m256i low = _mm256_shuffle_epi8(low_bytes, index),
                    high = _mm256_shuffle_epi8(high_bytes, index);
      const __m256i first = _mm256_unpacklo_epi8(low, high), second = _mm256_unpackhi_epi8(low, high);
      __m256i* const target = reinterpret_cast<__m256i*>(out) + 2 * half;
      _mm256_storeu_si256(target, _mm256_permute2x128_si256(first, second, 0x20));
      _mm256_storeu_si256(target + 1, _mm256_permute2x128_si256(first, second, 0x31));
    }
    codes += kBlockBytes;
    out += kBlock;
  }
}

void decode_floats(const uint8_t* codes, const float* scales, const float* quant_map, int64_t num_blocks,
                   float* out) {
  const __m256 low_levels = _mm256_loadu_ps(quant_map), high_levels = _mm256_loadu_ps(quant_map + 8);
  const __m256i shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);  // to each code of 4 bytes, in order
  for (int64_t block = 0; block < num_blocks; ++block) {
    const __m256 scale = _mm256_set1_ps(scales[block]);
    const __m256 low_table = _mm256_mul_ps(low_levels, scale), high_table = _mm256_mul_ps(high_levels, scale);
    for (int i = 0; i < 8; ++i) {
      int word;
      __builtin_memcpy(&word, codes + 4 * i, sizeof word);
      const __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(word), shifts);
      const __m256 low = _mm256_permutevar8x32_ps(low_table, index);
      const __m256 high = _mm256_permutevar8x32_ps(high_table, index);
      const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3 to the sign
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out) + i,
                          _mm256_castps_si256(_mm256_blendv_ps(low, high, upper)));
    }
    codes += kBlockBytes;
    out += kBlock;
  }
}

}  // namespace

void dequantize_blocks_avx2(const uint8_t* codes, const float* scales, const float* quant_map,
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
