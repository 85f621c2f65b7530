// How it works. A job is a counter that participants draw task numbers from. The caller opens the job, wakes
// the workers and draws at once; a worker that arrives takes a ticket, draws until the counter is spent and
// leaves. The caller then closes the job and waits only for workers that did take a ticket: one that is still
// waking up costs nothing. Idle workers look for a new job for kSpin, then sleep.
#include "thread_pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#include "float_environment.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace nf4 {
namespace {

constexpr std::chrono::microseconds kSpin{20};  // longer would take cycles from torch's threads
constexpr int kMaxWorkers = 255;

void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#endif
}

// Waits up to kSpin for the condition; returns whether it holds.
template <typename Condition>
bool spin_until(Condition&& condition) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (condition()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return condition();
}

class ThreadPool {
 public:
  void run(int64_t count, int helpers, void (*task)(void*, int64_t), void* context) {
    std::unique_lock<std::mutex> owner(owner_, std::defer_lock);
    if (helpers <= 0 || !owner.try_lock()) {
      const DefaultFloatEnvironment environment;
      for (int64_t i = 0; i < count; ++i) task(context, i);
      return;
    }
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      while (num_workers_ < helpers && num_workers_ < kMaxWorkers && add_worker()) ++num_workers_;
      task_ = task;
      context_ = context;
      count_ = count;
      next_.store(0, std::memory_order_relaxed);
      tickets_ = helpers;
      jobs_.fetch_add(1, std::memory_order_release);
    }
    if (helpers == 1) {
      work_.notify_one();
    } else {
      work_.notify_all();
    }
    draw();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      tickets_ = 0;
    }
    const auto all_left = [this] { return active_.load(std::memory_order_acquire) == 0; };
    if (!spin_until(all_left)) {
      std::unique_lock<std::mutex> lock(mutex_);
      left_.wait(lock, all_left);
    }
  }

 private:
  bool add_worker() {
    try {
      std::thread([this] { serve(); }).detach();
      return true;
    } catch (const std::system_error&) {
      return false;  // no more threads to be had: do with those there are
    }
  }

  void draw() {
    const DefaultFloatEnvironment environment;
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) task_(context_, i);
  }

  [[noreturn]] void serve() {
    uint64_t seen = 0;
    for (;;) {
      const auto new_job = [this, &seen] { return jobs_.load(std::memory_order_acquire) != seen; };
      const bool found = spin_until(new_job);
      std::unique_lock<std::mutex> lock(mutex_);
      if (!found) work_.wait(lock, new_job);
      seen = jobs_.load(std::memory_order_relaxed);
      if (tickets_ == 0) continue;
      --tickets_;
      active_.fetch_add(1, std::memory_order_relaxed);
      lock.unlock();
      draw();
      lock.lock();
      if (active_.fetch_sub(1, std::memory_order_release) == 1) left_.notify_one();
    }
  }

  std::mutex owner_;  // held by the caller whose job runs
  std::mutex mutex_;  // guards tickets_ and num_workers_, and orders the job's fields before its number
  std::condition_variable work_, left_;
  std::atomic<uint64_t> jobs_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<int> active_{0};
  int tickets_ = 0, num_workers_ = 0;
  void (*task_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  int64_t count_ = 0;
};

// Never destroyed: sleeping workers use it until the process ends.
alignas(ThreadPool) unsigned char storage[sizeof(ThreadPool)];

// A forked child has none of the workers, and locks may be held by threads that it lacks: start afresh.
void construct() { new (storage) ThreadPool; }

ThreadPool& pool() {
  static ThreadPool& instance = []() -> ThreadPool& {
    construct();
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, construct);
#endif
    return *reinterpret_cast<ThreadPool*>(storage);
  }();
  return instance;
}

}  // namespace

void parallel_for(int64_t count, int threads, void (*task)(void*, int64_t), void* context) {
  const int64_t most = threads < count ? threads : count;
  pool().run(count, int(most < kMaxWorkers ? most : kMaxWorkers) - 1, task, context);
}

}  // namespace nf4
