// Encoding with AVX-512. Instead of searching, a value picks one of 31 bins of width 1/15 (thresholds lie at
// least 0.0805 apart, so a bin holds one at most): code = base[bin] + (value > threshold[bin]). Both tables
// fill two registers each, and a two-register permute, which reads the low five bits of an index, looks 16
// values up.
#include <immintrin.h>

#include <cfloat>

#include "codebook.h"
#include "kernels.h"

namespace nf4 {
namespace {

constexpr float kBinsPerUnit = 15.0f;
constexpr float kMagic = 0x1.8p23f;  // added to a small number, it leaves the nearest integer in the low bits

__m512i bins(__m512 scaled) {
  const __m512 sum = _mm512_fmadd_ps(scaled, _mm512_set1_ps(kBinsPerUnit), _mm512_set1_ps(kMagic));
  return _mm512_castps_si512(sum);
}

struct Search {
  __m512 threshold_low, threshold_high;
  __m512i base_low, base_high;

  // Entry b modulo 32 is for bin b in [-15, 15]. The bin of a value never falls as the value rises, so all
  // thresholds in lower bins are below the value, and those in higher bins above it.
  Search() {
    alignas(64) float thresholds[32];
    alignas(64) int bases[32];
    int bin_of[16];
    _mm512_storeu_si512(bin_of, bins(_mm512_maskz_loadu_ps(0x7fff, kThresholds)));
    for (int bin = -16; bin < 16; ++bin) {
      thresholds[bin & 31] = FLT_MAX;
      bases[bin & 31] = 0;
      for (int i = 0; i < 15; ++i) {
        const int threshold_bin = (bin_of[i] & 31) - (bin_of[i] & 16 ? 32 : 0);
        if (threshold_bin < bin) bases[bin & 31] += 1;
        if (threshold_bin == bin) thresholds[bin & 31] = kThresholds[i];
      }
    }
    threshold_low = _mm512_load_ps(thresholds);
    threshold_high = _mm512_load_ps(thresholds + 16);
    base_low = _mm512_load_si512(bases);
    base_high = _mm512_load_si512(bases + 16);
  }

  __m512i operator()(__m512 scaled) const {
    const __m512i bin = bins(scaled);
    const __m512 threshold = _mm512_permutex2var_ps(threshold_low, bin, threshold_high);
    const __m512i base = _mm512_permutex2var_epi32(base_low, bin, base_high);
    const __mmask16 above = _mm512_cmp_ps_mask(scaled, threshold, _CMP_GT_OQ);
    return _mm512_mask_add_epi32(base, above, base, _mm512_set1_epi32(1));
  }
};

// 32 consecutive values as floats: those at even and those at odd positions.
struct Pairs {
  __m512 even, odd;
};

template <Dtype dtype>
Pairs load_pairs(const void* values, int group);

Pairs deinterleave(__m512 first, __m512 second) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return {_mm512_permutex2var_ps(first, even, second), _mm512_permutex2var_ps(first, odd, second)};
}

template <>
Pairs load_pairs<Dtype::float32>(const void* values, int group) {
  const float* source = static_cast<const float*>(values) + 32 * group;
  return deinterleave(_mm512_loadu_ps(source), _mm512_loadu_ps(source + 16));
}

template <>
Pairs load_pairs<Dtype::float16>(const void* values, int group) {
  const __m256i* source = static_cast<const __m256i*>(values) + 2 * group;
  return deinterleave(_mm512_cvtph_ps(_mm256_loadu_si256(source)),
                      _mm512_cvtph_ps(_mm256_loadu_si256(source + 1)));
}

template <>
Pairs load_pairs<Dtype::bfloat16>(const void* values, int group) {
  const __m512i both = _mm512_loadu_si512(static_cast<const __m512i*>(values) + group);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000u))))};
}

template <Dtype dtype>
int64_t encode(const void* values, int64_t num_blocks, uint8_t* codes, float* absmax) {
  const Search search;
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  for (int64_t block = 0; block < num_blocks; ++block) {
    const Pairs first = load_pairs<dtype>(values, 0), second = load_pairs<dtype>(values, 1);
    const auto bits = [magnitude](__m512 value) {
      return _mm512_and_si512(_mm512_castps_si512(value), magnitude);
    };
    const __m512i most = _mm512_max_epu32(_mm512_max_epu32(bits(first.even), bits(first.odd)),
                                          _mm512_max_epu32(bits(second.even), bits(second.odd)));
    const uint32_t largest = _mm512_reduce_max_epu32(most);
    if (largest >= 0x7f800000u) return block;
    __builtin_memcpy(absmax + block, &largest, sizeof largest);
    const float reciprocal = 1.0f / absmax[block];
    const __m512 factor = _mm512_set1_ps(reciprocal < FLT_MAX ? reciprocal : FLT_MAX);
    const auto join = [&search, factor](const Pairs& pairs) {
      const __m512i high = search(_mm512_mul_ps(pairs.even, factor));
      const __m512i low = search(_mm512_mul_ps(pairs.odd, factor));
      return _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_slli_epi32(high, 4), low));
    };
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), join(first));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes) + 1, join(second));
    values = static_cast<const char*>(values) + kBlock * (dtype == Dtype::float32 ? 4 : 2);
    codes += kBlockBytes;
  }
  return -1;
}

}  // namespace

int64_t quantize_blocks_avx512(const void* values, Dtype dtype, int64_t num_blocks, uint8_t* codes,
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
