// Chunks of tensors through a GPU: into pinned memory, over the link, through the kernels and back.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <mutex>
#include <vector>

#include "encode.h"

namespace nf4 {

struct CudaFailure {  // becomes nf4format._cuda_encode.CudaError
  const char* call;
  cudaError_t code;
};

// A fixed number of slots, each with room for a chunk on either side. A slot belongs to one thread at a time;
// different slots may be used at once.
class ChunkEncoder {
 public:
  // `levels` [16] and `thresholds` [15]: as for quantize_search. Throws CudaFailure, std::bad_alloc.
  ChunkEncoder(int device, const float* levels, const float* thresholds, bool searched, int64_t chunk_bytes,
               int slots);
  ~ChunkEncoder();

  ChunkEncoder(const ChunkEncoder&) = delete;
  ChunkEncoder& operator=(const ChunkEncoder&) = delete;

  int num_slots() const { return static_cast<int>(slots_.size()); }
  int64_t chunk_bytes() const { return chunk_bytes_; }

  // Copies n values, at most a chunk, into the slot's memory, if they are not there, and starts their way.
  void start(int slot, const void* values, Dtype dtype, int64_t n);
  // Pinned, room for a chunk; not to be touched between start and finish.
  uint8_t* memory(int slot) const { return slots_[slot].host_values; }
  // Waits for the slot's results, in host memory and valid until its next start.
  struct Encoded {
    EncodedLayout layout;
    const uint8_t* results;
    int64_t n;
    int64_t nonfinite;  // index of the first NaN or infinity, or -1
  };
  Encoded finish(int slot);

 private:
  struct Slot {
    uint8_t *host_values = nullptr, *host_results = nullptr, *values = nullptr, *results = nullptr;
    cudaStream_t kernels = nullptr;
    cudaEvent_t arrived = nullptr, encoded = nullptr, returned = nullptr;
    Dtype dtype = Dtype::float32;  // of what it holds
    int64_t n = 0;
  };

  int64_t first_nonfinite(const Slot& slot, const EncodedLayout& layout) const;
  void release();

  const int device_;
  const bool searched_;
  const int64_t chunk_bytes_;
  bool has_bins_ = false, is_pinned_ = false;
  size_t host_bytes_ = 0;
  void* mapped_ = nullptr;
  uint8_t *host_ = nullptr, *memory_ = nullptr;
  EncodeTables* tables_ = nullptr;
  // Copies of either direction go through one stream each: the link carries one at a time anyway.
  cudaStream_t in_ = nullptr, out_ = nullptr;
  std::vector<Slot> slots_;
  std::mutex order_;  // of a slot's calls in the streams that all share
};

}  // namespace nf4
