// The searching encoder with AVX2; see search.h.
#include <immintrin.h>

#include "search.h"

namespace nf4 {
namespace {

// Values 8 * part .. 8 * part + 7 of a block.
__m256 load_part(const void* block, Dtype dtype, int part) {
  if (dtype == Dtype::float32) return _mm256_loadu_ps(static_cast<const float*>(block) + 8 * part);
  const __m128i halves = _mm_loadu_si128(static_cast<const __m128i*>(block) + part);
  if (dtype == Dtype::float16) return _mm256_cvtph_ps(halves);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

float largest_magnitude(const __m256* parts) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i most = _mm256_setzero_si256();  // of bits, which order like magnitudes, with NaN above all
  for (int part = 0; part < 8; ++part) {
    most = _mm256_max_epu32(most, _mm256_and_si256(_mm256_castps_si256(parts[part]), magnitude));
  }
  __m128i four = _mm_max_epu32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4e));
  four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0xb1));
  return _mm_cvtss_f32(_mm_castsi128_ps(four));
}

// Adds up squared distances from the nearest levels, as 8 partial sums.
class Distances {
 public:
  explicit Distances(const FixedLevels& levels)
      : first_(_mm256_set1_epi16(levels.borders[3])),
        low_(_mm256_set1_epi16(levels.borders[1])),
        high_(_mm256_set1_epi16(levels.borders[5])),
        borders_(table(levels.borders)),
        middles_(table(levels.middles)),
        halves_(table(levels.halves)) {}

  __m256i add(__m256i sum, __m256i y) const {
    // Byte positions of the pair's entries: twice its number, and one more for the upper byte.
    const __m256i upper = _mm256_cmpgt_epi16(y, first_);
    const __m256i quarter = _mm256_cmpgt_epi16(y, _mm256_blendv_epi8(low_, high_, upper));
    __m256i entry = _mm256_blendv_epi8(_mm256_set1_epi16(0x0100), _mm256_set1_epi16(0x0908), upper);
    entry = _mm256_or_si256(entry, _mm256_and_si256(quarter, _mm256_set1_epi16(0x0404)));
    const __m256i eighth = _mm256_cmpgt_epi16(y, _mm256_shuffle_epi8(borders_, entry));
    entry = _mm256_or_si256(entry, _mm256_and_si256(eighth, _mm256_set1_epi16(0x0202)));
    const __m256i from_middle = _mm256_abs_epi16(_mm256_sub_epi16(y, _mm256_shuffle_epi8(middles_, entry)));
    const __m256i distance = _mm256_sub_epi16(from_middle, _mm256_shuffle_epi8(halves_, entry));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(distance, distance));
  }

 private:
  static __m256i table(const int16_t* entries) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(entries)));
  }

  __m256i first_, low_, high_, borders_, middles_, halves_;
};

// Distances from the nearest levels in the coarse fixed point, of the magnitudes of 32 values.
class CoarseDistances {
 public:
  explicit CoarseDistances(const CoarseLevels& levels)
      : lows_(table(levels.bin_lows)), highs_(table(levels.bin_highs)), levels_(levels.levels) {}

  __m256i from_bins(__m256i magnitude, __m256i bin) const {
    return _mm256_min_epu8(distance(magnitude, _mm256_shuffle_epi8(lows_, bin)),
                           distance(magnitude, _mm256_shuffle_epi8(highs_, bin)));
  }

  // Where bins do not serve.
  __m256i from_any(__m256i magnitude) const {
    __m256i least = _mm256_set1_epi8(-1);
    for (int i = 0; i < 16; ++i) {
      least = _mm256_min_epu8(least, distance(magnitude, _mm256_set1_epi8(levels_[i])));
    }
    return least;
  }

 private:
  static __m256i table(const int8_t* entries) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(entries)));
  }

  // Saturated: what is farther than 127 is never the nearest.
  static __m256i distance(__m256i y, __m256i level) { return _mm256_abs_epi8(_mm256_subs_epi8(y, level)); }

  __m256i lows_, highs_;
  const int8_t* levels_;
};

// Lane i: the sum of the lanes of sums[i].
__m256i sum_each(const __m256i* sums) {
  const __m256i first = _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0], sums[1]),  //
                                          _mm256_hadd_epi32(sums[2], sums[3]));
  const __m256i second = _mm256_hadd_epi32(_mm256_hadd_epi32(sums[4], sums[5]),  //
                                           _mm256_hadd_epi32(sums[6], sums[7]));
  return _mm256_add_epi32(_mm256_permute2x128_si256(first, second, 0x20),
                          _mm256_permute2x128_si256(first, second, 0x31));
}

// Index of the first of the least errors: 0 to 15 for plus, 16 to 31 for minus.
int least_of(const __m256* errors) {
  __m256 least = _mm256_min_ps(_mm256_min_ps(errors[0], errors[1]), _mm256_min_ps(errors[2], errors[3]));
  least = _mm256_min_ps(least, _mm256_permute2f128_ps(least, least, 1));
  least = _mm256_min_ps(least, _mm256_shuffle_ps(least, least, 0x4e));
  least = _mm256_min_ps(least, _mm256_shuffle_ps(least, least, 0xb1));
  unsigned equal = 0;
  for (int i = 0; i < 4; ++i) {
    equal |= unsigned(_mm256_movemask_ps(_mm256_cmp_ps(errors[i], least, _CMP_EQ_OQ))) << 8 * i;
  }
  return __builtin_ctz(equal);
}

// Scales of the multipliers with the least and the second least error.
void two_least(const SearchTables& tables, const __m256i* sums, float absmax, float* wanted) {
  const __m256 infinity = _mm256_set1_ps(__builtin_inff());
  __m256 errors[4];
  for (int i = 0; i < 4; ++i) {
    errors[i] = _mm256_mul_ps(_mm256_cvtepi32_ps(sum_each(sums + 8 * i)),
                              _mm256_load_ps(tables.squares + 8 * (i & 1)));
    // What lies beyond the multipliers is infinite.
    if (i & 1) errors[i] = _mm256_blend_ps(errors[i], infinity, 0xe0);
  }
  const int least = least_of(errors);
  wanted[0] = scale_of(tables.multipliers[least & 15], least >= 16, absmax);
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (int i = 0; i < 4; ++i) {
    const __m256i taken = _mm256_cmpeq_epi32(lanes, _mm256_set1_epi32(least - 8 * i));
    errors[i] = _mm256_blendv_ps(errors[i], infinity, _mm256_castsi256_ps(taken));
  }
  const int second = least_of(errors);
  wanted[1] = scale_of(tables.multipliers[second & 15], second >= 16, absmax);
}

// Codes are kept as negative numbers, because comparisons give 0 or -1, and tables laid out by -index modulo
// 8, which is how the permute reads such a number.
struct Thresholds {
  __m256 t7, t3, t11, third, fourth;
  explicit Thresholds(const SearchTables& tables) {
    alignas(32) float quarters[8], eighths[8];
    for (int i = 0; i < 8; ++i) {
      quarters[-i & 7] = tables.thresholds[4 * (i & 3) + 1];
      eighths[-i & 7] = tables.thresholds[2 * i];
    }
    t7 = _mm256_set1_ps(tables.thresholds[7]);
    t3 = _mm256_set1_ps(tables.thresholds[3]);
    t11 = _mm256_set1_ps(tables.thresholds[11]);
    third = _mm256_load_ps(quarters);
    fourth = _mm256_load_ps(eighths);
  }

  // Minus the code of each value.
  __m256i codes(__m256 scaled) const {
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

// 32 codes, given as minus the codes, to a byte each and in order.
__m256i to_bytes(const __m256i* negative) {
  const __m256i words = _mm256_packs_epi16(_mm256_packs_epi32(negative[0], negative[1]),
                                           _mm256_packs_epi32(negative[2], negative[3]));
  const __m256i ordered = _mm256_permutevar8x32_epi32(words, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  return _mm256_sub_epi8(_mm256_setzero_si256(), ordered);
}

void store_codes(const __m256i* negative, uint8_t* codes) {
  const __m256i weights = _mm256_set1_epi16(0x0110);  // the first code of two is worth 16
  const __m256i packed = _mm256_packus_epi16(_mm256_maddubs_epi16(to_bytes(negative), weights),
                                             _mm256_maddubs_epi16(to_bytes(negative + 4), weights));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), _mm256_permute4x64_epi64(packed, 0xd8));
}

}  // namespace

namespace {

// Sums of squared distances of a block, for one multiplier and both signs, as 8 partial sums.
template <bool has_bins>
void add_up(const CoarseDistances& plus, const CoarseDistances& minus, const __m256i* x, __m256i inverse,
            __m256i* above, __m256i* below) {
  const __m256i low_bits = _mm256_set1_epi8(0x0f);
  __m256i squares[2][2];  // in 16 bits: four of at most 84^2 stay below 2^15
  for (int i = 0; i < 2; ++i) {
    const __m256i y = _mm256_packs_epi16(_mm256_mulhrs_epi16(x[2 * i], inverse),
                                         _mm256_mulhrs_epi16(x[2 * i + 1], inverse));
    const __m256i magnitude = _mm256_abs_epi8(y);
    __m256i distances[2];  // of y from the levels, if it is not negative, and of -y
    if (has_bins) {
      const __m256i bin = _mm256_and_si256(_mm256_srli_epi16(magnitude, kCoarseBinShift), low_bits);
      distances[0] = plus.from_bins(magnitude, bin);
      distances[1] = minus.from_bins(magnitude, bin);
    } else {
      distances[0] = plus.from_any(magnitude);
      distances[1] = minus.from_any(magnitude);
    }
    const __m256i with_plus = _mm256_blendv_epi8(distances[0], distances[1], y);
    const __m256i with_minus = _mm256_blendv_epi8(distances[1], distances[0], y);
    squares[0][i] = _mm256_maddubs_epi16(with_plus, with_plus);
    squares[1][i] = _mm256_maddubs_epi16(with_minus, with_minus);
  }
  const __m256i ones = _mm256_set1_epi16(1);
  *above = _mm256_madd_epi16(_mm256_add_epi16(squares[0][0], squares[0][1]), ones);
  *below = _mm256_madd_epi16(_mm256_add_epi16(squares[1][0], squares[1][1]), ones);
}

template <bool has_bins>
int64_t find_scales(const SearchTables& tables, const void* values, Dtype dtype, int64_t num_blocks,
                    int16_t* x, float* absmax, float* wanted) {
  const CoarseDistances plus(tables.coarse_plus), minus(tables.coarse_minus);
  for (int64_t block = 0; block < num_blocks; ++block) {
    __m256 parts[8];
    for (int part = 0; part < 8; ++part) parts[part] = load_part(values, dtype, part);
    absmax[block] = largest_magnitude(parts);
    if (!(absmax[block] < __builtin_inff())) return block;
    const __m256 factor = _mm256_set1_ps(limited_inverse(32767.0f, absmax[block]));
    __m256i fixed[4];
    for (int i = 0; i < 4; ++i) {
      fixed[i] = _mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(parts[2 * i], factor)),
                                    _mm256_cvtps_epi32(_mm256_mul_ps(parts[2 * i + 1], factor)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(x + block * kBlock) + i, fixed[i]);
    }
    __m256i sums[32];
    for (int i = kMultipliers; i < 16; ++i) sums[i] = sums[16 + i] = _mm256_setzero_si256();
    for (int i = 0; i < kMultipliers; ++i) {
      add_up<has_bins>(plus, minus, fixed, _mm256_set1_epi16(tables.inverses[i]), sums + i, sums + 16 + i);
    }
    two_least(tables, sums, absmax[block], wanted + block * kWanted);
    values = static_cast<const char*>(values) + kBlock * (dtype == Dtype::float32 ? 4 : 2);
  }
  return -1;
}

}  // namespace

int64_t find_scales_avx2(const SearchTables& tables, const void* values, Dtype dtype, int64_t num_blocks,
                         int16_t* x, float* absmax, float* wanted) {
  const auto find = tables.has_bins ? find_scales<true> : find_scales<false>;
  return find(tables, values, dtype, num_blocks, x, absmax, wanted);
}

void measure_blocks_avx2(const SearchTables& tables, const int16_t* x, const int16_t* inverses,
                         int64_t num_blocks, int per_block, int32_t* errors) {
  const Distances plus(tables.plus);
  for (int64_t i = 0; i < num_blocks * per_block; ++i) {
    const __m256i* const fixed = reinterpret_cast<const __m256i*>(x + i / per_block * kBlock);
    const __m256i sign = _mm256_set1_epi16(inverses[i]), inverse = _mm256_abs_epi16(sign);
    __m256i sum = _mm256_setzero_si256();
    for (int j = 0; j < 4; ++j) {
      const __m256i y = _mm256_mulhrs_epi16(_mm256_loadu_si256(fixed + j), inverse);
      sum = plus.add(sum, _mm256_sign_epi16(y, sign));
    }
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    errors[i] = _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
  }
}

void encode_blocks_avx2(const SearchTables& tables, const void* values, Dtype dtype, int64_t num_blocks,
                        const float* scales, uint8_t* codes) {
  const Thresholds thresholds(tables);
  for (int64_t block = 0; block < num_blocks; ++block) {
    const __m256 factor = _mm256_set1_ps(factor_of(scales[block]));
    __m256i negative[8];
    for (int part = 0; part < 8; ++part) {
      negative[part] = thresholds.codes(_mm256_mul_ps(load_part(values, dtype, part), factor));
    }
    store_codes(negative, codes);
    codes += kBlockBytes;
    values = static_cast<const char*>(values) + kBlock * (dtype == Dtype::float32 ? 4 : 2);
  }
}

}  // namespace nf4
