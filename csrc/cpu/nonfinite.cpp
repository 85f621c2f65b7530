// The search for NaN and infinity, by the bits: all exponent bits set, and for NaN a fraction that is not
// zero.
#include <algorithm>
#include <atomic>

#include "kernels.h"
#include "thread_pool.h"

namespace nf4 {
namespace {

constexpr int64_t kTaskElements = 1 << 16;
constexpr int64_t kRunElements = 256;  // tested at once, without branches, so that it vectorizes

// First element whose magnitude bits are at least `limit`, or n.
template <typename T>
int64_t find(const T* values, int64_t n, T magnitude, T limit) {
  for (int64_t begin = 0; begin < n; begin += kRunElements) {
    const int64_t end = std::min(n, begin + kRunElements);
    T any = 0;
    for (int64_t i = begin; i < end; ++i) any |= T((values[i] & magnitude) >= limit);
    if (any == 0) continue;
    for (int64_t i = begin; i < end; ++i) {
      if ((values[i] & magnitude) >= limit) return i;
    }
  }
  return n;
}

int64_t find(const void* values, Dtype dtype, int64_t begin, int64_t n, bool nan_only) {
  const auto* words = static_cast<const uint32_t*>(values) + begin;
  const auto* halves = static_cast<const uint16_t*>(values) + begin;
  const int skip_infinity = nan_only ? 1 : 0;
  switch (dtype) {
    case Dtype::float32:
      return find<uint32_t>(words, n, 0x7fffffffu, 0x7f800000u + skip_infinity);
    case Dtype::bfloat16:
      return find<uint16_t>(halves, n, 0x7fff, uint16_t(0x7f80 + skip_infinity));
    case Dtype::float16:
      return find<uint16_t>(halves, n, 0x7fff, uint16_t(0x7c00 + skip_infinity));
  }
  return n;
}

}  // namespace

int64_t first_nonfinite(const void* values, Dtype dtype, int64_t n, bool nan_only, int threads) {
  std::atomic<int64_t> first{n};
  parallel_for((n + kTaskElements - 1) / kTaskElements, threads, [&](int64_t task) {
    const int64_t begin = task * kTaskElements;
    if (first.load(std::memory_order_relaxed) < begin) return;
    const int64_t count = std::min(kTaskElements, n - begin);
    const int64_t found = find(values, dtype, begin, count, nan_only);
    if (found == count) return;
    int64_t earliest = first.load(std::memory_order_relaxed);
    while (begin + found < earliest && !first.compare_exchange_weak(earliest, begin + found)) {
    }
  });
  return first == n ? -1 : first.load();
}

}  // namespace nf4
