// Product for few tokens, straight from packed codes: y [M, N] = x [M, K] W^T (+ bias), W [N, K] in NF4.
//
// Weights are the 16-row operand A of mma.m16n8k16, tokens are columns of B. A register of A holds two
// weights of neighbouring k, which is exactly one packed byte: a table turns the byte into a pair of fp16
// levels, and nothing is repacked. The order of k within a block of 64 is free as long as x uses the same
// one. With t = lane % 4 and row g = lane / 4:
//
//   codes of a block, 32 bytes a row:   | t=0: 8 bytes | t=1: 8 | t=2: 8 | t=3: 8 |
//   MMA i of 4:   a0, a2 = bytes 8t+2i, 8t+2i+1 of row g;   a1, a3 = the same of row g+8
//                 b0, b1 = pairs 8t+2i, 8t+2i+1 of x in the block, column g
//
// The scale of a (row, block) multiplies the fp32 sums of those 4 MMAs, so it is never rounded to 16 bits.
//
// B has 8 columns. With fewer tokens the rest are not left empty: column token * kPhases + phase holds the
// blocks b of the token with b % kPhases == phase. The MMAs of block b then give its product in the columns
// of phase b % kPhases (the others are ignored), and a lane keeps, decodes and scales 1 / kPhases as much.
// 1 token: 8 phases; 2: 4; 3 or 4: 2; 5 to 8: 1; 9 to 16: 1 phase and two column tiles.
//
// bf16 activations enter as fp16, shifted by a power of two for each token and warp slice: exact for all but
// values 2^29 times smaller than the largest, and fp16 levels are 8 times finer than bf16 ones.
//
// A CTA owns tiles of 16 rows. Along K it works in chunks of one slice of kBlocks blocks a warp: the warp
// keeps its slice of x in registers for all tiles and streams its slice of the codes through a ring of its
// own, filled by 16-byte asynchronous copies: warps meet only to add up a tile. Ring rows are 128 bytes (4
// blocks) with their 32-byte blocks XORed by (row % 4), so that no read conflicts. Shared memory:
//
//   row q of 256 bytes:   | level pair of byte q, 32 copies | ring rows of 8 warps (16 warps: unused) |
//   then: rings of 16 warps, scale map in 4 copies, partial sums of a tile (twice), sums over chunks
//
// A lane's own copy of a table row lies in its own bank, and the row pitch of 256 makes the address of an
// entry one byte permutation. Sums are added in a fixed order: results do not depend on timing.
//
// Under programmatic dependent launch the next product builds its table and fetches its first codes as CTAs
// of this one leave; only x waits. What binds is shared memory: 26 passes for 1024 weights (16 table, 8 codes
// in and out, 2 scales and sums), two thirds of its rate in the steady state.
//
// Time over bf16 cuBLAS on an H200, cold weights, M = 1 / 8 / 16:
//   4096x4096 0.36 / 0.46 / 0.60    14336x4096 0.39 / 0.45 / 0.57
//   8192x8192 0.37 / 0.49 / 0.69    28672x8192 0.33 / 0.38 / 0.56
// Error against float64: 1.67e-3 (cuBLAS on weights rounded to bf16: 2.3e-3).
#include "few_rows.cuh"

namespace nf4 {
namespace {

template <typename T, typename C, bool kGroup>
__global__ void __launch_bounds__(C::kThreads, C::kMinCtas)
    few_rows_kernel(const __grid_constant__ FewRows p) {
  constexpr int kBlocks = C::kBlocks, kPhases = C::kPhases, kTokenTiles = C::kTokenTiles;
  constexpr int kSets = kBlocks / kPhases;                // blocks of x a lane keeps for one column
  constexpr int kParts = kBlocks / 4;                     // ring slots of one tile
  constexpr bool kFixedSlots = kParts % C::kStages == 0;  // else a tile is a part of the ring
  constexpr int kOutputs = kTileRows * C::kTokens;        // of one tile
  static_assert((kFixedSlots || C::kStages % kParts == 0) && kBlocks % kPhases == 0);
  extern __shared__ __align__(1024) uint8_t shared[];

  let_next_start();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int g = lane / 4, t = lane % 4;
  const int num_blocks = p.k / kBlock;
  // The CTAs of a launch are dealt out to its weights; this one is number `cta` of `grid` for weight `w`.
  int index = 0;
  if constexpr (kGroup) {
    while (index + 1 < p.num_weights && static_cast<int>(blockIdx.x) >= p.first_cta[index + 1]) ++index;
  }
  const Nf4Linear& w = p.parts[index];
  const int cta = blockIdx.x - p.first_cta[index];
  const int grid = p.first_cta[index + 1] - p.first_cta[index];
  const int num_tiles = (w.n + kTileRows - 1) / kTileRows;
  const int my_tiles = (num_tiles - cta + grid - 1) / grid;
  const int first_token = blockIdx.y * C::kTokens;
  const float mapped = threadIdx.x < 256 ? w.weight.nested_map[threadIdx.x] : 0.0f;
  const float level = w.weight.levels[lane % 16];

  // Copies: lane -> row lane / 8 of 4, 16-byte piece lane % 8, four times 4 rows a slot. copy_tile and
  // copy_chunk name the tile that goes into the ring next; its parts share the row pointers.
  const int ring = C::kRing + warp * C::kStages * C::kSlotBytes;
  const uint32_t copy_target = static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + ring +
                               lane / 8 * C::kPitch + ((lane % 8 * 16) ^ (lane / 8 % 4 * 32));
  int copy_tile = 0, copy_chunk = 0;
  const uint8_t* copy_rows[4];
  auto point_copies = [&] {
    const int row = (cta + copy_tile * grid) * kTileRows + lane / 8;
    const int column = (copy_chunk * C::kWarps + warp) * (kBlocks * 32) + lane % 8 * 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      copy_rows[i] = w.weight.codes + int64_t{min(row + 4 * i, w.n - 1)} * (p.k / 2) + column;
    }
  };
  auto copy_part = [&](int part, int slot_offset) {
    if (copy_chunk < p.num_chunks) {
      const int block = (copy_chunk * C::kWarps + warp) * kBlocks + part * 4 + lane % 8 / 2;
      const bool valid = block < num_blocks;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        copy_async(copy_target + slot_offset + 4 * i * C::kPitch,
                   valid ? copy_rows[i] + part * 128 : w.weight.codes, valid);
      }
    }
    commit_copies();
  };
  auto next_copy_tile = [&] {
    if (++copy_tile == my_tiles) copy_tile = 0, ++copy_chunk;
  };
#pragma unroll
  for (int s = 0; s < C::kStages; ++s) {
    if (s % kParts == 0) {
      if (s > 0) next_copy_tile();
      point_copies();
    }
    copy_part(s % kParts, s * C::kSlotBytes);
  }

  uint32_t next_codes[2][kParts];
  float next_nested[2];
  auto fetch_scales = [&](int chunk, int tile) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = min((cta + tile * grid) * kTileRows + g + 8 * r, w.n - 1);
      fetch_scale_codes<kBlocks, C::kWide>(w.weight, row, (chunk * C::kWarps + warp) * kBlocks, num_blocks,
                                           next_codes[r], &next_nested[r]);
    }
  };
  fetch_scales(0, 0);
  fill_tables(shared, shared + C::kMap, mapped, level);
  __syncthreads();
  wait_for_previous();

  const uint32_t own = lane * 4;
  const int read_row = ring + g * C::kPitch + t * 8;
  int slot_offset = 0, buffer = 0;  // slot_offset of the tile's first part
  uint32_t x[kTokenTiles][kSets][8];
  float inverse[kTokenTiles][2];
  for (int chunk = 0; chunk < p.num_chunks; ++chunk) {
    const int first_block = (chunk * C::kWarps + warp) * kBlocks;
#pragma unroll
    for (int m = 0; m < kTokenTiles; ++m) {
      const float own_inverse = load_x<T, kPhases, kSets>(p, first_token + m * 8 + g / kPhases,
                                                          first_block + g % kPhases, num_blocks, x[m]);
      // This lane's results are columns 2t and 2t+1, whose factors other lanes have.
      inverse[m][0] = __shfl_sync(kAll, own_inverse, 8 * t);
      inverse[m][1] = __shfl_sync(kAll, own_inverse, 8 * t + 4);
    }
    for (int tile = 0; tile < my_tiles; ++tile) {
      const int row0 = (cta + tile * grid) * kTileRows;
      uint32_t codes[2][kParts];
#pragma unroll
      for (int i = 0; i < kParts; ++i) codes[0][i] = next_codes[0][i], codes[1][i] = next_codes[1][i];
      const float nested[2] = {next_nested[0], next_nested[1]};
      if (tile + 1 < my_tiles) {
        fetch_scales(chunk, tile + 1);
      } else if (chunk + 1 < p.num_chunks) {
        fetch_scales(chunk + 1, 0);
      }
      auto scale_of = [&](int r, uint32_t word, int byte, int block) {
        float outer = nested[r];
        if constexpr (!C::kWide) {
          outer = nested_absmax_at(w.weight, min(row0 + g + 8 * r, w.n - 1), block, num_blocks);
        }
        const uint32_t entry = (byte == 0 ? word << 4 : word >> (byte * 8 - 4)) & 0xff0;
        return fmaf(*reinterpret_cast<const float*>(shared + C::kMap + (entry | (g % 4 * 4))), outer,
                    w.weight.offset);
      };
      // With 8 or 4 phases a lane holds the columns of two neighbouring ones: of each kPhases blocks a pair.
      float scales[2][kPhases >= 4 ? kSets * 2 : 1];
      if constexpr (kPhases >= 4) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
          for (int s = 0; s < kSets; ++s) {
            const int pair = s * (kPhases / 2) + t % (kPhases / 2);  // of the pairs of codes of the slice
            // Two pairs a word: 8 phases span two words, 4 phases one.
            uint32_t word = codes[r][kPhases == 8 ? 2 * s : s];
            if (kPhases == 8 && t >= 2) word = codes[r][(2 * s + 1) % kParts];
            word >>= t % 2 * 16;
            scales[r][2 * s] = scale_of(r, word, 0, first_block + 2 * pair);
            scales[r][2 * s + 1] = scale_of(r, word, 1, first_block + 2 * pair + 1);
          }
        }
      }
      float y[kTokenTiles][4] = {};
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        wait_copies<C::kStages - 1>();
        __syncwarp();
        const int part_offset = slot_offset + part % C::kStages * C::kSlotBytes;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int b = part * 4 + j;
          const int at = read_row + ((g % 4 * 32) ^ (j * 32)) + part_offset;
          const uint2 low = *reinterpret_cast<const uint2*>(shared + at);
          const uint2 high = *reinterpret_cast<const uint2*>(shared + at + 8 * C::kPitch);
          float c[kTokenTiles][4] = {};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const uint32_t words[2] = {i < 2 ? low.x : low.y, i < 2 ? high.x : high.y};
            uint32_t a[4];
#pragma unroll
            for (int r = 0; r < 4; ++r) {  // byte 1 of the address is the code byte, byte 0 the lane's copy
              const uint32_t select = i % 2 == 0 ? (r < 2 ? 0x5504 : 0x5514) : (r < 2 ? 0x5524 : 0x5534);
              a[r] = *reinterpret_cast<const uint32_t*>(shared + __byte_perm(words[r % 2], own, select));
            }
#pragma unroll
            for (int m = 0; m < kTokenTiles; ++m) {
              mma(c[m], a, x[m][b / kPhases][2 * i], x[m][b / kPhases][2 * i + 1]);
            }
          }
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            if constexpr (kPhases >= 4) {  // only the lanes that hold a column of this phase keep the sums
              const float sum = fmaf(c[0][2 * r + b % 2], scales[r][b / kPhases * 2 + b % 2], y[0][2 * r]);
              y[0][2 * r] = t % (kPhases / 2) == b % kPhases / 2 ? sum : y[0][2 * r];
            } else {
              const float scale = scale_of(r, codes[r][part], j, first_block + b);
#pragma unroll
              for (int m = 0; m < kTokenTiles; ++m) {
                if constexpr (kPhases == 2) {
                  y[m][2 * r] = fmaf(c[m][2 * r + b % 2], scale, y[m][2 * r]);
                } else {
                  y[m][2 * r] = fmaf(c[m][2 * r], scale, y[m][2 * r]);
                  y[m][2 * r + 1] = fmaf(c[m][2 * r + 1], scale, y[m][2 * r + 1]);
                }
              }
            }
          }
        }
        __syncwarp();  // all lanes have read the slot before any refills it
        constexpr int kAhead = C::kStages % kParts;
        if ((part + kAhead) % kParts == 0) {
          next_copy_tile();
          point_copies();
        }
        copy_part((part + kAhead) % kParts, part_offset);
      }
      if constexpr (!kFixedSlots) {
        slot_offset = (slot_offset + kParts * C::kSlotBytes) % (C::kStages * C::kSlotBytes);
      }

      float* partial = reinterpret_cast<float*>(shared + C::kPartial) + buffer * C::kWarps * kOutputs;
      store_partial<C>(partial + warp * kOutputs, y, inverse, g, t);
      __syncthreads();
      if (threadIdx.x < kOutputs) {
        const int element = threadIdx.x;
        float sum = 0.0f;
#pragma unroll
        for (int from = 0; from < C::kWarps; ++from) sum += partial[from * kOutputs + element];
        // Only this thread ever touches its element of the sums over chunks.
        float* sums = reinterpret_cast<float*>(shared + C::kSum) + tile * kOutputs + element;
        if (chunk > 0) sum += *sums;
        if (chunk + 1 < p.num_chunks) {
          *sums = sum;
        } else {
          const int row = row0 + element / C::kTokens;
          const int token = first_token + element % C::kTokens;
          if (row < w.n && token < p.num_tokens) {
            if (w.bias) sum += static_cast<float>(static_cast<const T*>(w.bias)[row]);
            static_cast<T*>(w.y)[int64_t{token} * w.n + row] = round_to<T>(sum);
          }
        }
      }
      buffer ^= 1;  // two buffers: the barrier of the next tile separates this read from the write after it
    }
  }
}

template <typename T, typename C>
cudaError_t run(FewRows p, const Device& device, bool overlap, cudaStream_t stream) {
  // One weight's pointers stay where the compiler finds them; of several they are looked up. Rare shapes have
  // only the second kernel.
  auto kernel = few_rows_kernel<T, C, true>;
  if constexpr (C::kWide) {
    if (p.num_weights == 1) kernel = few_rows_kernel<T, C, false>;
  }
  if (device.shared_bytes_per_block < C::kSharedBytes) return cudaErrorNotSupported;
  // Once a device would do; the call costs less than remembering which devices it was made for.
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes);
  if (error) return error;
  const int chunk_blocks = C::kWarps * C::kBlocks;
  p.num_chunks = (p.k / kBlock + chunk_blocks - 1) / chunk_blocks;
  int tiles = 0;
  for (int i = 0; i < p.num_weights; ++i) tiles += (p.parts[i].n + kTileRows - 1) / kTileRows;
  // Equal numbers of tiles a CTA, so as few CTAs as one wave of them takes; more waves of equal size where
  // the sums over chunks do not hold that many tiles.
  const int most = device.num_sms * C::kMinCtas;
  const int one_wave = (tiles + most - 1) / most;
  const int waves = p.num_chunks > 1 ? (one_wave + C::kMaxTiles - 1) / C::kMaxTiles : 1;
  const int each = (tiles + most * waves - 1) / (most * waves);
  for (int i = 0; i < p.num_weights; ++i) {
    const int own_tiles = (p.parts[i].n + kTileRows - 1) / kTileRows;
    p.first_cta[i + 1] = p.first_cta[i] + (own_tiles + each - 1) / each;
  }
  const dim3 grid(p.first_cta[p.num_weights], (p.num_tokens + C::kTokens - 1) / C::kTokens);
  return launch(kernel, grid, C::kThreads, C::kSharedBytes, stream, overlap && device.major >= 9, p);
}

// The kernel whose slices waste least: slices of 8 blocks unless those of 4 fill the chunks better.
template <typename T, int kPhases, int kTokenTiles>
cudaError_t choose(const FewRows& p, const Device& device, bool overlap, cudaStream_t stream) {
  const int num_blocks = p.k / kBlock;
  uintptr_t addresses = 0;
  for (int i = 0; i < p.num_weights; ++i) addresses |= reinterpret_cast<uintptr_t>(p.parts[i].weight.absmax);
  const auto filled = [&](int blocks) { return (num_blocks + blocks - 1) / blocks * blocks; };
  const bool wide = addresses % 4 == 0 && num_blocks % 4 == 0;
  if constexpr (kTokenTiles == 1) {
    if (addresses % 8 == 0 && num_blocks % 8 == 0 && filled(64) <= filled(32)) {
      return run<T, Config<8, kPhases, 1, true, 8>>(p, device, overlap, stream);
    }
  } else {
    // x is the larger part of what a CTA reads: one CTA of 16 warps an SM reads it half as often.
    using Large = Config<4, kPhases, kTokenTiles, true, 16>;
    if (wide && device.shared_bytes_per_block >= Large::kSharedBytes) {
      return run<T, Large>(p, device, overlap, stream);
    }
  }
  if constexpr (kPhases == 8) {
    return choose<T, 4, 1>(p, device, overlap, stream);  // 4 blocks have no 8 phases
  } else if (wide) {
    return run<T, Config<4, kPhases, kTokenTiles, true, 8>>(p, device, overlap, stream);
  } else {
    return run<T, Config<4, kPhases, kTokenTiles, false, 8>>(p, device, overlap, stream);
  }
}

template <typename T>
cudaError_t few_rows(const FewRows& p, const Device& device, bool overlap, cudaStream_t stream) {
  if (p.num_tokens == 1) return choose<T, 8, 1>(p, device, overlap, stream);
  if (p.num_tokens == 2) return choose<T, 4, 1>(p, device, overlap, stream);
  if (p.num_tokens <= 4) return choose<T, 2, 1>(p, device, overlap, stream);
  if (p.num_tokens <= 8) return choose<T, 1, 1>(p, device, overlap, stream);
  return choose<T, 1, 2>(p, device, overlap, stream);
}

}  // namespace
}  // namespace nf4

// y_i [num_tokens, n_i] = x [num_tokens, k] times the transpose of weight i [n_i, k], plus bias i [n_i] where
// not null, for up to NF4_MOST_WEIGHTS weights that share x; all contiguous and of one dtype, bf16 or fp16.
// Needs k % 64 == 0 and 16-byte aligned x and codes; answers cudaErrorNotSupported where these do not hold or
// the device has too little shared memory. `overlap` promises that no kernel right before this one in the
// stream writes the weights.
extern "C" int nf4_linear_few_rows(const Nf4Linear* linears, int num_weights, const void* x, int num_tokens,
                                   int k, int dtype, int overlap, cudaStream_t stream) {
  if (num_weights < 1 || num_weights > NF4_MOST_WEIGHTS) return cudaErrorInvalidValue;
  if (num_tokens < 1 || k < 1) return cudaErrorInvalidValue;
  nf4::FewRows p = {};
  p.x = x;
  p.num_tokens = num_tokens;
  p.k = k;
  p.num_weights = num_weights;
  uintptr_t pointers = reinterpret_cast<uintptr_t>(x);
  for (int i = 0; i < num_weights; ++i) {
    if (linears[i].n < 1) return cudaErrorInvalidValue;
    p.parts[i] = linears[i];
    pointers |= reinterpret_cast<uintptr_t>(linears[i].weight.codes);
  }
  if (k % nf4::kBlock != 0 || pointers % 16 != 0) return cudaErrorNotSupported;
  nf4::Device device;
  if (cudaError_t error = nf4::current_device(&device)) return error;
  if (dtype == NF4_BFLOAT16) return nf4::few_rows<__nv_bfloat16>(p, device, overlap, stream);
  if (dtype == NF4_FLOAT16) return nf4::few_rows<__half>(p, device, overlap, stream);
  return cudaErrorInvalidValue;
}
