// The parts of the few-row product: its configurations, tables, fragments of x and scale codes. The picture
// of how they fit together is the comment of linear_few_rows.cu.
#pragma once

#include "nf4.cuh"

namespace nf4 {
namespace {

constexpr int kTileRows = 16;
constexpr uint32_t kAll = 0xffffffffu;

struct FewRows {
  Nf4Linear parts[NF4_MOST_WEIGHTS];
  int first_cta[NF4_MOST_WEIGHTS + 1];
  int num_weights;
  const void* x;
  int num_tokens;
  int k;
  int num_chunks;
};

// kBlocks of a warp's slice; kWide: the scale codes of a slice can be read as one word and share a
// nested_absmax. 8 warps: two CTAs fit an SM, their rings of 2 slots lie between the table rows.
// 16 warps: one CTA an SM, which reads x once; rings of 3 slots.
template <int kBlocks_, int kPhases_, int kTokenTiles_, bool kWide_, int kWarps_>
struct Config {
  static constexpr int kBlocks = kBlocks_, kPhases = kPhases_, kTokenTiles = kTokenTiles_, kWarps = kWarps_;
  static constexpr bool kWide = kWide_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kTokens = 8 / kPhases * kTokenTiles;  // of a CTA
  static constexpr bool kDense = kWarps > 8;
  static constexpr int kMinCtas = kDense ? 1 : 2;
  static constexpr int kStages = kDense ? 3 : 2;
  static constexpr int kPitch = kDense ? 128 : 256;
  static constexpr int kSlotBytes = kTileRows * kPitch;
  static constexpr int kTableBytes = 256 * 256;
  static constexpr int kRing = kDense ? kTableBytes : 128;
  static constexpr int kMap = kTableBytes + (kDense ? kWarps * kStages * kSlotBytes : 0);
  static constexpr int kPartial = kMap + 256 * 16;
  static constexpr int kSum = kPartial + 2 * kWarps * kTileRows * kTokens * 4;
  static constexpr int kMaxTiles =
      kTokenTiles > 1 && !kDense ? 8 : 16;  // of a CTA where K takes several chunks
  static constexpr int kSharedBytes = kSum + kMaxTiles * kTileRows * kTokens * 4;
};

__device__ inline void copy_async(uint32_t target, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Level pairs of all bytes, 32 copies; the row of byte q starts at 256 q. Four copies of the scale map.
// Thread q brings entry q of the map, and level q % 16.
__device__ inline void fill_tables(uint8_t* table, uint8_t* map, float mapped, float level) {
  const int q = threadIdx.x;
  if (q >= 256) return;
  const __half2 pair = __floats2half2_rn(__shfl_sync(kAll, level, q >> 4), level);
  const uint32_t word = reinterpret_cast<const uint32_t&>(pair);
#pragma unroll
  for (int i = 0; i < 8; ++i) {  // staggered, so that the 8 lanes of a pass write different banks
    *reinterpret_cast<uint4*>(table + q * 256 + (i + q) % 8 * 16) = make_uint4(word, word, word, word);
  }
  *reinterpret_cast<float4*>(map + q * 16) = make_float4(mapped, mapped, mapped, mapped);
}

// Blocks first_block, first_block + kPhases, ... of one token as B fragments, and the factor that takes a
// result back. The 4 * kPhases lanes of a token agree on the factor, because their columns are added up.
template <typename T, int kPhases, int kSets>
__device__ inline float load_x(const FewRows& p, int token, int first_block, int num_blocks,
                               uint32_t (&x)[kSets][8]) {
  const int t = threadIdx.x % 4;
  const T* row = static_cast<const T*>(p.x) + int64_t{token} * p.k + 16 * t;
#pragma unroll
  for (int s = 0; s < kSets; ++s) {
    uint4 low = {}, high = {};
    if (token < p.num_tokens && first_block + s * kPhases < num_blocks) {
      const uint4* source = reinterpret_cast<const uint4*>(row + (first_block + s * kPhases) * kBlock);
      low = source[0];
      high = source[1];
    }
    x[s][0] = low.x, x[s][1] = low.y, x[s][2] = low.z, x[s][3] = low.w;
    x[s][4] = high.x, x[s][5] = high.y, x[s][6] = high.z, x[s][7] = high.w;
  }
  if constexpr (__is_same(T, __half)) {
    return 1.0f;
  } else {
    __nv_bfloat162 largest = __floats2bfloat162_rn(0.0f, 0.0f);
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t magnitude = x[s][i] & 0x7fff7fffu;
        largest = __hmax2_nan(largest, reinterpret_cast<const __nv_bfloat162&>(magnitude));
      }
    }
    const uint32_t bits = reinterpret_cast<const uint32_t&>(largest);
    int exponent = max((bits >> 7) & 255, bits >> 23);
#pragma unroll
    for (int step = 1; step < 4 * kPhases; step *= 2) {
      exponent = max(exponent, __shfl_xor_sync(kAll, exponent, step));
    }
    // The largest exponent becomes 30, the largest of finite fp16, and 3 bits widen the mantissa; infinities
    // and NaN stay what they are. Below 2^-29 of the largest value the difference is negative: zero.
    exponent = min(max(exponent, 30), 254);
    const uint32_t lower = static_cast<uint32_t>((30 - exponent) * 128) & 0xffff;
    const uint32_t both = lower << 16 | lower;
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t magnitude = __viaddmax_s16x2_relu(x[s][i] & 0x7fff7fffu, both, 0u);
        x[s][i] = (x[s][i] & 0x80008000u) | magnitude << 3;
      }
    }
    return __int_as_float((exponent - 15) << 23);
  }
}

// The scale codes of one row of a slice, one byte a block, and their common nested_absmax where kWide.
template <int kBlocks, bool kWide>
__device__ inline void fetch_scale_codes(const Nf4Weight& weight, int row, int first_block, int num_blocks,
                                         uint32_t (&codes)[kBlocks / 4], float* nested) {
  if constexpr (kWide) {
    const int64_t at = int64_t{row} * num_blocks + min(first_block, num_blocks - kBlocks);
    if constexpr (kBlocks == 8) {
      const uint2 words = __ldg(reinterpret_cast<const uint2*>(weight.absmax + at));
      codes[0] = words.x, codes[1] = words.y;
    } else {
      codes[0] = __ldg(reinterpret_cast<const uint32_t*>(weight.absmax + at));
    }
    *nested = __ldg(weight.nested_absmax + static_cast<uint64_t>(at) / kNestedBlock);
  } else {
    static_assert(kBlocks == 4);
    codes[0] = 0;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const int64_t at = int64_t{row} * num_blocks + min(first_block + b, num_blocks - 1);
      codes[0] |= static_cast<uint32_t>(__ldg(weight.absmax + at)) << (b * 8);
    }
  }
}

__device__ inline float nested_absmax_at(const Nf4Weight& weight, int row, int block, int num_blocks) {
  const int64_t at = int64_t{row} * num_blocks + min(block, num_blocks - 1);
  return __ldg(weight.nested_absmax + static_cast<uint64_t>(at) / kNestedBlock);
}

// One warp's share of a tile, [16 rows][kTokens]: phases added up, activations' factors taken back.
template <typename C>
__device__ inline void store_partial(float* partial, float (&y)[C::kTokenTiles][4],
                                     const float (&inverse)[C::kTokenTiles][2], int g, int t) {
  constexpr int kRow = C::kTokens;
  if constexpr (C::kPhases == 1) {
#pragma unroll
    for (int m = 0; m < C::kTokenTiles; ++m) {
      float* target = partial + g * kRow + m * 8 + 2 * t;
      *reinterpret_cast<float2*>(target) = make_float2(y[m][0] * inverse[m][0], y[m][1] * inverse[m][1]);
      *reinterpret_cast<float2*>(target + 8 * kRow) =
          make_float2(y[m][2] * inverse[m][0], y[m][3] * inverse[m][1]);
    }
  } else {
    constexpr int kLanes = C::kPhases / 2;  // lanes of a quad that hold one token
    float low = y[0][0], high = y[0][2];
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
      low += __shfl_xor_sync(kAll, low, step);
      high += __shfl_xor_sync(kAll, high, step);
    }
    if (t % kLanes == 0) {
      partial[g * kRow + t / kLanes] = low * inverse[0][0];
      partial[(g + 8) * kRow + t / kLanes] = high * inverse[0][0];
    }
  }
}

}  // namespace
}  // namespace nf4
