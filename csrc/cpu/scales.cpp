// Block scales from their 8-bit form: round(round(map[q] * nested_absmax) + offset), two roundings. This file
// is compiled without contraction to fused multiply-add, which would round once.
#include <cstring>

#include "isa.h"
#include "kernels.h"

namespace nf4 {
namespace {

constexpr int64_t kFewBlocks = 2048;  // that take as long as making the planes

void scale_blocks_by_loop(const ScaleMap& map, const uint8_t* codes, int64_t count, float factor,
                          float offset, float* out) {
  // In two loops, so that the second one vectorizes.
  for (int64_t i = 0; i < count; ++i) out[i] = map.values[codes[i]];
  for (int64_t i = 0; i < count; ++i) out[i] = out[i] * factor + offset;
}

}  // namespace

Scales::Scales(const Packed& packed, int64_t num_blocks)
    : packed_(packed), scale_blocks_(scale_blocks_by_loop) {
  map_.values = packed.nested_quant_map;
  const ScaleBlocks by_planes = chosen_kernels().scale_blocks;
  if (by_planes == nullptr || num_blocks <= kFewBlocks) return;
  scale_blocks_ = by_planes;
  for (int i = 0; i < 256; ++i) {
    uint8_t bytes[4];
    memcpy(bytes, map_.values + i, sizeof bytes);
    for (int byte = 0; byte < 4; ++byte) map_.planes[byte][i] = bytes[byte];
  }
}

void Scales::decode(int64_t first, int64_t count, float* out) const {
  for (const int64_t end = first + count; first < end;) {
    const int64_t nested = first / kNestedBlock;
    const int64_t left = (nested + 1) * kNestedBlock - first;
    const int64_t run = left < end - first ? left : end - first;
    scale_blocks_(map_, packed_.absmax + first, run, packed_.nested_absmax[nested], packed_.nested_offset,
                  out);
    first += run;
    out += run;
  }
}

}  // namespace nf4
