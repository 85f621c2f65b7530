// One small pool of threads for the process. It exists because a second OpenMP runtime beside torch's makes
// both spin against each other.
#pragma once

#include <cstdint>

namespace nf4 {

// Calls task(context, i) once for each i in [0, count), from at most `threads` threads, the caller among
// them, and returns when all are done. Which thread takes which i is not fixed, so tasks must not depend on
// it. The floating-point environment of tasks is the default one (no flushing of subnormals), whatever the
// caller's. When the pool is busy with another caller's work, everything runs on the calling thread. Tasks
// must not throw.
void parallel_for(int64_t count, int threads, void (*task)(void* context, int64_t i), void* context);

template <typename Task>
void parallel_for(int64_t count, int threads, Task&& task) {
  parallel_for(count, threads, [](void* context, int64_t i) { (*static_cast<Task*>(context))(i); }, &task);
}

}  // namespace nf4
