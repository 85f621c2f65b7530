// The searching encoder in plain C++; see search.h.
#include <cmath>

#include "rounding.h"
#include "search.h"

namespace nf4 {
namespace {

// The largest magnitude of a block, or a NaN or infinity if it has one.
float widen_block(const void* values, Dtype dtype, int64_t block, float* wide) {
  uint32_t largest = 0;  // of the magnitudes' bits, which order like the magnitudes, with NaN above all
  for (int64_t i = 0; i < kBlock; ++i) {
    const int64_t at = block * kBlock + i;
    wide[i] = dtype == Dtype::float32    ? static_cast<const float*>(values)[at]
              : dtype == Dtype::bfloat16 ? bf16_to_float(static_cast<const uint16_t*>(values)[at])
                                         : fp16_to_float(static_cast<const uint16_t*>(values)[at]);
    const uint32_t magnitude = bits_of(wide[i]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return float_of(largest);
}

template <bool has_bins>
int32_t error_with(const FixedLevels& levels, const int16_t* x, int32_t inverse) {
  int32_t sum = 0;
  for (int64_t i = 0; i < kBlock; ++i) {
    const int32_t y = (x[i] * inverse + (1 << 14)) >> 15;
    const int32_t distance = distance_from_level<has_bins>(levels, y);
    sum += distance * distance;
  }
  return sum;
}

// `inverse`: of the scale's magnitude.
int32_t error_of(const SearchTables& tables, bool minus, const int16_t* x, int32_t inverse) {
  const FixedLevels& levels = minus ? tables.minus : tables.plus;
  return tables.has_bins ? error_with<true>(levels, x, inverse) : error_with<false>(levels, x, inverse);
}

int32_t coarse_error(const CoarseLevels& levels, const int16_t* x, int32_t inverse) {
  int32_t sum = 0;
  for (int64_t i = 0; i < kBlock; ++i) {
    const int32_t distance = levels.distances[((x[i] * inverse + (1 << 14)) >> 15) & 255];
    sum += distance * distance;
  }
  return sum;
}

unsigned code_of(const SearchTables& tables, float scaled) {
  const float* const thresholds = tables.thresholds;
  unsigned code = scaled > thresholds[7] ? 8 : 0;
  code += scaled > thresholds[code + 3] ? 4 : 0;
  code += scaled > thresholds[code + 1] ? 2 : 0;
  code += scaled > thresholds[code] ? 1 : 0;
  return code;
}

}  // namespace

int64_t find_scales_portable(const SearchTables& tables, const void* values, Dtype dtype, int64_t num_blocks,
                             int16_t* x, float* absmax, float* wanted) {
  for (int64_t block = 0; block < num_blocks; ++block) {
    float wide[kBlock];
    absmax[block] = widen_block(values, dtype, block, wide);
    if (!(absmax[block] < float_of(0x7f800000u))) return block;
    const float factor = limited_inverse(32767.0f, absmax[block]);
    for (int64_t i = 0; i < kBlock; ++i) x[i] = int16_t(bits_of(wide[i] * factor + kMagic) - bits_of(kMagic));
    float least = INFINITY, second = INFINITY;
    wanted[0] = wanted[1] = 0.0f;
    for (int sign = 0; sign < 2; ++sign) {
      for (int i = 0; i < kMultipliers; ++i) {
        const CoarseLevels& levels = sign ? tables.coarse_minus : tables.coarse_plus;
        const float error = float(coarse_error(levels, x, tables.inverses[i])) * tables.squares[i];
        const float scale = scale_of(tables.multipliers[i], sign, absmax[block]);
        if (error < least) {
          wanted[1] = wanted[0];
          second = least;
          wanted[0] = scale;
          least = error;
        } else if (error < second) {
          wanted[1] = scale;
          second = error;
        }
      }
    }
    wanted += kWanted;
    x += kBlock;
  }
  return -1;
}

void measure_blocks_portable(const SearchTables& tables, const int16_t* x, const int16_t* inverses,
                             int64_t num_blocks, int per_block, int32_t* errors) {
  for (int64_t i = 0; i < num_blocks * per_block; ++i) {
    const int32_t inverse = inverses[i];
    errors[i] = error_of(tables, inverse < 0, x + i / per_block * kBlock, inverse < 0 ? -inverse : inverse);
  }
}

void encode_blocks_portable(const SearchTables& tables, const void* values, Dtype dtype, int64_t num_blocks,
                            const float* scales, uint8_t* codes) {
  for (int64_t block = 0; block < num_blocks; ++block) {
    float wide[kBlock];
    widen_block(values, dtype, block, wide);
    const float factor = factor_of(scales[block]);
    for (int64_t i = 0; i < kBlockBytes; ++i) {
      codes[i] =
          uint8_t(code_of(tables, wide[2 * i] * factor) << 4 | code_of(tables, wide[2 * i + 1] * factor));
    }
    codes += kBlockBytes;
  }
}

}  // namespace nf4
