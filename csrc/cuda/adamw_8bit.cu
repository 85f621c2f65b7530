// One AdamW step over many parameters whose moments are 8-bit codes (8-bit Optimizers via Block-wise
// Quantization, arXiv 2110.02861).
//
//   page k, of E elements    | exp_avg, uint8 [E] | exp_avg_sq, uint8 [E] | absmax of exp_avg, fp32 [E / 256]
//   |
//                            | absmax of exp_avg_sq, fp32 [E / 256] |
//   chunks                   as in adamw.cu; each begins a block of 256 in its page and in its parameter
//
//   moment = level[code] * absmax                  one rounding
//   code   = the number of borders below moment / absmax, the quotient rounded to nearest
//
// A warp takes a block of 256 elements, a lane 8 consecutive ones: 16-byte accesses to parameters and
// gradients, 8-byte ones to codes. The block's absmax is a maximum over the warp, the same in any order.
// Levels and borders lie in shared memory, borders as a search tree, so that the first five of eight steps
// meet no two addresses in one bank. Bytes moved an element with fp32 parameters: 10 read, 6 written; 16
// more a block.
//
// A parameter's last block may be cut short: what is behind its end counts as 0 and is not written.
#include "adamw.cuh"
#include "vector.cuh"

namespace nf4 {
namespace {

using namespace adamw;

constexpr int kStateBlock = 256;
constexpr int kLane = 8;  // elements of a lane
constexpr int kLevels = 256;
static_assert(kLane * 32 == kStateBlock, "a warp takes a block");

// Of one moment: level [256] and tree [256], whose node i has children 2i and 2i + 1; node 0 is not used.
struct Map {
  const float* level;
  const float* tree;

  __device__ float decode(uint8_t code, float absmax) const { return __fmul_rn(level[code], absmax); }

  __device__ uint8_t encode(float value, float absmax) const {
    const float x = __fdiv_rn(value, absmax);
    int node = 1;
#pragma unroll
    for (int depth = 0; depth < 8; ++depth) node = 2 * node + (x > tree[node]);
    return static_cast<uint8_t>(node - kLevels);
  }
};

struct alignas(kLane) Codes {
  uint8_t value[kLane];
};

__device__ inline float warp_max(float value) {
  for (int distance = 16; distance; distance /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}

// The 8 elements from `first` on, in fp32; 0 behind `count`.
template <typename T>
__device__ inline void load_lane(const T* source, int first, int count, bool is_whole, float* values) {
  if (is_whole && is_aligned(source, 16)) {
#pragma unroll
    for (int i = 0; i < kLane; i += kWide<T>) load<kWide<T>>(source + first + i, values + i);
  } else {
#pragma unroll
    for (int i = 0; i < kLane; ++i) values[i] = first + i < count ? to_float(source[first + i]) : 0.0f;
  }
}

template <typename T>
__device__ inline void store_lane(T* target, int first, int count, bool is_whole, const float* values) {
  if (is_whole && is_aligned(target, 16)) {
#pragma unroll
    for (int i = 0; i < kLane; i += kWide<T>) store<kWide<T>>(target + first + i, values + i);
  } else {
#pragma unroll
    for (int i = 0; i < kLane; ++i) {
      if (first + i < count) target[first + i] = round_to<T>(values[i]);
    }
  }
}

// One block of 256: every lane of a warp comes here with the same arguments.
template <typename P, typename G>
__device__ inline void update_block(P* parameter, const G* gradient, uint8_t* const (&codes)[2],
                                    float* const (&absmax)[2], int block, int count, float factor,
                                    const Step& step, const Map (&maps)[2]) {
  const int first = block * kStateBlock + kLane * (threadIdx.x % 32);
  const bool is_whole = first + kLane <= count;
  float p[kLane], g[kLane], moment[2][kLane], largest[2] = {0.0f, 0.0f};
  load_lane(parameter, first, count, is_whole, p);
  load_lane(gradient, first, count, is_whole, g);
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const float scale = absmax[k][block];
    Codes code = {};
    if (is_whole) {
      code = *reinterpret_cast<const Codes*>(codes[k] + first);
    } else {
      for (int i = 0; i < kLane && first + i < count; ++i) code.value[i] = codes[k][first + i];
    }
#pragma unroll
    for (int i = 0; i < kLane; ++i) moment[k][i] = maps[k].decode(code.value[i], scale);
  }
#pragma unroll
  for (int i = 0; i < kLane; ++i) {
    if (first + i >= count) moment[0][i] = moment[1][i] = 0.0f;
    p[i] = updated(p[i], __fmul_rn(g[i], factor), moment[0][i], moment[1][i], step);
    for (int k = 0; k < 2; ++k) largest[k] = fmaxf(largest[k], fabsf(moment[k][i]));
  }
  store_lane(parameter, first, count, is_whole, p);
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    // All lanes have read the old absmax: their moments went into this maximum.
    const float scale = warp_max(largest[k]);
    if (threadIdx.x % 32 == 0) absmax[k][block] = scale;
    Codes code;
#pragma unroll
    for (int i = 0; i < kLane; ++i) {
      code.value[i] = maps[k].encode(moment[k][i], scale > 0.0f ? scale : 1.0f);
    }
    if (is_whole) {
      *reinterpret_cast<Codes*>(codes[k] + first) = code;
    } else {
      for (int i = 0; i < kLane && first + i < count; ++i) codes[k][first + i] = code.value[i];
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    adamw_8bit_kernel(const __grid_constant__ Sweep sweep, const float* tables) {
  __shared__ float shared[4][kLevels];  // levels of both moments, trees of both
  const Nf4AdamwChunk chunk = sweep.chunks[blockIdx.x];
  const unsigned setting = static_cast<unsigned>(chunk.setting - sweep.first_setting);
  if (setting >= NF4_MOST_SETTINGS) return;  // the turn of another launch
  const float factor = sweep.gradient_factor ? *sweep.gradient_factor : 1.0f;
  if (!isfinite(factor)) return;
  for (int i = threadIdx.x; i < 4 * kLevels; i += kThreads) shared[i / kLevels][i % kLevels] = tables[i];
  __syncthreads();
  const Step step = sweep.steps[setting];
  const Map maps[2] = {{shared[0], shared[2]}, {shared[1], shared[3]}};
  auto* const page = static_cast<uint8_t*>(sweep.pages[chunk.page - sweep.first_page]);
  uint8_t* const codes[2] = {page + chunk.at, page + sweep.page_elements + chunk.at};
  float* const first_absmax =
      reinterpret_cast<float*>(page + 2 * sweep.page_elements) + chunk.at / kStateBlock;
  float* const absmax[2] = {first_absmax, first_absmax + sweep.page_elements / kStateBlock};
  with_types(chunk, [&](auto* parameter, const auto* gradient) {
    for (int block = threadIdx.x / 32; block * kStateBlock < chunk.count; block += kThreads / 32) {
      update_block(parameter, gradient, codes, absmax, block, chunk.count, factor, step, maps);
    }
  });
}

}  // namespace
}  // namespace nf4

extern "C" int nf4_adamw_8bit(const Nf4AdamwChunk* chunks, int64_t num_chunks, int first_page, int num_pages,
                              void* const* pages, int64_t page_elements, const Nf4AdamwSetting* settings,
                              int num_settings, const float* gradient_factor, const float* tables,
                              cudaStream_t stream) {
  return nf4::adamw::launch_sweep(nf4::adamw_8bit_kernel, chunks, num_chunks, first_page, num_pages, pages,
                                  page_elements, settings, num_settings, gradient_factor, stream, tables);
}
