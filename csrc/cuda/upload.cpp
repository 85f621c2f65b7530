// How it works, for each reader:
//
//     file    | piece | piece | piece | ...   pread by this thread into the slot whose copy has ended
//     ring    [ slot ][ slot ][ slot ]        pinned: the sum is taken here while the copy runs
//     device  | piece | piece | piece | ...   cudaMemcpyAsync, then the slot's event
//
// All copies go into one stream: the link carries one at a time anyway, and with several streams the device
// loses time in changing between them. The rings of all readers are one piece of memory and are pinned by one
// call: pinning costs the driver as much for 2 MiB as for many times that, and it does one after the other
// while copies wait. The pages come from the kernel, huge ones if there are, each reader has its own made,
// and they are registered: cudaHostAlloc takes several times as long.
#include "upload.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <utility>

namespace nf4 {
namespace {

constexpr size_t kPage = 4 << 10, kHugePage = 2 << 20;
constexpr std::chrono::microseconds kNap{20};  // half of the time in which a copy of 2 MiB goes over the link

// Host memory that the device copies from: a part for each reader, pinned together.
class PinnedMemory {
 public:
  PinnedMemory(size_t part_bytes, int parts) : part_bytes_(part_bytes), bytes_(part_bytes * parts) {
    mapped_ = mmap(nullptr, bytes_ + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped_ == MAP_FAILED) throw std::bad_alloc();
    const uintptr_t begin = reinterpret_cast<uintptr_t>(mapped_);
    data_ = reinterpret_cast<uint8_t*>((begin + kHugePage - 1) / kHugePage * kHugePage);
#ifdef MADV_HUGEPAGE
    madvise(data_, bytes_, MADV_HUGEPAGE);  // only advice
#endif
  }

  ~PinnedMemory() {
    if (is_pinned_) cudaHostUnregister(data_);
    munmap(mapped_, bytes_ + kHugePage);
  }

  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;

  // The next part, for no more callers than there are parts. Its pages are made by the calling thread, as
  // others make theirs, and not by the driver.
  uint8_t* claim() {
    const int part = claimed_.fetch_add(1);
    uint8_t* memory = data_ + part * part_bytes_;
    for (size_t at = 0; at < part_bytes_; at += kPage) memory[at] = 0;
    const std::lock_guard<std::mutex> lock(mutex_);
    ++made_;
    all_made_.notify_all();
    return memory;
  }

  // By every reader before its first copy. Parts that nobody has claimed yet are pinned all the same.
  cudaError_t pin() {
    std::unique_lock<std::mutex> lock(mutex_);
    all_made_.wait(lock, [this] { return made_ == claimed_.load(); });
    if (!is_pinned_ && code_ == cudaSuccess) {
      code_ = cudaHostRegister(data_, bytes_, cudaHostRegisterDefault);
      is_pinned_ = code_ == cudaSuccess;
    }
    return code_;
  }

 private:
  const size_t part_bytes_, bytes_;
  void* mapped_;
  uint8_t* data_;
  std::atomic<int> claimed_{0};
  std::mutex mutex_;  // of what follows
  std::condition_variable all_made_;
  int made_ = 0;
  bool is_pinned_ = false;
  cudaError_t code_ = cudaSuccess;
};

class PinnedRing final : public Destination {
 public:
  // `code`: of making the stream; if it is an error, this passes it on.
  PinnedRing(const UploadTarget& target, const UploadRing& ring, std::shared_ptr<PinnedMemory> memory,
             cudaStream_t copies, cudaError_t code)
      : target_(target),
        piece_bytes_(ring.piece_bytes),
        code_(code == cudaSuccess ? cudaSetDevice(target.device) : code),
        memory_(std::move(memory)),
        slots_(memory_->claim()),
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

  int lend(int64_t, uint8_t** memory) override {
    *memory = slots_ + slot_ * piece_bytes_;
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
    if (!is_pinned_) code_ = memory_->pin();
    is_pinned_ = code_ == cudaSuccess;
    if (code_ == cudaSuccess) {
      code_ = cudaMemcpyAsync(target_.memory + at, slots_ + slot_ * piece_bytes_, static_cast<size_t>(wanted),
                              cudaMemcpyHostToDevice, copies_);
    }
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
  const int64_t piece_bytes_;
  cudaError_t code_;
  const std::shared_ptr<PinnedMemory> memory_;
  uint8_t* const slots_;
  std::vector<cudaEvent_t> copied_;  // one a slot
  const cudaStream_t copies_;
  size_t slot_ = 0;  // the next to be lent
  bool is_pinned_ = false;
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
  try {
    const auto memory = std::make_shared<PinnedMemory>(ring.piece_bytes * ring.slots, readers);
    const auto destination = [this, target, ring, memory, code] {
      return std::make_unique<PinnedRing>(target, ring, memory, copies_, code);
    };
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
