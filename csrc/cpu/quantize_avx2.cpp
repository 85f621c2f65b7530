// Encoding with AVX2. Elements are taken as two vectors, those at even and those at odd positions, because a
// byte joins one of each. The search takes four steps; a comparison gives 0 or -1, so codes are built as
// negative numbers and threshold tables are laid out by -index modulo 8, which is how the permute reads such
// a number.
#include <immintrin.h>

#include <cfloat>

#include "codebook.h"
#include "kernels.h"

namespace nf4 {
namespace {

struct Search {
  __m256 t7, t3, t11, third, fourth;
  Search() {
    alignas(32) float quarters[8], eighths[8];
    for (int i = 0; i < 8; ++i) {
      quarters[-i & 7] = kThresholds[4 * (i & 3) + 1];
      eighths[-i & 7] = kThresholds[2 * i];
    }
    t7 = _mm256_set1_ps(kThresholds[7]);
    t3 = _mm256_set1_ps(kThresholds[3]);
    t11 = _mm256_set1_ps(kThresholds[11]);
    third = _mm256_load_ps(quarters);
    fourth = _mm256_load_ps(eighths);
  }

  // Minus the codes.
  __m256i operator()(__m256 scaled) const {
    const auto greater = [scaled](__m256 threshold) { return _mm256_cmp_ps(scaled, threshold, _CMP_GT_OQ); };
    const auto append = [](__m256i code, __m256 bit) {
      return _mm256_add_epi32(_mm256_add_epi32(code, code), _mm256_castps_si256(bit));
    };
    const __m256 half = greater(t7);
    __m256i code = append(_mm256_castps_si256(half), greater(_mm256_blendv_ps(t3, t11, half)));
    code = append(code, greater(_mm256_permutevar8x32_ps(third, code)));
    return append(code, greater(_mm256_permutevar8x32_ps(fourth, code)));
  }
};

// 16 consecutive values, as floats: even and odd positions, in an order that both share.
struct Pairs {
  __m256 even, odd;
};

template <Dtype dtype>
Pairs load_pairs(const void* values, int group);

// Of 0 .. 15 in lanes: even 0 2 8 10 | 4 6 12 14, and odd one more.
Pairs deinterleave(__m256 first, __m256 second) {
  return {_mm256_shuffle_ps(first, second, 0x88), _mm256_shuffle_ps(first, second, 0xdd)};
}

template <>
Pairs load_pairs<Dtype::float32>(const void* values, int group) {
  const float* source = static_cast<const float*>(values) + 16 * group;
  return deinterleave(_mm256_loadu_ps(source), _mm256_loadu_ps(source + 8));
}

template <>
Pairs load_pairs<Dtype::float16>(const void* values, int group) {
  const __m128i* source = static_cast<const __m128i*>(values) + 2 * group;
  return deinterleave(_mm256_cvtph_ps(_mm_loadu_si128(source)), _mm256_cvtph_ps(_mm_loadu_si128(source + 1)));
}

// In order: a 32-bit lane holds an even element and, above it, an odd one.
template <>
Pairs load_pairs<Dtype::bfloat16>(const void* values, int group) {
  const __m256i both = _mm256_loadu_si256(static_cast<const __m256i*>(values) + group);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(int(0xffff0000u))))};
}

uint32_t largest_lane(__m256i values) {
  __m128i most = _mm_max_epu32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
  most = _mm_max_epu32(most, _mm_shuffle_epi32(most, 0x4e));
  most = _mm_max_epu32(most, _mm_shuffle_epi32(most, 0xb1));
  return uint32_t(_mm_cvtsi128_si32(most));
}

template <Dtype dtype>
int64_t encode(const void* values, int64_t num_blocks, uint8_t* codes, float* absmax) {
  const Search search;
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  // Undoes the order of deinterleave(): of 8 bytes, swap the middle pairs.
  const __m256i in_order = dtype == Dtype::bfloat16
                               ? _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,  //
                                                  0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
                               : _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15,  //
                                                  0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
  const __m256i lanes = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int64_t block = 0; block < num_blocks; ++block) {
    Pairs pairs[4];
    __m256i most = _mm256_setzero_si256();
    for (int group = 0; group < 4; ++group) {
      pairs[group] = load_pairs<dtype>(values, group);
      most = _mm256_max_epu32(most, _mm256_and_si256(_mm256_castps_si256(pairs[group].even), magnitude));
      most = _mm256_max_epu32(most, _mm256_and_si256(_mm256_castps_si256(pairs[group].odd), magnitude));
    }
    const uint32_t largest = largest_lane(most);
    if (largest >= 0x7f800000u) return block;
    __builtin_memcpy(absmax + block, &largest, sizeof largest);
    const float reciprocal = 1.0f / absmax[block];
    const __m256 factor = _mm256_set1_ps(reciprocal < FLT_MAX ? reciprocal : FLT_MAX);

    __m256i bytes[4];  // one in each 32-bit lane
    for (int group = 0; group < 4; ++group) {
      const __m256i even = search(_mm256_mul_ps(pairs[group].even, factor));
      const __m256i odd = search(_mm256_mul_ps(pairs[group].odd, factor));
      bytes[group] =
          _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_add_epi32(_mm256_slli_epi32(even, 4), odd));
    }
    const __m256i packed =
        _mm256_packus_epi16(_mm256_packus_epi32(bytes[0], bytes[1]), _mm256_packus_epi32(bytes[2], bytes[3]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes),
                        _mm256_shuffle_epi8(_mm256_permutevar8x32_epi32(packed, lanes), in_order));
    values = static_cast<const char*>(values) + kBlock * (dtype == Dtype::float32 ? 4 : 2);
    codes += kBlockBytes;
  }
  return -1;
}

}  // namespace

int64_t quantize_blocks_avx2(const void* values, Dtype dtype, int64_t num_blocks, uint8_t* codes,
                             float* absmax) {
  switch (dtype) {
    case Dtype::float32:
      return encode<Dtype::float32>(values, num_blocks, codes, absmax);
    case Dtype::bfloat16:
      return encode<Dtype::bfloat16>(values, num_blocks, codes, absmax);
    case Dtype::float16:
      return encode<Dtype::float16>(values, num_blocks, codes, absmax);
  }
  return -1;
}

}  // namespace nf4
