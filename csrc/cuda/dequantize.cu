// NF4 with double-quantized scales -> fp32, fp16 or bf16, whole tensors or element ranges, in one launch.
//
//   codes    |w0 w1 ... w31|w0 ... w31|   word i of a warp: 128 bytes, 4 bytes (8 weights) a lane
//   absmax   |b0 b1 b2 b3  |b4 ...    |   64 weights = 8 lanes of a word; lane l decodes the scale of block l
//   out      |16 bytes a lane         |   512 contiguous bytes a word
//
// A warp takes a span of 2048 weights (half of that for fp32, and for large outputs): its scales are decoded
// once, one a lane, and reach their lanes by shuffle. All loads of a span are issued before the first is
// used, so a block waits for memory once. Spans start at multiples of their own size in the tensor, whatever
// the range; spans that the range cuts, and all spans when pointers do not allow wide accesses, take the
// element path in the same launch. Rounding: the two rules of nf4.cuh, equal to the CPU's.
//
// Rows may be written with room behind them: the tensor is then a matrix, and row r begins at out + r *
// stride.
//
// Bytes moved a weight: 0.516 read, sizeof(T) written. To bf16 on an H200, cold weights, fraction of the copy
// limit (in brackets without programmatic launch):
//   4096x4096 0.88 (0.85)    14336x4096 0.92 (0.90)    8192x8192 0.93 (0.90)    28672x8192 0.96 (0.95)
#include "nf4.cuh"

namespace nf4 {
namespace {

constexpr int kThreads = 256;

// Outputs from this size on leave L2 before anything reads all of them: their stores are marked as streaming,
// and shorter spans in more warps go a little faster (1 % on an H200).
constexpr int64_t kLargeBytes = int64_t{64} << 20;

// kWords: loads in flight a lane.
template <typename T, int kWords>
struct Span {
  static constexpr int kLane = 16 / sizeof(T);       // weights of one 16-byte store
  static constexpr int kWord = 32 * kLane;           // weights of one load of a warp
  static constexpr int kWeights = kWord * kWords;    // weights of a warp
  static constexpr int kBlocks = kWeights / kBlock;  // scales of a warp
  static constexpr int kLanesPerBlock = kBlock / kLane;
};

template <typename T>
struct Codes;  // the codes of one store: 8 in a 32-bit word, 4 in a 16-bit one
template <>
struct Codes<float> {
  using type = uint16_t;
};
template <>
struct Codes<__half> {
  using type = uint32_t;
};
template <>
struct Codes<__nv_bfloat16> {
  using type = uint32_t;
};

__device__ inline uint32_t pack(__half, float low, float high) {
  __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<uint32_t&>(pair);
}
__device__ inline uint32_t pack(__nv_bfloat16, float low, float high) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<uint32_t&>(pair);
}

// Level i at levels[i]: 16 banks and broadcast, so any mix of codes is read in one pass.
__device__ inline float weight_at(const float* levels, uint32_t word, int index, float scale) {
  const int shift =
      (index & 1) ? (index - 1) * 4 : (index + 1) * 4;  // the first of a byte is its high nibble
  return __fmul_rn(levels[(word >> shift) & 15], scale);
}

template <typename T>
__device__ inline uint4 decode(const float* levels, uint32_t word, float scale) {
  uint32_t packed[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      packed[i] = __float_as_uint(weight_at(levels, word, i, scale));
    } else {
      packed[i] = pack(T{}, weight_at(levels, word, 2 * i, scale), weight_at(levels, word, 2 * i + 1, scale));
    }
  }
  return make_uint4(packed[0], packed[1], packed[2], packed[3]);
}

// Where elements go: rows of `columns` elements with `gap` elements between them; no gap, no rows.
struct Rows {
  int64_t columns;
  int64_t gap;
};

// out points where element 0 of the tensor would lie, so that out[i] is element i where rows have no gap.
template <typename T, bool kLarge, bool kGap>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(Nf4Weight weight, int64_t start, int64_t stop, T* out, Rows rows, bool wide) {
  constexpr int kWords = kLarge ? 4 : 8;
  using S = Span<T, kWords>;
  using Word = typename Codes<T>::type;
  __shared__ float map[256];
  __shared__ float levels[16];

  let_next_start();
  const int lane = threadIdx.x % 32;
  const int64_t span = start / S::kWeights + int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
  const int64_t first = span * S::kWeights;
  const bool whole = wide && first >= start && first + S::kWeights <= stop;

  Word words[kWords];
  int quantized = 0;
  float nested = 0.0f;
  if (whole) {
    const Word* source = reinterpret_cast<const Word*>(weight.codes + first / 2) + lane;
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = __ldcs(source + 32 * i);
    quantized = weight.absmax[first / kBlock + (S::kBlocks == 32 ? lane : lane % S::kBlocks)];
    nested = weight.nested_absmax[first / kBlock / kNestedBlock];  // a span never crosses a nested block
  }
  const float own_level = threadIdx.x < 16 ? weight.levels[threadIdx.x] : 0.0f;
  for (int i = threadIdx.x; i < 256; i += kThreads) map[i] = weight.nested_map[i];
  if (threadIdx.x < 16) levels[threadIdx.x] = own_level;
  __syncthreads();

  if (whole) {
    const float scale = decode_scale(map[quantized], nested, weight.offset);
    wait_for_previous();
    uint4* target = reinterpret_cast<uint4*>(out + first) + lane;
    int64_t column = 0;  // of this lane's next store
    if constexpr (kGap) {
      const int64_t mine = first + lane * S::kLane;
      const int64_t row = mine / rows.columns;
      column = mine - row * rows.columns;
      target += row * rows.gap / S::kLane;
    }
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int block = i * (S::kWord / kBlock) + lane / S::kLanesPerBlock;
      const uint4 values = decode<T>(levels, words[i], __shfl_sync(~0u, scale, block));
      if constexpr (kLarge) {
        __stcs(target + 32 * i, values);
      } else {
        target[32 * i] = values;
      }
      if constexpr (kGap) {
        for (column += S::kWord; column >= rows.columns; column -= rows.columns)
          target += rows.gap / S::kLane;
      }
    }
  } else {
    wait_for_previous();
    const int64_t from = first > start ? first : start;
    const int64_t to = first + S::kWeights < stop ? first + S::kWeights : stop;
    for (int64_t i = from + lane; i < to; i += 32) {
      const int64_t block = i / kBlock;
      const float scale =
          decode_scale(map[weight.absmax[block]], weight.nested_absmax[block / kNestedBlock], weight.offset);
      const int byte = weight.codes[i / 2];
      const int64_t place = kGap ? i + i / rows.columns * rows.gap : i;
      out[place] = round_to<T>(__fmul_rn(levels[i % 2 ? byte & 15 : byte >> 4], scale));
    }
  }
}

template <typename T, bool kLarge, bool kGap>
cudaError_t run(const Nf4Weight& weight, int64_t start, int64_t stop, void* out, const Rows& rows,
                bool overlap, cudaStream_t stream) {
  using S = Span<T, kLarge ? 4 : 8>;
  Device device;
  if (cudaError_t error = current_device(&device)) return error;
  const int64_t before = kGap ? start + start / rows.columns * rows.gap : start;
  const uintptr_t origin = reinterpret_cast<uintptr_t>(out) - static_cast<uintptr_t>(before) * sizeof(T);
  const bool wide = origin % 16 == 0 && reinterpret_cast<uintptr_t>(weight.codes) % 4 == 0 &&
                    (!kGap || (rows.columns % S::kLane == 0 && rows.gap % S::kLane == 0));
  const int64_t spans = (stop - 1) / S::kWeights - start / S::kWeights + 1;
  const int64_t blocks = (spans + kThreads / 32 - 1) / (kThreads / 32);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return launch(dequantize_kernel<T, kLarge, kGap>, dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream,
                overlap && device.major >= 9, weight, start, stop, reinterpret_cast<T*>(origin), rows, wide);
}

template <typename T>
cudaError_t dequantize(const Nf4Weight& weight, int64_t start, int64_t stop, void* out, const Rows& rows,
                       bool overlap, cudaStream_t stream) {
  const bool large = (stop - start) * static_cast<int64_t>(sizeof(T)) >= kLargeBytes;
  if (rows.gap == 0) {
    return (large ? run<T, true, false> : run<T, false, false>)(weight, start, stop, out, rows, overlap,
                                                                stream);
  }
  return (large ? run<T, true, true> : run<T, false, true>)(weight, start, stop, out, rows, overlap, stream);
}

cudaError_t dequantize(const Nf4Weight& weight, int64_t start, int64_t stop, void* out, int dtype,
                       const Rows& rows, bool overlap, cudaStream_t stream) {
  if (start < 0 || stop < start) return cudaErrorInvalidValue;
  if (start == stop) return cudaSuccess;
  switch (dtype) {
    case NF4_FLOAT32:
      return dequantize<float>(weight, start, stop, out, rows, overlap, stream);
    case NF4_FLOAT16:
      return dequantize<__half>(weight, start, stop, out, rows, overlap, stream);
    case NF4_BFLOAT16:
      return dequantize<__nv_bfloat16>(weight, start, stop, out, rows, overlap, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace nf4

// Writes elements [start, stop) of the weight to out[0 .. stop - start). `overlap` promises that no kernel
// right before this one in the stream writes the weight.
extern "C" int nf4_dequantize(const Nf4Weight* weight, int64_t start, int64_t stop, void* out, int dtype,
                              int overlap, cudaStream_t stream) {
  return nf4::dequantize(*weight, start, stop, out, dtype, nf4::Rows{1, 0}, overlap, stream);
}

// The weight as a matrix [rows, columns]; row r of it goes to out + r * stride, stride >= columns.
extern "C" int nf4_dequantize_rows(const Nf4Weight* weight, int64_t rows, int64_t columns, void* out,
                                   int64_t stride, int dtype, int overlap, cudaStream_t stream) {
  if (rows < 0 || columns < 1 || stride < columns) return cudaErrorInvalidValue;
  return nf4::dequantize(*weight, 0, rows * columns, out, dtype, nf4::Rows{columns, stride - columns},
                         overlap, stream);
}
