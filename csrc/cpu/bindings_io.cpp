// The part of nf4format._native that reads files; see _native.pyi.
#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>
#include <string>
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
  int lend(uint8_t** memory) override {
    *memory = memory_.data();
    return 0;
  }
  int take(int64_t, int64_t) override { return 0; }
  int finish() override { return 0; }

 private:
  std::vector<uint8_t> memory_ = std::vector<uint8_t>(kPieceBytes);
};

py::tuple hash_ranges(int fd, const std::vector<std::pair<int64_t, int64_t>>& ranges, int threads,
                      const py::object& progress) {
  if (threads < 1)
    throw std::invalid_argument("threads: expected at least 1, got " + std::to_string(threads));
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
  m.def("xxh3", &nf4::xxh3, "data"_a, "piece_bytes"_a);
}
