// Product for many tokens on Hopper, straight from packed codes: y [M, N] = x [M, K] W^T (+ bias), W [N, K]
// in NF4.
//
// Weights are the 64-row operand A of wgmma.m64nNk16, which may come from registers; tokens, up to 256 of
// them, are columns of B in shared memory. A warp holds 16 rows of A in the layout of mma.m16n8k16, so a
// register is two weights of neighbouring k, which is exactly one packed byte: as in linear_few_rows.cu a
// table turns it into a pair of fp16 levels, here times the scale in fp16, and nothing is repacked. Unlike
// there the scale is in the operand: with N / 2 sums a thread it would cost more to multiply those.
//
// The order of k within a chunk of 256, that is 4 blocks, is free as long as x uses the same one. Lane t of a
// quad takes block t, 32 consecutive bytes of rows g and g + 8, and needs one scale a row and chunk:
//
//   wgmma i of 16:   a0, a2 = bytes 2i, 2i+1 of block t of row g;   a1, a3 = the same of row g + 8
//   x of wgmma i:    slots 8h + 2t, 8h + 2t + 1 are k = 64t + 4i + 2h, 64t + 4i + 2h + 1 of the chunk
//
// Three kernels, each started while the one before runs (programmatic dependent launch):
//
//   arrange_x_kernel     x to fp16 in that order and in the swizzle of shared memory, so that a stage is one
//                        plain bulk copy. bf16 is shifted by a power of two for each token: exact for all but
//                        values 2^29 times smaller than its largest.
//   wgmma_kernel         Units of work are chunks of tiles; a worker has an equal number of neighbours,
//                        whatever tiles they are of. One thread copies x, each warp copies its own codes.
//                        While the tensor cores work on 64 of K, the warps decode the next 64.
//   add_partials_kernel  where workers share tiles: their sums, in a fixed order, so that results do not
//                        depend on timing.
//
// Scales are taken to fp16 after a power of two for each row, from the largest nested_absmax of that row, has
// brought them to 16 at most; so weights of any size keep their precision.
//
// The nearest limit of the main loop is shared memory: for 64 rows by 64 of K, 64 passes for the table, 32
// for codes in and out, and one a token for x, which every warpgroup reads anew. Small products are bound by
// the latencies of the three kernels, 10 to 15 us together.
//
// Time over bf16 cuBLAS on an H200, cold weights, M = 32 / 64 / 128 / 256:
//   4096x4096 0.97 / 1.23 / 1.26 / 1.51    14336x4096 0.74 / 0.85 / 1.14 / 1.64
//   8192x8192 0.72 / 0.81 / 1.23 / 1.45    28672x8192 0.55 / 0.69 / 0.96 / 1.04
// Error against float64: 1.69e-3 (cuBLAS on weights rounded to bf16: 2.3e-3).
#include "linear_wgmma.cuh"
#include "wgmma.cuh"

namespace nf4 {
namespace {

template <typename T, typename C>
__global__ void __maxnreg__(C::kRegisters) wgmma_kernel(const __grid_constant__ Problem p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  let_next_start();
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int warp = __shfl_sync(kAll, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int begin = blockIdx.x * p.worker_units, end = min(begin + p.worker_units, p.num_units);
  const int first_tile = begin / p.num_chunks, first_chunk = begin % p.num_chunks;
  const uint32_t full = base + C::kBarriers, empty = full + C::kXStages * 8;
  const float mapped = threadIdx.x < 256 ? __ldg(p.weight.nested_map + threadIdx.x) : 0.0f;
  const float level = __ldg(p.weight.levels + lane % 16);
  auto tile_row = [&](int tile) { return tile / p.num_token_tiles * C::kRows + warp * 16; };

  // Codes: lane -> row lane / 8 of 4, 16-byte piece lane % 8, four times 4 rows a slot. copy_* name the unit
  // that goes into the ring next.
  const uint32_t copy_target = base + C::kCodes + warp * C::kCodeStages * C::kSlotBytes + lane / 8 * 128 +
                               (lane % 8 * 16 ^ lane / 8 % 2 * 16);
  int copy_unit = begin, copy_tile = first_tile, copy_chunk = first_chunk;
  int copy_row = 0;
  const uint8_t* copy_from = nullptr;
  auto point_copies = [&] {
    copy_row = tile_row(copy_tile) + lane / 8;
    copy_from = p.weight.codes + int64_t{copy_row} * (p.k / 2) + lane % 8 * 16;
  };
  auto copy_codes = [&](int slot) {
    if (copy_unit < end) {
      const int column = copy_chunk * (kChunk / 2);
      const bool inside = column + lane % 8 * 16 < p.k / 2;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool valid = inside && copy_row + 4 * i < p.n;
        copy_async(copy_target + slot * C::kSlotBytes + i * 512,
                   valid ? copy_from + (column + int64_t{i} * 2 * p.k) : p.weight.codes, valid);
      }
      ++copy_unit;
      if (++copy_chunk == p.num_chunks) {
        copy_chunk = 0;
        ++copy_tile;
        point_copies();
      }
    }
    commit_copies();
  };
  if (warp < C::kWarps) {
    point_copies();
#pragma unroll
    for (int slot = 0; slot < C::kCodeStages; ++slot) copy_codes(slot);
  } else if (warp == C::kWarps && lane == 0) {
    for (int i = 0; i < C::kXStages; ++i) {
      barrier_init(full + i * 8, 1);
      barrier_init(empty + i * 8, C::kWarps);
    }
    barriers_ready();
  }

  // Scale codes of a chunk: lane t has block t; rows g and g + 8. next_* are those of the chunk after.
  const int g = lane / 4, t = lane % 4;
  const uint32_t num_blocks = p.k / kBlock;
  uint32_t scale_row[2], next_code[2];
  float next_nested[2], largest_nested[2];
  auto fetch_scales = [&](int chunk) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t block = scale_row[r] + min(chunk * 4 + t, num_blocks - 1);
      next_code[r] = __ldg(p.weight.absmax + block);
      next_nested[r] = __ldg(p.weight.nested_absmax + block / kNestedBlock);
    }
  };
  auto enter_tile = [&](int tile) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      scale_row[r] = static_cast<uint32_t>(min(tile_row(tile) + g + 8 * r, p.n - 1)) * num_blocks;
      const uint32_t last = (scale_row[r] + num_blocks - 1) / kNestedBlock;
      largest_nested[r] = 0.0f;
      for (uint32_t i = scale_row[r] / kNestedBlock; i <= last; ++i) {
        largest_nested[r] = fmaxf(largest_nested[r], fabsf(__ldg(p.weight.nested_absmax + i)));
      }
    }
  };
  if (warp < C::kWarps) {
    enter_tile(first_tile);
    fetch_scales(first_chunk);
  }

  if (threadIdx.x < 256) {
    const int q = threadIdx.x;
    const __half2 pair = __floats2half2_rn(__shfl_sync(kAll, level, q >> 4), level);
    const uint32_t word = reinterpret_cast<const uint32_t&>(pair);
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // staggered, so that the 8 lanes of a pass write different banks
      uint8_t* target = shared + q * 256 + (i + q) % 8 * 16;
      *reinterpret_cast<uint4*>(target) = make_uint4(word, word, word, word);
      *reinterpret_cast<float4*>(target + 128) = make_float4(mapped, mapped, mapped, mapped);
    }
    const uint32_t largest = __reduce_max_sync(kAll, __float_as_uint(fabsf(mapped)));
    if (lane == 0) *reinterpret_cast<uint32_t*>(shared + C::kLargest + warp * 4) = largest;
  }
  __syncthreads();

  if (warp >= C::kWarps) {
    set_registers<C::kCopyRegisters, false>();
    if (warp == C::kWarps && lane == 0) {
      wait_for_previous();
      bulk_copies_see_memory();
      int tile = first_tile, chunk = first_chunk, stage = 0;
      uint32_t parity = 1;
      for (int unit = begin; unit < end; ++unit) {
        const int64_t at = int64_t{tile % p.num_token_tiles} * p.num_chunks + chunk;
        const uint8_t* source = p.x_tiles + at * kSubs * C::kXBytes;
        for (int sub = 0; sub < kSubs; ++sub) {
          barrier_wait(empty + stage * 8, parity);
          barrier_expect(full + stage * 8, C::kXBytes);
          copy_bulk(base + C::kX + stage * C::kXBytes, source + sub * C::kXBytes, C::kXBytes,
                    full + stage * 8);
          if (++stage == C::kXStages) stage = 0, parity ^= 1;
        }
        if (++chunk == p.num_chunks) chunk = 0, ++tile;
      }
    }
    return;
  }

  set_registers<C::kMultiplyRegisters, true>();
  const uint32_t own = lane * 4, own_map = lane * 4 + 128;
  float largest_map = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    largest_map = fmaxf(largest_map, *reinterpret_cast<const float*>(shared + C::kLargest + i * 4));
  }
  float d[C::kTokens / 2];
  uint32_t a[2][4][4];
  int tile = first_tile, chunk = first_chunk, slot = 0, stage = 0;
  uint32_t parity = 0;
  auto release_previous = [&] {
    if (lane == 0) barrier_arrive(empty + (stage == 0 ? C::kXStages - 1 : stage - 1) * 8);
  };
  for (int unit = begin; unit < end;) {
    const int from = chunk, to = min(p.num_chunks, chunk + end - unit);
    unit += to - from;
#pragma unroll
    for (int i = 0; i < C::kTokens / 2; ++i) d[i] = 0.0f;
    // Scales enter as fp16: a power of two for each row takes the largest that they can be to 8..16.
    float row_scale[2], row_factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float bound = fmaf(largest_nested[r], largest_map, fabsf(p.weight.offset));
      const int exponent = min(max(__float_as_int(bound) >> 23, 4), 250);
      row_scale[r] = __int_as_float((257 - exponent) << 23);
      row_factor[r] = __int_as_float((exponent - 3) << 23);
    }
    for (; chunk < to; ++chunk) {
      __half2 scale[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float map_entry =
            *reinterpret_cast<const float*>(shared + __byte_perm(next_code[r], own_map, 0x5504));
        scale[r] =
            __float2half2_rn(fmaf(map_entry, next_nested[r] * row_scale[r], p.weight.offset * row_scale[r]));
      }
      if (chunk + 1 < to) {
        fetch_scales(chunk + 1);
      } else if (unit < end) {
        enter_tile(tile + 1);
        fetch_scales(0);
      }
      wait_copies<C::kCodeStages - 1>();
      __syncwarp();
      const uint8_t* codes = shared + C::kCodes + (warp * C::kCodeStages + slot) * C::kSlotBytes + g * 128;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = ((2 * t + half) ^ (g % 2)) * 16;
        const uint4 low = *reinterpret_cast<const uint4*>(codes + at);
        const uint4 high = *reinterpret_cast<const uint4*>(codes + at + 8 * 128);
        if (half == 1) {
          __syncwarp();  // all lanes have read the slot before any refills it
          copy_codes(slot);
        }
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          const uint32_t words[2][2] = {{q ? low.z : low.x, q ? low.w : low.y},
                                        {q ? high.z : high.x, q ? high.w : high.y}};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int r = 0; r < 4; ++r) {  // byte 1 of the address is the code byte, byte 0 the lane's copy
              const uint32_t select = i % 2 == 0 ? (r < 2 ? 0x5504 : 0x5514) : (r < 2 ? 0x5524 : 0x5534);
              const __half2 pair =
                  *reinterpret_cast<const __half2*>(shared + __byte_perm(words[r % 2][i / 2], own, select));
              const __half2 weights = __hmul2(pair, scale[r % 2]);
              a[q][i][r] = reinterpret_cast<const uint32_t&>(weights);
            }
          }
          barrier_wait(full + stage * 8, parity);
          wgmma_fence();
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            Wgmma<C::kTokens>::multiply(d, a[q][i],
                                        swizzled_tile(base + C::kX + stage * C::kXBytes + i * 32));
          }
          wgmma_commit();
          wgmma_wait<1>();  // the group before has read its stage and its registers
          if (chunk > from || half || q) release_previous();
          if (++stage == C::kXStages) stage = 0, parity ^= 1;
        }
      }
      if (++slot == C::kCodeStages) slot = 0;
    }
    wgmma_wait<0>();
    release_previous();
    wait_for_previous();
    if (to - from == p.num_chunks) {
      const int row = tile_row(tile) + g;
      const int first_token = tile % p.num_token_tiles * C::kTokens + 2 * t;
      const float bias[2] = {bias_of<T>(p, row), bias_of<T>(p, row + 8)};
#pragma unroll
      for (int i = 0; i < C::kTokens / 2; ++i) {
        const int token = first_token + i / 4 * 8 + i % 2, r = i / 2 % 2;
        const float factor = token < p.num_tokens ? p.token_factors[token] : 0.0f;
        store_output<T>(p, row + 8 * r, token, d[i] * row_factor[r], factor, bias[r]);
      }
    } else {  // at most two of these: of the first tile and of the last
      float* partial = p.partials + int64_t{blockIdx.x * 2 + (tile == first_tile ? 0 : 1)} * C::kTile;
#pragma unroll
      for (int i = 0; i < C::kTokens / 2; ++i) {
        partial[i * (32 * C::kWarps) + threadIdx.x] = d[i] * row_factor[i / 2 % 2];
      }
    }
    chunk = 0;
    ++tile;
  }
}

struct Plan {
  int64_t x_bytes, factor_bytes, partial_bytes;
  int num_workers;
};

template <typename C>
Plan plan(Problem* p, const Device& device) {
  p->num_chunks = (p->k + kChunk - 1) / kChunk;
  p->num_token_tiles = (p->num_tokens + C::kTokens - 1) / C::kTokens;
  p->num_units = (p->n + C::kRows - 1) / C::kRows * p->num_token_tiles * p->num_chunks;
  p->worker_units = (p->num_units + device.num_sms - 1) / device.num_sms;
  Plan sizes;
  sizes.num_workers = (p->num_units + p->worker_units - 1) / p->worker_units;
  sizes.x_bytes = int64_t{p->num_token_tiles} * p->num_chunks * kSubs * C::kXBytes;
  sizes.factor_bytes = (int64_t{p->num_tokens} * 4 + 255) / 256 * 256;
  sizes.partial_bytes = p->worker_units % p->num_chunks ? int64_t{sizes.num_workers} * 2 * C::kTile * 4 : 0;
  return sizes;
}

template <typename T, typename C>
cudaError_t run(Problem p, const Device& device, const void* x, uint8_t* workspace, bool overlap,
                cudaStream_t stream) {
  const Plan sizes = plan<C>(&p, device);
  p.x_tiles = workspace;
  p.token_factors = reinterpret_cast<float*>(workspace + sizes.x_bytes);
  p.partials = reinterpret_cast<float*>(workspace + sizes.x_bytes + sizes.factor_bytes);
  cudaError_t error =
      launch(arrange_x_kernel<T>, p.num_tokens, kArrangeThreads, 0, stream, overlap, static_cast<const T*>(x),
             p.x_tiles, p.token_factors, C::kTokens, p.k, p.num_chunks);
  if (error) return error;
  auto kernel = wgmma_kernel<T, C>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes);
  if (error) return error;
  error = launch(kernel, sizes.num_workers, C::kThreads, C::kSharedBytes, stream, true, p);
  if (error || sizes.partial_bytes == 0) return error;
  const dim3 grid(p.num_units / p.num_chunks, C::kGroups, C::kTokens / 2 / kAddEach);
  return launch(add_partials_kernel<T, C>, grid, kAddThreads, 0, stream, true, p);
}

// The configuration for a product: the smallest tile that takes all tokens, of 256 at most. Tiles of fewer
// rows where there are few of them to share, and for 128 tokens of more where there are many; measured on an
// H200.
template <typename F>
auto configured(int num_tokens, int n, int k, F f) {
  const int64_t elements = int64_t{n} * k;
  const bool is_small = elements <= 1 << 24, is_large = elements >= 1 << 27;
  if (num_tokens <= 16) return f(Config<16, 4, 4, 12>{});
  if (num_tokens <= 32) return is_small ? f(Config<32, 2, 4, 12>{}) : f(Config<32, 4, 3, 12>{});
  if (num_tokens <= 64 && is_small) return f(Config<64, 2, 4, 12>{});
  if (num_tokens <= 48) return f(Config<48, 4, 3, 8>{});
  if (num_tokens <= 64) return f(Config<64, 4, 3, 8>{});
  if (num_tokens <= 96) return f(Config<96, 4, 3, 5>{});
  if (num_tokens <= 128) return is_large ? f(Config<128, 3, 4, 4>{}) : f(Config<128, 2, 4, 6>{});
  if (num_tokens <= 192) return f(Config<192, 2, 3, 4>{});
  return f(Config<256, 2, 3, 3>{});
}

}  // namespace
}  // namespace nf4

// Bytes of workspace; 0 where the current device or the sizes do not allow the product.
extern "C" int64_t nf4_linear_wgmma_workspace(int num_tokens, int n, int k) {
  using namespace nf4;
  Device device;
  if (num_tokens < 1 || n < 1 || k < 1 || k % kBlock != 0) return 0;
  if (int64_t{n} * k / kBlock > INT32_MAX) return 0;
  if (int64_t{num_tokens} * n > INT32_MAX || int64_t{num_tokens} * k > INT32_MAX) return 0;
  if (current_device(&device) || device.major != 9 || device.minor != 0) return 0;
  Problem p = {};
  p.num_tokens = num_tokens;
  p.n = n;
  p.k = k;
  return configured(num_tokens, n, k, [&](auto config) {
    const Plan sizes = plan<decltype(config)>(&p, device);
    return sizes.x_bytes + sizes.factor_bytes + sizes.partial_bytes;
  });
}

// y [num_tokens, n] = x [num_tokens, k] times the transpose of the weight [n, k], plus bias [n] where not
// null; all contiguous and of one dtype, bf16 or fp16. x, codes and the workspace lie at multiples of 16
// bytes. Of the workspace nothing outlives the call. `overlap` promises that no kernel right before this one
// in the stream writes the weight. cudaErrorNotSupported where nf4_linear_wgmma_workspace answers 0 or an
// address is odd.
extern "C" int nf4_linear_wgmma(const Nf4Linear* linear, const void* x, int num_tokens, int k, int dtype,
                                void* workspace, int overlap, cudaStream_t stream) {
  using namespace nf4;
  if (dtype != NF4_BFLOAT16 && dtype != NF4_FLOAT16) return cudaErrorInvalidValue;
  if (nf4_linear_wgmma_workspace(num_tokens, linear->n, k) == 0) return cudaErrorNotSupported;
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(workspace) |
                              reinterpret_cast<uintptr_t>(linear->weight.codes);
  if (addresses % 16 != 0) return cudaErrorNotSupported;
  Device device;
  if (cudaError_t error = current_device(&device)) return error;
  Problem p = {};
  p.weight = linear->weight;
  p.bias = linear->bias;
  p.y = linear->y;
  p.num_tokens = num_tokens;
  p.n = linear->n;
  p.k = k;
  return configured(num_tokens, p.n, k, [&](auto config) {
    using C = decltype(config);
    uint8_t* bytes = static_cast<uint8_t*>(workspace);
    if (dtype == NF4_FLOAT16) return run<__half, C>(p, device, x, bytes, overlap, stream);
    return run<__nv_bfloat16, C>(p, device, x, bytes, overlap, stream);
  });
}
