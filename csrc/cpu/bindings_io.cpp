// The part of nf4format._native that reads files; see _native.pyi.
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "python_wait.h"
#include "xxh3.h"

namespace py = pybind11;

namespace nf4 {
namespace {

constexpr int64_t kPieceBytes = 256 << 10;  // stays in a core's own cache until it is hashed

// Bytes that are wanted for their sum alone.
class Scratch final : public Destination {
 public:
  int lend(int64_t, uint8_t** memory) override {
    *memory = memory_.data();
    return 0;
  }
  int take(int64_t, int64_t) override { return 0; }
  int finish() override { return 0; }

 private:
  std::vector<uint8_t> memory_ = std::vector<uint8_t>(kPieceBytes);
};

// One block of memory, as the file has it.
class Block final : public Destination {
 public:
  Block(uint8_t* memory, int64_t begin) : memory_(memory), begin_(begin) {}
  int lend(int64_t offset, uint8_t** memory) override {
    *memory = memory_ + (offset - begin_);
    return 0;
  }
  int take(int64_t, int64_t) override { return 0; }
  int finish() override { return 0; }

 private:
  uint8_t* const memory_;  // where byte `begin_` of the file goes
  const int64_t begin_;
};

void check_threads(int threads) {
  if (threads < 1)
    throw std::invalid_argument("threads: expected at least 1, got " + std::to_string(threads));
}

py::object read_chunks(int fd, int64_t begin, int64_t end, int64_t chunk_bytes, const py::bytes& sums,
                       uintptr_t memory, int threads) {
  check_threads(threads);
  if (begin < 0 || end < begin || chunk_bytes < 1) {
    throw std::invalid_argument("range: expected 0 <= begin <= end in chunks of at least 1 byte, got " +
                                std::to_string(begin) + " to " + std::to_string(end) + " in chunks of " +
                                std::to_string(chunk_bytes));
  }
  std::vector<Range> chunks;
  for (int64_t at = begin; at < end; at += chunk_bytes)
    chunks.push_back({at, std::min(at + chunk_bytes, end)});
  const std::string_view bytes = sums;
  std::vector<uint64_t> expected(bytes.size() / sizeof(uint64_t));
  if (bytes.size() % sizeof(uint64_t) != 0 || (!bytes.empty() && expected.size() != chunks.size())) {
    throw std::invalid_argument("sums: expected none or " + std::to_string(8 * chunks.size()) +
                                " bytes, got " + std::to_string(bytes.size()));
  }
  if (!bytes.empty()) std::memcpy(expected.data(), bytes.data(), bytes.size());
  uint8_t* const into = reinterpret_cast<uint8_t*>(memory);
  RangeReader reader({fd, std::move(chunks), std::move(expected), kPieceBytes, threads,
                      [=] { return std::make_unique<Block>(into, begin); }});
  wait_in_python(reader, [] {});
  return failure_of(reader);
}

py::tuple hash_ranges(int fd, const std::vector<std::pair<int64_t, int64_t>>& ranges, int threads,
                      const py::object& progress) {
  check_threads(threads);
  std::vector<Range> spans;
  spans.reserve(ranges.size());
  for (const auto& [begin, end] : ranges) {
    if (begin < 0 || end < begin) {
      throw std::invalid_argument("ranges: expected 0 <= begin <= end, got " + std::to_string(begin) +
                                  " to " + std::to_string(end));
    }
    spans.push_back({begin, end});
  }
  RangeReader reader(
      {fd, std::move(spans), {}, kPieceBytes, threads, [] { return std::make_unique<Scratch>(); }});
  int64_t told = 0;
  wait_in_python(reader, [&] {
    const int64_t done = reader.bytes_done();
    if (!progress.is_none() && done > told) progress(done - told);
    told = done;
  });
  return py::make_tuple(reader.sums(), failure_of(reader));
}

uint64_t xxh3(const py::buffer& data, int64_t piece_bytes) {
  const py::buffer_info view = data.request();
  const int64_t size = view.size * view.itemsize;
  if (piece_bytes < 1 || piece_bytes % Xxh3::kBlockBytes != 0) {
    throw std::invalid_argument("piece_bytes: expected a multiple of 1024, got " +
                                std::to_string(piece_bytes));
  }
  Xxh3 sum(size);
  for (int64_t at = 0; at < size; at += piece_bytes) {
    sum.update(static_cast<const uint8_t*>(view.ptr) + at, size - at < piece_bytes ? size - at : piece_bytes);
  }
  return sum.digest();
}

}  // namespace
}  // namespace nf4

void bind_io(py::module_& m) {
  using namespace py::literals;
  m.def("hash_ranges", &nf4::hash_ranges, "fd"_a, "ranges"_a, "threads"_a, "progress"_a = py::none());
  m.def("read_chunks", &nf4::read_chunks, "fd"_a, "begin"_a, "end"_a, "chunk_bytes"_a, "sums"_a, "memory"_a,
        "threads"_a);
  m.def("xxh3", &nf4::xxh3, "data"_a, "piece_bytes"_a);
}
