// The searching encoder with AVX-512; see search.h.
#include <immintrin.h>

#include "search.h"

namespace nf4 {

void measure_blocks_avx2(const SearchTables&, const int16_t*, const int16_t*, int64_t, int, int32_t*);

namespace {

// Values 16 * part .. 16 * part + 15 of a block.
__m512 load_part(const void* block, Dtype dtype, int part) {
  if (dtype == Dtype::float32) return _mm512_loadu_ps(static_cast<const float*>(block) + 16 * part);
  const __m256i halves = _mm256_loadu_si256(static_cast<const __m256i*>(block) + part);
  if (dtype == Dtype::float16) return _mm512_cvtph_ps(halves);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

float largest_magnitude(const __m512* parts) {
  const auto bits = [](__m512 part) {
    return _mm512_and_si512(_mm512_castps_si512(part), _mm512_set1_epi32(0x7fffffff));
  };
  const __m512i most = _mm512_max_epu32(_mm512_max_epu32(bits(parts[0]), bits(parts[1])),
                                        _mm512_max_epu32(bits(parts[2]), bits(parts[3])));
  const uint32_t largest = _mm512_reduce_max_epu32(most);
  float value;
  __builtin_memcpy(&value, &largest, sizeof value);
  return value;
}

// Adds up squared distances from the nearest levels, as 16 partial sums.
class Distances {
 public:
  explicit Distances(const FixedLevels& levels)
      : middles_(_mm512_load_si512(levels.bin_middles)), halves_(_mm512_load_si512(levels.bin_halves)) {}

  __m512i add(__m512i sum, __m512i y) const { return add(sum, y, _mm512_srai_epi16(y, kBinShift)); }

  // `bin`: of y; its low five bits count.
  __m512i add(__m512i sum, __m512i y, __m512i bin) const {
    const __m512i from_middle =
        _mm512_abs_epi16(_mm512_sub_epi16(y, _mm512_permutexvar_epi16(bin, middles_)));
    const __m512i distance = _mm512_sub_epi16(from_middle, _mm512_permutexvar_epi16(bin, halves_));
    return _mm512_dpwssd_epi32(sum, distance, distance);
  }

 private:
  __m512i middles_, halves_;
};

// Distances from the nearest levels in the coarse fixed point, of the magnitudes of 64 values.
struct CoarseDistances {
  __m512i low, high;
  explicit CoarseDistances(const CoarseLevels& levels)
      : low(_mm512_load_si512(levels.distances)), high(_mm512_load_si512(levels.distances + 64)) {}

  __m512i of(__m512i magnitude) const { return _mm512_permutex2var_epi8(low, magnitude, high); }
};

// Lane i: the sum of the lanes of sums[i].
__m512i sum_each(const __m512i* sums) {
  __m512i fours[4];
  for (int i = 0; i < 4; ++i) {
    const auto add_words = [](__m512i a, __m512i b) {
      return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    };
    const __m512i first = add_words(sums[4 * i], sums[4 * i + 1]);
    const __m512i second = add_words(sums[4 * i + 2], sums[4 * i + 3]);
    fours[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second));
  }
  const auto add_quarters = [](__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
  };
  return add_quarters(add_quarters(fours[0], fours[1]), add_quarters(fours[2], fours[3]));
}

// Scales of the multipliers with the least and the second least error.
void two_least(const SearchTables& tables, const __m512i* sums, float absmax, float* wanted) {
  const __mmask16 multipliers = (1 << kMultipliers) - 1;
  const __m512 squares = _mm512_load_ps(tables.squares), infinity = _mm512_set1_ps(__builtin_inff());
  const auto errors = [&](const __m512i* sixteen) {
    return _mm512_mask_mul_ps(infinity, multipliers, _mm512_cvtepi32_ps(sum_each(sixteen)), squares);
  };
  __m512 plus = errors(sums), minus = errors(sums + 16);
  for (int i = 0; i < kWanted; ++i) {
    const __m512 least = _mm512_set1_ps(_mm512_reduce_min_ps(_mm512_min_ps(plus, minus)));
    const unsigned low = _mm512_cmp_ps_mask(plus, least, _CMP_EQ_OQ);
    const unsigned high = _mm512_cmp_ps_mask(minus, least, _CMP_EQ_OQ);
    const int first = __builtin_ctz(low | high << 16);
    wanted[i] = scale_of(tables.multipliers[first & 15], first >= 16, absmax);
    plus = _mm512_mask_mov_ps(plus, __mmask16(1u << first), infinity);
    minus = _mm512_mask_mov_ps(minus, __mmask16((1u << first) >> 16), infinity);
  }
}

struct Thresholds {
  __m512 second, third, fourth;
  float first;
  explicit Thresholds(const SearchTables& tables) : first(tables.thresholds[7]) {
    // Entry c: the threshold that decides the next bit of a code that is c so far.
    alignas(64) float seconds[16] = {}, thirds[16] = {}, fourths[16] = {};
    for (int code = 0; code < 16; code += 8) seconds[code] = tables.thresholds[code + 3];
    for (int code = 0; code < 16; code += 4) thirds[code] = tables.thresholds[code + 1];
    for (int code = 0; code < 16; code += 2) fourths[code] = tables.thresholds[code];
    second = _mm512_load_ps(seconds);
    third = _mm512_load_ps(thirds);
    fourth = _mm512_load_ps(fourths);
  }

  __m512i codes(__m512 scaled) const {
    const auto append = [scaled](__m512i code, __m512 threshold, int bit) {
      const __mmask16 greater = _mm512_cmp_ps_mask(scaled, threshold, _CMP_GT_OQ);
      return _mm512_mask_add_epi32(code, greater, code, _mm512_set1_epi32(bit));
    };
    __m512i code = append(_mm512_setzero_si512(), _mm512_set1_ps(first), 8);
    code = append(code, _mm512_permutexvar_ps(code, second), 4);
    code = append(code, _mm512_permutexvar_ps(code, third), 2);
    return append(code, _mm512_permutexvar_ps(code, fourth), 1);
  }
};

// 16 codes, one in each 32-bit lane, to 8 bytes.
void store_codes(__m512i code, uint8_t* bytes) {
  const __m512i joined = _mm512_or_si512(_mm512_slli_epi64(code, 4), _mm512_srli_epi64(code, 32));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(bytes), _mm512_cvtepi64_epi8(joined));
}

}  // namespace

int64_t find_scales_avx512(const SearchTables& tables, const void* values, Dtype dtype, int64_t num_blocks,
                           int16_t* x, float* absmax, float* wanted) {
  const CoarseDistances plus(tables.coarse_plus), minus(tables.coarse_minus);
  for (int64_t block = 0; block < num_blocks; ++block) {
    __m512 parts[4];
    for (int part = 0; part < 4; ++part) parts[part] = load_part(values, dtype, part);
    absmax[block] = largest_magnitude(parts);
    if (!(absmax[block] < __builtin_inff())) return block;
    const __m512 factor = _mm512_set1_ps(limited_inverse(32767.0f, absmax[block]));
    __m512i fixed[2];
    for (int i = 0; i < 2; ++i) {
      fixed[i] = _mm512_packs_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(parts[2 * i], factor)),
                                    _mm512_cvtps_epi32(_mm512_mul_ps(parts[2 * i + 1], factor)));
      _mm512_storeu_si512(x + block * kBlock + 32 * i, fixed[i]);
    }
    __m512i sums[32];
    for (int i = kMultipliers; i < 16; ++i) sums[i] = sums[16 + i] = _mm512_setzero_si512();
    for (int i = 0; i < kMultipliers; ++i) {
      const __m512i inverse = _mm512_set1_epi16(tables.inverses[i]);
      const __m512i y =
          _mm512_packs_epi16(_mm512_mulhrs_epi16(fixed[0], inverse), _mm512_mulhrs_epi16(fixed[1], inverse));
      const __mmask64 negative = _mm512_movepi8_mask(y);
      const __m512i magnitude = _mm512_abs_epi8(y);
      const __m512i of_y = plus.of(magnitude), of_minus_y = minus.of(magnitude);  // if y is not negative
      const __m512i above = _mm512_mask_mov_epi8(of_y, negative, of_minus_y);
      const __m512i below = _mm512_mask_mov_epi8(of_minus_y, negative, of_y);
      sums[i] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), above, above);
      sums[16 + i] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), below, below);
    }
    two_least(tables, sums, absmax[block], wanted + block * kWanted);
    values = static_cast<const char*>(values) + kBlock * (dtype == Dtype::float32 ? 4 : 2);
  }
  return -1;
}

void measure_blocks_avx512(const SearchTables& tables, const int16_t* x, const int16_t* inverses,
                           int64_t num_blocks, int per_block, int32_t* errors) {
  if (!tables.has_bins) return measure_blocks_avx2(tables, x, inverses, num_blocks, per_block, errors);
  const Distances plus(tables.plus);
  const int64_t count = num_blocks * per_block;
  for (int64_t begin = 0; begin < count; begin += 16) {
    const int now = count - begin < 16 ? int(count - begin) : 16;
    __m512i sums[16];
    for (int i = now; i < 16; ++i) sums[i] = _mm512_setzero_si512();
    for (int i = 0; i < now; ++i) {
      const int16_t* const fixed = x + (begin + i) / per_block * kBlock;
      const __m512i inverse = _mm512_set1_epi16(inverses[begin + i]);
      const __m512i magnitude = _mm512_abs_epi16(inverse), sign = _mm512_srai_epi16(inverse, 15);
      sums[i] = _mm512_setzero_si512();
      for (int j = 0; j < 2; ++j) {
        const __m512i y = _mm512_mulhrs_epi16(_mm512_loadu_si512(fixed + 32 * j), magnitude);
        sums[i] = plus.add(sums[i], _mm512_sub_epi16(_mm512_xor_si512(y, sign), sign));
      }
    }
    _mm512_mask_storeu_epi32(errors + begin, __mmask16((1 << now) - 1), sum_each(sums));
  }
}

void encode_blocks_avx512(const SearchTables& tables, const void* values, Dtype dtype, int64_t num_blocks,
                          const float* scales, uint8_t* codes) {
  const Thresholds thresholds(tables);
  for (int64_t block = 0; block < num_blocks; ++block) {
    const __m512 factor = _mm512_set1_ps(factor_of(scales[block]));
    for (int part = 0; part < 4; ++part) {
      store_codes(thresholds.codes(_mm512_mul_ps(load_part(values, dtype, part), factor)), codes + 8 * part);
    }
    codes += kBlockBytes;
    values = static_cast<const char*>(values) + kBlock * (dtype == Dtype::float32 ? 4 : 2);
  }
}

}  // namespace nf4
