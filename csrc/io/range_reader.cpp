// How it works. Threads draw ranges in file order. Each reads its range piece by piece, and hashes a piece
// while it still lies in that core's cache. Reads go through the page cache: a file is often loaded again.
// What is not there yet would come in the small steps of the kernel's readahead, which several readers of one
// descriptor confuse; so a read that would wait first announces what follows, and the disk sees megabytes
// from every thread at once.
#include "range_reader.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <new>
#include <system_error>
#include <utility>

#include "xxh3.h"

namespace nf4 {
namespace {

constexpr int64_t kAhead = 4 << 20;      // how far ahead of itself a reader announces
constexpr int64_t kAdvised = 128 << 10;  // Linux cuts longer advice to the device's readahead, at least this

// Bytes that the page cache has at once; 0 where it cannot tell.
int64_t read_cached(int fd, uint8_t* memory, int64_t size, int64_t offset) {
#ifdef RWF_NOWAIT
  const iovec into = {memory, static_cast<size_t>(size)};
  return std::max<int64_t>(0, preadv2(fd, &into, 1, offset, RWF_NOWAIT));
#else
  (void)fd, (void)memory, (void)size, (void)offset;
  return 0;
#endif
}

void announce(int fd, int64_t begin, int64_t end) {
#ifdef POSIX_FADV_WILLNEED
  for (int64_t at = begin; at < end; at += kAdvised) {
    posix_fadvise(fd, at, std::min(kAdvised, end - at),
                  POSIX_FADV_WILLNEED);  // only advice: no error matters
  }
#else
  (void)fd, (void)begin, (void)end;
#endif
}

}  // namespace

RangeReader::RangeReader(Job job) : job_(std::move(job)), sums_(job_.ranges.size()) {
  const int threads = std::min<int64_t>(job_.threads, job_.ranges.size());
  active_ = threads;
  threads_.reserve(threads);
  for (int thread = 0; thread < threads; ++thread) {
    try {
      threads_.emplace_back([this] { work(); });
    } catch (const std::exception&) {
      if (thread == 0) throw;
      const std::lock_guard<std::mutex> lock(mutex_);
      active_ -= threads - thread;
      if (active_ == 0) left_.notify_all();
      break;
    }
  }
}

RangeReader::~RangeReader() {
  stop();
  for (std::thread& thread : threads_) thread.join();
}

bool RangeReader::ended_within(std::chrono::milliseconds time) {
  std::unique_lock<std::mutex> lock(mutex_);
  return left_.wait_for(lock, time, [this] { return active_ == 0; });
}

void RangeReader::work() {
  try {
    const std::unique_ptr<Destination> destination = job_.destination();
    const int64_t count = static_cast<int64_t>(job_.ranges.size());
    for (int64_t i; !stopped_.load(std::memory_order_relaxed) && (i = next_.fetch_add(1)) < count;) {
      if (!read_range(i, *destination)) break;
    }
    if (const int code = destination->finish()) fail(Trouble::kDestination, -1, code);
  } catch (const std::bad_alloc&) {
    fail(Trouble::kSystem, -1, ENOMEM);
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  if (--active_ == 0) {
    job_.destination = nullptr;  // gives back what the destinations shared
    left_.notify_all();
  }
}

bool RangeReader::read_range(int64_t index, Destination& destination) {
  const Range range = job_.ranges[index];
  Xxh3 sum(range.end - range.begin);
  int64_t announced = 0;  // up to where
  for (int64_t offset = range.begin; offset < range.end;) {
    if (stopped_.load(std::memory_order_relaxed)) return false;
    const int64_t size = std::min(job_.piece_bytes, range.end - offset);
    uint8_t* memory = nullptr;
    if (const int code = destination.lend(offset, &memory)) return fail(Trouble::kDestination, index, code);
    if (!read_piece(index, offset, size, memory, &announced)) return false;
    // Handed on first: it may travel while it is hashed, and what turns out damaged is never used.
    if (const int code = destination.take(offset, size)) return fail(Trouble::kDestination, index, code);
    sum.update(memory, size);
    offset += size;
    bytes_done_.fetch_add(size, std::memory_order_relaxed);
  }
  sums_[index] = sum.digest();
  if (!job_.expected.empty() && sums_[index] != job_.expected[index])
    return fail(Trouble::kDamaged, index, 0);
  return true;
}

bool RangeReader::read_piece(int64_t index, int64_t offset, int64_t size, uint8_t* memory,
                             int64_t* announced) {
  const bool is_announced = offset + size <= *announced;
  int64_t done = is_announced ? 0 : read_cached(job_.fd, memory, size, offset);
  if (done < size && !is_announced) {
    const int64_t from = std::max(offset + done, *announced);
    *announced = std::min(offset + kAhead, job_.ranges[index].end);
    announce(job_.fd, from, *announced);
  }
  while (done < size) {
    const ssize_t count = pread(job_.fd, memory + done, static_cast<size_t>(size - done), offset + done);
    if (count == 0) {
      struct stat now;
      return fail(Trouble::kEnded, index, fstat(job_.fd, &now) == 0 ? now.st_size : -1);
    }
    if (count < 0 && errno != EINTR) return fail(Trouble::kSystem, index, errno);
    if (count > 0) done += count;
  }
  return true;
}

bool RangeReader::fail(Trouble trouble, int64_t range, int64_t code) {
  stop();
  const std::lock_guard<std::mutex> lock(mutex_);
  if (failure_.trouble == Trouble::kNone) failure_ = {trouble, range, code};
  return false;
}

}  // namespace nf4
