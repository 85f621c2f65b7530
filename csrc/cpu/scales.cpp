// Block scales from their 8-bit form: round(round(map[q] * nested_absmax) + offset), two roundings. This file
// is compiled without contraction to fused multiply-add, which would round once.
#include "kernels.h"

namespace nf4 {

void decode_scales(const Packed& packed, int64_t first, int64_t count, float* scales) {
  const float offset = packed.nested_offset;
  for (int64_t done = 0; done < count;) {
    const int64_t begin = first + done;
    const int64_t nested = begin / kNestedBlock;
    const int64_t left = (nested + 1) * kNestedBlock - begin;
    const int64_t run = left < count - done ? left : count - done;
    const float factor = packed.nested_absmax[nested];
    const uint8_t* codes = packed.absmax + begin;
    float* const out = scales + done;
    // In two loops, so that the second one vectorizes.
    for (int64_t i = 0; i < run; ++i) out[i] = packed.nested_quant_map[codes[i]];
    for (int64_t i = 0; i < run; ++i) out[i] = out[i] * factor + offset;
    done += run;
  }
}

}  // namespace nf4
