// Decoding in plain C++: scale and round the 16 levels once a block, then look up. Exact, because a block has
// no more than 16 different results.
#include "kernels.h"
#include "rounding.h"

namespace nf4 {
namespace {

template <typename T>
void decode(const uint8_t* codes, const float* scales, const float* quant_map, int64_t num_blocks, T* out,
            T (*round)(float)) {
  for (int64_t block = 0; block < num_blocks; ++block) {
    T table[16];
    for (int i = 0; i < 16; ++i) table[i] = round(quant_map[i] * scales[block]);
    for (int64_t i = 0; i < kBlockBytes; ++i) {
      out[2 * i] = table[codes[i] >> 4];
      out[2 * i + 1] = table[codes[i] & 15];
    }
    codes += kBlockBytes;
    out += kBlock;
  }
}

}  // namespace

void dequantize_blocks_portable(const uint8_t* codes, const float* scales, const float* quant_map,
                                int64_t num_blocks, void* out, Dtype out_dtype) {
  switch (out_dtype) {
    case Dtype::float32:
      return decode<float>(codes, scales, quant_map, num_blocks, static_cast<float*>(out),
                           [](float value) { return value; });
    case Dtype::bfloat16:
      return decode<uint16_t>(codes, scales, quant_map, num_blocks, static_cast<uint16_t*>(out),
                              float_to_bf16);
    case Dtype::float16:
      return decode<uint16_t>(codes, scales, quant_map, num_blocks, static_cast<uint16_t*>(out),
                              float_to_fp16);
  }
}

}  // namespace nf4
