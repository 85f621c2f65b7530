// How a chunk goes:
//
//     its thread    reads or copies it into the slot's pinned memory, fills up the last block with zeros
//     stream in     copy to the device
//     the slot's    kernel
//     stream out    one copy of codes and scales into the slot's pinned memory
//
// Streams wait for each other by events, so that one slot's copies run beside another's kernel.
#include "encoder.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>
#include <thread>

#include "../cpu/search.h"
#include "encode.cuh"

namespace nf4 {
namespace {

constexpr size_t kHugePage = 2 << 20;
constexpr int64_t kAlignment = 4096;
constexpr std::chrono::microseconds kNap{20};  // half of the time in which a copy of 2 MiB goes over the link

void check(const char* call, cudaError_t code) {
  if (code == cudaSuccess) return;
  cudaGetLastError();  // or it would be reported once more
  throw CudaFailure{call, code};
}

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

ChunkEncoder::ChunkEncoder(int device, const float* levels, const float* thresholds, bool searched,
                           int64_t chunk_bytes, int slots)
    : device_(device), searched_(searched), chunk_bytes_(chunk_bytes), slots_(slots) {
  try {
    check("cudaSetDevice", cudaSetDevice(device));
    const SearchTables search = search_tables(levels, thresholds);
    has_bins_ = search.has_bins;
    const EncodeTables tables = encode_tables(search);
    check("cudaMalloc", cudaMalloc(reinterpret_cast<void**>(&tables_), sizeof tables));
    check("cudaMemcpy", cudaMemcpy(tables_, &tables, sizeof tables, cudaMemcpyHostToDevice));
    check("cudaStreamCreate", cudaStreamCreateWithFlags(&in_, cudaStreamNonBlocking));
    check("cudaStreamCreate", cudaStreamCreateWithFlags(&out_, cudaStreamNonBlocking));

    // A chunk of 16-bit values has the most of them, and so the most results.
    const int64_t values = aligned(chunk_bytes + kBlock * 4);
    const int64_t results = aligned(EncodedLayout(chunk_bytes / 2, searched).bytes);
    host_bytes_ = static_cast<size_t>((values + results) * slots);
    check("cudaMalloc", cudaMalloc(reinterpret_cast<void**>(&memory_), host_bytes_));
    // Pages from the kernel, huge ones if there are, and registered: cudaHostAlloc takes several times as
    // long.
    mapped_ =
        mmap(nullptr, host_bytes_ + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped_ == MAP_FAILED) {
      mapped_ = nullptr;
      throw std::bad_alloc();
    }
    const uintptr_t begin = reinterpret_cast<uintptr_t>(mapped_);
    host_ = reinterpret_cast<uint8_t*>((begin + kHugePage - 1) / kHugePage * kHugePage);
#ifdef MADV_HUGEPAGE
    madvise(host_, host_bytes_, MADV_HUGEPAGE);  // only advice
#endif
    check("cudaHostRegister", cudaHostRegister(host_, host_bytes_, cudaHostRegisterDefault));
    is_pinned_ = true;
    for (int i = 0; i < slots; ++i) {
      Slot& slot = slots_[i];
      slot.host_values = host_ + i * (values + results);
      slot.host_results = slot.host_values + values;
      slot.values = memory_ + i * (values + results);
      slot.results = slot.values + values;
      check("cudaStreamCreate", cudaStreamCreateWithFlags(&slot.kernels, cudaStreamNonBlocking));
      for (cudaEvent_t* event : {&slot.arrived, &slot.encoded, &slot.returned}) {
        check("cudaEventCreate", cudaEventCreateWithFlags(event, cudaEventDisableTiming));
      }
    }
  } catch (...) {
    release();
    throw;
  }
}

ChunkEncoder::~ChunkEncoder() { release(); }

void ChunkEncoder::start(int index, const void* values, Dtype dtype, int64_t n) {
  Slot& slot = slots_[index];
  const EncodedLayout layout(n, searched_);
  const auto bytes = static_cast<size_t>(n * dtype_bytes(dtype));
  const auto padded = static_cast<size_t>(layout.num_blocks * kBlock * dtype_bytes(dtype));
  if (values != slot.host_values) memcpy(slot.host_values, values, bytes);
  memset(slot.host_values + bytes, 0, padded - bytes);
  slot.dtype = dtype;
  slot.n = n;
  check("cudaSetDevice", cudaSetDevice(device_));
  const std::lock_guard<std::mutex> lock(order_);
  check("cudaMemcpyAsync",
        cudaMemcpyAsync(slot.values, slot.host_values, padded, cudaMemcpyHostToDevice, in_));
  check("cudaEventRecord", cudaEventRecord(slot.arrived, in_));
  check("cudaStreamWaitEvent", cudaStreamWaitEvent(slot.kernels, slot.arrived, 0));
  check("encode_chunk",
        encode_chunk(tables_, searched_, has_bins_, slot.values, dtype, layout, slot.results, slot.kernels));
  check("cudaEventRecord", cudaEventRecord(slot.encoded, slot.kernels));
  check("cudaStreamWaitEvent", cudaStreamWaitEvent(out_, slot.encoded, 0));
  check("cudaMemcpyAsync", cudaMemcpyAsync(slot.host_results, slot.results, static_cast<size_t>(layout.bytes),
                                           cudaMemcpyDeviceToHost, out_));
  check("cudaEventRecord", cudaEventRecord(slot.returned, out_));
}

ChunkEncoder::Encoded ChunkEncoder::finish(int index) {
  const Slot& slot = slots_[index];
  check("cudaSetDevice", cudaSetDevice(device_));
  cudaError_t code;
  // Neither spinning, which takes a core from those that read, nor an event that blocks, which costs an
  // interrupt a chunk.
  while ((code = cudaEventQuery(slot.returned)) == cudaErrorNotReady) std::this_thread::sleep_for(kNap);
  check("cudaEventQuery", code);
  const EncodedLayout layout(slot.n, searched_);
  return {layout, slot.host_results, slot.n, first_nonfinite(slot, layout)};
}

int64_t ChunkEncoder::first_nonfinite(const Slot& slot, const EncodedLayout& layout) const {
  const auto* first_bad = reinterpret_cast<const int32_t*>(slot.host_results + layout.bad);
  for (int64_t group = 0; group < layout.num_groups; ++group) {
    if (first_bad[group] < 0) continue;
    const int64_t begin = (group * kNestedBlock + first_bad[group]) * kBlock;
    for (int64_t i = begin; i < begin + kBlock; ++i) {
      const auto half = [&] { return reinterpret_cast<const uint16_t*>(slot.host_values)[i]; };
      const bool bad =
          slot.dtype == Dtype::float32
              ? (reinterpret_cast<const uint32_t*>(slot.host_values)[i] & kInfinityBits) == kInfinityBits
          : slot.dtype == Dtype::bfloat16 ? (half() & 0x7f80) == 0x7f80
                                          : (half() & 0x7c00) == 0x7c00;
      if (bad) return i;
    }
  }
  return -1;
}

void ChunkEncoder::release() {
  cudaSetDevice(device_);
  cudaDeviceSynchronize();
  for (Slot& slot : slots_) {
    for (cudaEvent_t event : {slot.arrived, slot.encoded, slot.returned}) {
      if (event != nullptr) cudaEventDestroy(event);
    }
    if (slot.kernels != nullptr) cudaStreamDestroy(slot.kernels);
  }
  for (cudaStream_t stream : {in_, out_}) {
    if (stream != nullptr) cudaStreamDestroy(stream);
  }
  if (is_pinned_) cudaHostUnregister(host_);
  if (mapped_ != nullptr) munmap(mapped_, host_bytes_ + kHugePage);
  cudaFree(memory_);
  cudaFree(tables_);
  cudaGetLastError();  // reported where it was found
}

}  // namespace nf4
