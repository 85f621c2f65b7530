// A part of a file into device memory, checked on the way: each reader's pieces go through a ring of pinned
// memory of its own.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "range_reader.h"

namespace nf4 {

struct UploadTarget {
  uint8_t* memory;      // on `device`
  int64_t bytes;        // what lies behind is read and checked, but not copied
  int64_t file_offset;  // of the file's byte that goes to the first of `memory`
  int device;
  cudaStream_t after;  // what is in this stream now may still use the memory
};

struct UploadRing {
  int64_t piece_bytes;
  int slots;  // pieces of one reader: being read, or on their way
};

class Upload {
 public:
  // Starts reading; `target.device` must be the current one. `expected` are the XXH3-64 of the ranges; none:
  // nothing is checked. The descriptor is duplicated: the caller's may be closed. Throws std::system_error
  // where that fails or no thread starts.
  Upload(int fd, std::vector<Range> ranges, std::vector<uint64_t> expected, const UploadTarget& target,
         const UploadRing& ring, int readers);
  ~Upload();  // stops where it is

  Upload(const Upload&) = delete;
  Upload& operator=(const Upload&) = delete;

  // When the reader has ended, so have all copies.
  RangeReader& reader() { return *reader_; }

 private:
  void release();

  const int fd_;
  cudaStream_t copies_ = nullptr;
  std::unique_ptr<RangeReader> reader_;
};

}  // namespace nf4
