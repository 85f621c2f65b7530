// What plain loops reach: cpu_kernels.py builds this for the machine it runs on. Each of `threads` threads
// takes an equal part of `bytes` bytes; returns seconds.
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

typedef uint64_t Line __attribute__((vector_size(32)));

enum Kind { kRead = 0, kWrite = 1, kWritePastCaches = 2, kCopy = 3 };

static void run_part(int kind, const Line* from, Line* to, size_t n) {
  const Line value = {n, 1, 2, 3};  // not zero: some machines write zeros faster
  switch (kind) {
    case kRead: {
      Line sums[4] = {};
      for (size_t i = 0; i + 4 <= n; i += 4) {
        for (size_t j = 0; j < 4; ++j) sums[j] ^= from[i + j];
      }
      static thread_local volatile uint64_t sink;
      sink = (sums[0] ^ sums[1] ^ sums[2] ^ sums[3])[0];
      return;
    }
    case kWrite:
      for (size_t i = 0; i < n; ++i) {
        to[i] = value;
        __asm__ volatile("" ::: "memory");  // or the compiler calls memset
      }
      return;
    case kWritePastCaches:
      for (size_t i = 0; i < n; ++i) {
#ifdef __AVX__
        __asm__ volatile("vmovntdq %1, %0" : "=m"(to[i]) : "x"(value));
#else
        to[i] = value;
        __asm__ volatile("" ::: "memory");
#endif
      }
      return;
    case kCopy:
      for (size_t i = 0; i < n; ++i) {
        to[i] = from[i];
        __asm__ volatile("" ::: "memory");
      }
      return;
  }
}

extern "C" double run(int kind, int threads, const char* from, char* to, size_t bytes) {
  const size_t n = bytes / sizeof(Line) / threads;
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) {
    others.emplace_back(run_part, kind, (const Line*)from + t * n, (Line*)to + t * n, n);
  }
  run_part(kind, (const Line*)from, (Line*)to, n);
  for (auto& other : others) other.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}
