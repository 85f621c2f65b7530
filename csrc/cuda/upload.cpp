// How it works, for each reader:
//
//     file    | piece | piece | piece | ...   pread by this thread into the slot whose copy has ended
//     ring    [ slot ][ slot ][ slot ]        pinned: the sum is taken here while the copy runs
//     device  | piece | piece | piece | ...   cudaMemcpyAsync, then the slot's event
//
// All copies go into one stream: the link carries one at a time anyway, and with several streams the device
// loses time in changing between them. Each reader pins its ring itself, a slot when it is first lent: the
// driver pins one piece of memory after the other, and copies that are to start wait as well, so whatever is
// pinned before the first copies delays them all. The ring's pages come from the kernel, huge ones if there
// are, and are registered: cudaHostAlloc takes several times as long.
#include "upload.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <new>
#include <system_error>
#include <thread>
#include <utility>

namespace nf4 {
namespace {

constexpr size_t kPage = 4 << 10, kHugePage = 2 << 20;
constexpr std::chrono::microseconds kNap{20};  // half of the time in which a copy of 2 MiB goes over the link

// Pieces of host memory that the device copies from.
class PinnedMemory {
 public:
  PinnedMemory(int64_t piece_bytes, int pieces)
      : piece_bytes_(static_cast<size_t>(piece_bytes)), mapped_bytes_(piece_bytes_ * pieces + kHugePage) {
    mapped_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped_ == MAP_FAILED) throw std::bad_alloc();
    const uintptr_t begin = reinterpret_cast<uintptr_t>(mapped_);
    data_ = reinterpret_cast<uint8_t*>((begin + kHugePage - 1) / kHugePage * kHugePage);
#ifdef MADV_HUGEPAGE
    madvise(data_, piece_bytes_ * pieces, MADV_HUGEPAGE);  // only advice
#endif
  }

  ~PinnedMemory() {
    for (size_t index = 0; index < pinned_; ++index) cudaHostUnregister(piece(index));
    munmap(mapped_, mapped_bytes_);
  }

  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;

  uint8_t* piece(size_t index) const { return data_ + index * piece_bytes_; }

  // Pieces are pinned in their order.
  cudaError_t pin(size_t index) {
    if (index < pinned_) return cudaSuccess;
    uint8_t* memory = piece(index);
    for (size_t at = 0; at < piece_bytes_; at += kPage)
      memory[at] = 0;  // by this thread, not under the driver's lock
    const cudaError_t code = cudaHostRegister(memory, piece_bytes_, cudaHostRegisterDefault);
    if (code == cudaSuccess) ++pinned_;
    return code;
  }

 private:
  const size_t piece_bytes_, mapped_bytes_;
  void* mapped_;
  uint8_t* data_;
  size_t pinned_ = 0;
};

class PinnedRing final : public Destination {
 public:
  // `code`: of making the stream; if it is an error, this passes it on.
  PinnedRing(const UploadTarget& target, const UploadRing& ring, cudaStream_t copies, cudaError_t code)
      : target_(target),
        code_(code == cudaSuccess ? cudaSetDevice(target.device) : code),
        memory_(ring.piece_bytes, ring.slots),
        copied_(ring.slots),
        copies_(copies) {
    for (cudaEvent_t& event : copied_) {
      if (code_ == cudaSuccess) code_ = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    }
  }

  ~PinnedRing() override {
    cudaStreamSynchronize(copies_);
    for (cudaEvent_t event : copied_) {
      if (event != nullptr) cudaEventDestroy(event);
    }
  }

  int lend(uint8_t** memory) override {
    *memory = memory_.piece(slot_);
    if (code_ == cudaSuccess) code_ = memory_.pin(slot_);
    if (code_ != cudaSuccess) return code_;
    // Neither spinning, which takes a core from those that read, nor an event that blocks, which costs an
    // interrupt a piece.
    while ((code_ = cudaEventQuery(copied_[slot_])) == cudaErrorNotReady) std::this_thread::sleep_for(kNap);
    return code_;
  }

  int take(int64_t offset, int64_t size) override {
    const int64_t at = offset - target_.file_offset;
    const int64_t wanted = std::min(size, target_.bytes - at);
    if (wanted <= 0) return cudaSuccess;
    code_ = cudaMemcpyAsync(target_.memory + at, memory_.piece(slot_), static_cast<size_t>(wanted),
                            cudaMemcpyHostToDevice, copies_);
    if (code_ == cudaSuccess) code_ = cudaEventRecord(copied_[slot_], copies_);
    slot_ = (slot_ + 1) % copied_.size();
    return code_;
  }

  int finish() override {
    if (code_ == cudaSuccess) code_ = cudaStreamSynchronize(copies_);
    return code_;
  }

 private:
  const UploadTarget target_;
  cudaError_t code_;
  PinnedMemory memory_;
  std::vector<cudaEvent_t> copied_;  // one a slot
  const cudaStream_t copies_;
  size_t slot_ = 0;  // the next to be lent
};

int duplicate(int fd) {
  const int own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
  if (own < 0) throw std::system_error(errno, std::generic_category(), "cannot duplicate a descriptor");
  return own;
}

// A stream whose work begins when what is in `after` now has ended.
cudaError_t create_stream(cudaStream_t after, cudaStream_t* stream) {
  cudaEvent_t event = nullptr;
  cudaError_t code = cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking);
  if (code == cudaSuccess) code = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
  if (code == cudaSuccess) code = cudaEventRecord(event, after);
  if (code == cudaSuccess) code = cudaStreamWaitEvent(*stream, event, 0);
  if (event != nullptr) cudaEventDestroy(event);
  return code;
}

}  // namespace

Upload::Upload(int fd, std::vector<Range> ranges, std::vector<uint64_t> expected, const UploadTarget& target,
               const UploadRing& ring, int readers)
    : fd_(duplicate(fd)) {
  const cudaError_t code = create_stream(target.after, &copies_);
  const auto destination = [this, target, ring, code] {
    return std::make_unique<PinnedRing>(target, ring, copies_, code);
  };
  try {
    reader_ = std::make_unique<RangeReader>(RangeReader::Job{fd_, std::move(ranges), std::move(expected),
                                                             ring.piece_bytes, readers, destination});
  } catch (...) {
    release();
    throw;
  }
}

Upload::~Upload() { release(); }

void Upload::release() {
  reader_.reset();
  if (copies_ != nullptr) cudaStreamDestroy(copies_);
  close(fd_);
  cudaGetLastError();  // reported where it was found, and not by the next user of this thread again
}

}  // namespace nf4
