// Encoding in plain C++: absmax, one reciprocal a block, and a four-step search of the thresholds.
#include <cfloat>

#include "codebook.h"
#include "kernels.h"
#include "rounding.h"

namespace nf4 {
namespace {

unsigned code_of(float scaled) {
  unsigned code = scaled > kThresholds[7] ? 8 : 0;
  code += scaled > kThresholds[code + 3] ? 4 : 0;
  code += scaled > kThresholds[code + 1] ? 2 : 0;
  code += scaled > kThresholds[code] ? 1 : 0;
  return code;
}

template <typename T>
int64_t encode(const T* values, float (*widen)(T), int64_t num_blocks, uint8_t* codes, float* absmax) {
  for (int64_t block = 0; block < num_blocks; ++block) {
    float wide[kBlock];
    uint32_t largest = 0;  // of the magnitudes' bits, which order like the magnitudes, with NaN above all
    for (int64_t i = 0; i < kBlock; ++i) {
      wide[i] = widen(values[i]);
      const uint32_t magnitude = bits_of(wide[i]) & 0x7fffffffu;
      largest = magnitude > largest ? magnitude : largest;
    }
    if (largest >= 0x7f800000u) return block;
    absmax[block] = float_of(largest);
    const float reciprocal = 1.0f / absmax[block];
    const float factor = reciprocal < FLT_MAX ? reciprocal : FLT_MAX;  // so that 0 * factor is 0
    for (int64_t i = 0; i < kBlockBytes; ++i) {
      codes[i] = uint8_t(code_of(wide[2 * i] * factor) << 4 | code_of(wide[2 * i + 1] * factor));
    }
    values += kBlock;
    codes += kBlockBytes;
  }
  return -1;
}

}  // namespace

int64_t quantize_blocks_portable(const void* values, Dtype dtype, int64_t num_blocks, uint8_t* codes,
                                 float* absmax) {
  const auto* halves = static_cast<const uint16_t*>(values);
  switch (dtype) {
    case Dtype::float32:
      return encode<float>(
          static_cast<const float*>(values), [](float value) { return value; }, num_blocks, codes, absmax);
    case Dtype::bfloat16:
      return encode<uint16_t>(halves, bf16_to_float, num_blocks, codes, absmax);
    case Dtype::float16:
      return encode<uint16_t>(halves, fp16_to_float, num_blocks, codes, absmax);
  }
  return -1;
}

}  // namespace nf4
