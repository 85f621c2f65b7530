// Byte ranges of a file, read and hashed by threads of their own, each piece handed on as soon as it is read.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace nf4 {

struct Range {
  int64_t begin, end;  // bytes of the file
};

// Where one thread's pieces go. Codes other than 0 are errors of its own kind, and end everything. Its
// destructor waits for whatever still reads the memory that it lent.
class Destination {
 public:
  virtual ~Destination() = default;
  virtual int lend(int64_t offset, uint8_t** memory) = 0;  // room for the piece at `offset` of the file
  virtual int take(int64_t offset, int64_t size) = 0;      // that piece is there
  virtual int finish() = 0;  // there are no more pieces: be done with all of them
};

enum class Trouble { kNone, kDamaged, kEnded, kSystem, kDestination };

struct Failure {
  Trouble trouble;
  int64_t range;  // which one, or -1
  int64_t code;   // kEnded: size of the file; kSystem: errno; kDestination: the destination's
};

class RangeReader {
 public:
  struct Job {
    int fd;  // stays open until the reader is gone
    std::vector<Range> ranges;
    std::vector<uint64_t> expected;  // XXH3-64 of each range; or empty, and any will do
    int64_t piece_bytes;             // most at a time; a multiple of Xxh3::kBlockBytes
    int threads;
    std::function<std::unique_ptr<Destination>()> destination;  // called on that thread
  };

  // Starts the threads, fewer where no more are to be had. Throws if there is not one.
  explicit RangeReader(Job job);
  ~RangeReader();  // stops where it is

  RangeReader(const RangeReader&) = delete;
  RangeReader& operator=(const RangeReader&) = delete;

  void stop() { stopped_.store(true, std::memory_order_relaxed); }

  // Whether all is over, waiting for it at most so long.
  bool ended_within(std::chrono::milliseconds time);

  int64_t bytes_done() const { return bytes_done_.load(std::memory_order_relaxed); }

  // When all is over: what went wrong first, and the sums of the ranges (if nothing went wrong or was
  // stopped).
  const Failure& failure() const { return failure_; }
  const std::vector<uint64_t>& sums() const { return sums_; }

 private:
  void work();
  bool read_range(int64_t index, Destination& destination);
  bool read_piece(int64_t index, int64_t offset, int64_t size, uint8_t* memory, int64_t* announced);
  bool fail(Trouble trouble, int64_t range, int64_t code);

  Job job_;
  std::vector<uint64_t> sums_;
  std::vector<std::thread> threads_;
  std::atomic<int64_t> next_{0}, bytes_done_{0};
  std::atomic<bool> stopped_{false};
  std::mutex mutex_;  // guards what follows
  std::condition_variable left_;
  int active_ = 0;
  Failure failure_{Trouble::kNone, -1, 0};
};

}  // namespace nf4
