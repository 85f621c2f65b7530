// The parts of the product for many tokens around its main loop: configurations, the kernel that arranges x
// before it and the one that adds partial sums after it. How they fit together: linear_wgmma.cu.
#pragma once

#include "nf4.cuh"

namespace nf4 {
namespace {

constexpr int kChunk = 256;     // of K: one block of 64 for each lane of a quad
constexpr int kSubs = 4;        // stages of x in a chunk, each 64 of K and 4 wgmma
constexpr int kGroupRows = 64;  // of a warpgroup
constexpr int kTableBytes = 256 * 256;
constexpr int kArrangeThreads = 128;
constexpr int kAddThreads = 128;
constexpr int kAddEach = 8;  // accumulators of a thread
constexpr uint32_t kAll = 0xffffffffu;

struct Problem {
  Nf4Weight weight;
  const void* bias;
  void* y;
  uint8_t* x_tiles;      // what arrange_x_kernel makes of x
  float* token_factors;  // powers of two that take a token's results back
  float* partials;       // two tiles for each worker
  int num_tokens, n, k;
  int num_chunks;  // of K
  int num_token_tiles;
  int num_units;     // chunks of all tiles
  int worker_units;  // of each worker, that is CTA; the last one may have fewer
};

// kTokens by kGroups * 64 rows of W are a tile. Rings: of each warp for the codes of kCodeStages chunks, of
// the CTA for kXStages stages of x. Shared memory: the table, x, codes, barriers, the scale map's largest
// entry in each warp's part of it.
template <int kTokens_, int kGroups_, int kCodeStages_, int kXStages_>
struct Config {
  static constexpr int kTokens = kTokens_, kGroups = kGroups_;
  static constexpr int kCodeStages = kCodeStages_, kXStages = kXStages_;
  static constexpr int kWarps = 4 * kGroups;  // that multiply; a warpgroup more copies x
  static constexpr int kThreads = 32 * (kWarps + 4);
  // Registers of a thread: at launch, then of one that multiplies and of one that copies. At launch 4096 of
  // an SM are left, room for a CTA of arrange_x_kernel.
  static constexpr int kRegisters = 61440 / kThreads;
  static constexpr int kCopyRegisters = 24;
  static constexpr int kMultiplyRegisters = (61440 - 128 * kCopyRegisters) / (32 * kWarps) / 8 * 8;
  static constexpr int kRows = kGroupRows * kGroups;  // of a tile
  static constexpr int kXBytes = kTokens * 128;       // of a stage: 64 of K
  static constexpr int kSlotBytes = 16 * 128;         // a warp's codes of a chunk
  static constexpr int kX = kTableBytes;
  static constexpr int kCodes = kX + kXStages * kXBytes;
  static constexpr int kBarriers = kCodes + kWarps * kCodeStages * kSlotBytes;
  static constexpr int kLargest = kBarriers + 2 * kXStages * 8;
  static constexpr int kSharedBytes = kLargest + 8 * 4;
  static constexpr int kTile = kRows * kTokens;
  static_assert(kSharedBytes <= 230 * 1024 && kXBytes % 1024 == 0);
};

__device__ inline void copy_async(uint32_t target, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// x as operand B wants it: fp16, tiles of tile_tokens tokens by 64 of K, in the order and swizzle of shared
// memory. A CTA a token.
template <typename T>
__global__ void __launch_bounds__(kArrangeThreads, 16)
    arrange_x_kernel(const T* x, uint8_t* x_tiles, float* token_factors, int tile_tokens, int k,
                     int num_chunks) {
  __shared__ uint32_t largest_of_warp[kArrangeThreads / 32];
  let_next_start();
  const int token = blockIdx.x;
  const T* row = x + int64_t{token} * k;
  wait_for_previous();
  uint32_t lower = 0;
  float factor = 1.0f;
  if constexpr (!__is_same(T, __half)) {
    uint32_t largest = 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < k / 8; i += kArrangeThreads) {
      const uint4 words = reinterpret_cast<const uint4*>(row)[i];
      largest = __vmaxu2(largest, __vmaxu2(words.x & 0x7fff7fffu, words.y & 0x7fff7fffu));
      largest = __vmaxu2(largest, __vmaxu2(words.z & 0x7fff7fffu, words.w & 0x7fff7fffu));
    }
    largest = __reduce_max_sync(kAll, max(largest & 0xffff, largest >> 16));
    if (threadIdx.x % 32 == 0) largest_of_warp[threadIdx.x / 32] = largest;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kArrangeThreads / 32; ++i) largest = max(largest, largest_of_warp[i]);
    const int exponent = min(max(static_cast<int>(largest >> 7), 30), 254);
    lower = (static_cast<uint32_t>((30 - exponent) * 128) & 0xffff) * 0x10001u;
    factor = __int_as_float((exponent - 15) << 23);
  }
  if (threadIdx.x == 0) token_factors[token] = factor;
  auto convert = [&](uint32_t pair) {
    if constexpr (__is_same(T, __half)) {
      return pair;
    } else {
      return (pair & 0x80008000u) | __viaddmax_s16x2_relu(pair & 0x7fff7fffu, lower, 0u) << 3;
    }
  };
  const int in_tile = token % tile_tokens;
  uint8_t* target =
      x_tiles + int64_t{token / tile_tokens} * num_chunks * kSubs * tile_tokens * 128 + in_tile * 128;
#pragma unroll 2
  for (int piece = threadIdx.x; piece < num_chunks * 16; piece += kArrangeThreads) {  // wgmma `piece` of K
    uint2 words[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int at = piece / 16 * kChunk + t * kBlock + piece % 16 * 4;
      words[t] = at < k ? *reinterpret_cast<const uint2*>(row + at) : make_uint2(0, 0);
    }
    uint8_t* tile_row = target + int64_t{piece / 4} * tile_tokens * 128;
    const int column = piece % 4 * 32 ^ in_tile % 8 * 16;
    *reinterpret_cast<uint4*>(tile_row + column) =
        make_uint4(convert(words[0].x), convert(words[1].x), convert(words[2].x), convert(words[3].x));
    *reinterpret_cast<uint4*>(tile_row + (column ^ 16)) =
        make_uint4(convert(words[0].y), convert(words[1].y), convert(words[2].y), convert(words[3].y));
  }
}

template <typename T>
__device__ inline void store_output(const Problem& p, int row, int token, float sum, float factor,
                                    float bias) {
  if (row < p.n && token < p.num_tokens) {
    static_cast<T*>(p.y)[int64_t{token} * p.n + row] = round_to<T>(fmaf(sum, factor, bias));
  }
}

template <typename T>
__device__ inline float bias_of(const Problem& p, int row) {
  return p.bias && row < p.n ? static_cast<float>(static_cast<const T*>(p.bias)[row]) : 0.0f;
}

// Tiles that several CTAs share: the sum of their parts, always in the order of K.
template <typename T, typename C>
__global__ void __launch_bounds__(kAddThreads) add_partials_kernel(const __grid_constant__ Problem p) {
  constexpr int kAtOnce = 4;
  let_next_start();
  const int tile = blockIdx.x, group = blockIdx.y;
  const int first = tile * p.num_chunks / p.worker_units;
  const int last = ((tile + 1) * p.num_chunks - 1) / p.worker_units;
  if (first == last) return;
  wait_for_previous();
  const float* partials =
      p.partials + blockIdx.z * kAddEach * (32 * C::kWarps) + group * kAddThreads + threadIdx.x;
  float sums[kAddEach] = {};
  for (int worker = first; worker <= last; worker += kAtOnce) {
    float parts[kAtOnce][kAddEach];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const bool is_first_tile = tile * p.num_chunks <= (worker + j) * p.worker_units || worker + j != first;
      const float* partial = partials + int64_t{(worker + j) * 2 + (is_first_tile ? 0 : 1)} * C::kTile;
#pragma unroll
      for (int i = 0; i < kAddEach; ++i) {
        parts[j][i] = worker + j <= last ? __ldcg(partial + i * (32 * C::kWarps)) : 0.0f;
      }
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
#pragma unroll
      for (int i = 0; i < kAddEach; ++i) sums[i] += parts[j][i];
    }
  }
  const int lane = threadIdx.x % 32;
  const int row = tile / p.num_token_tiles * C::kRows + group * kGroupRows + threadIdx.x / 32 * 16 + lane / 4;
  const int first_token = tile % p.num_token_tiles * C::kTokens + blockIdx.z * (kAddEach * 2) + lane % 4 * 2;
  const float bias[2] = {bias_of<T>(p, row), bias_of<T>(p, row + 8)};
#pragma unroll
  for (int i = 0; i < kAddEach; ++i) {
    const int token = first_token + i / 4 * 8 + i % 2, r = i / 2 % 2;
    const float factor = token < p.num_tokens ? p.token_factors[token] : 0.0f;
    store_output<T>(p, row + r * 8, token, sums[i], factor, bias[r]);
  }
}

}  // namespace
}  // namespace nf4
