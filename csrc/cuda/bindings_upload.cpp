// The part of nf4._cuda that reads files; see upload.h and _cuda.pyi.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bindings.h"
#include "python_wait.h"
#include "upload.h"
#include "xxh3.h"

namespace py = pybind11;

namespace {

std::unique_ptr<nf4::Upload> start_upload(int fd, int64_t begin, int64_t end, int64_t chunk_bytes,
                                          const py::bytes& sums, uintptr_t memory, int64_t bytes, int device,
                                          uintptr_t after, int readers, int64_t piece_bytes, int slots) {
  require(begin >= 0, "begin", "at least 0", begin);
  require(end >= begin, "end", "at least begin", end);
  require(chunk_bytes >= 1, "chunk_bytes", "at least 1", chunk_bytes);
  require(bytes >= 0, "bytes", "at least 0", bytes);
  require(readers >= 1, "readers", "at least 1", readers);
  require(piece_bytes >= 1 && piece_bytes % nf4::Xxh3::kBlockBytes == 0, "piece_bytes", "a multiple of 1024",
          piece_bytes);
  require(slots >= 1, "slots", "at least 1", slots);
  std::vector<nf4::Range> chunks;
  for (int64_t at = begin; at < end; at += chunk_bytes)
    chunks.push_back({at, std::min(at + chunk_bytes, end)});
  const std::string_view stored = sums;
  std::vector<uint64_t> expected(stored.size() / sizeof(uint64_t));
  require(stored.empty() || stored.size() == chunks.size() * sizeof(uint64_t), "sums",
          "none, or 8 bytes a chunk", static_cast<int64_t>(stored.size()));
  memcpy(expected.data(), stored.data(), stored.size());
  const nf4::UploadTarget target = {reinterpret_cast<uint8_t*>(memory), bytes, begin, device,
                                    reinterpret_cast<cudaStream_t>(after)};
  return std::make_unique<nf4::Upload>(fd, std::move(chunks), std::move(expected), target,
                                       nf4::UploadRing{piece_bytes, slots}, readers);
}

py::object wait(nf4::Upload& upload) {
  nf4::wait_in_python(upload.reader(), [] {});
  return nf4::failure_of(upload.reader());
}

// When this returns, nothing reads the file or writes to the device any more.
void cancel(nf4::Upload& upload) {
  const py::gil_scoped_release unlocked;
  upload.reader().stop();
  while (!upload.reader().ended_within(std::chrono::milliseconds(1000))) {
  }
}

std::string error_text(int code) {
  const auto error = static_cast<cudaError_t>(code);
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

}  // namespace

void bind_upload(py::module_& m) {
  using namespace py::literals;
  py::class_<nf4::Upload>(m, "Upload")
      .def(py::init(&start_upload), "fd"_a, "begin"_a, "end"_a, "chunk_bytes"_a, "sums"_a, "memory"_a,
           "bytes"_a, "device"_a, "after"_a, "readers"_a, "piece_bytes"_a, "slots"_a)
      .def("wait", &wait)
      .def("cancel", &cancel);
  m.def("error_text", &error_text, "code"_a);
}
