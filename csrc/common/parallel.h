// The one place that forks. Threads come from the OpenMP runtime that torch has already mapped, so
// that there is one pool and no second runtime; without one (C++ tests), from a pool of our own.
#pragma once

namespace fastllm {

// Calls body(thread, size, context) on up to `threads` threads; size is what the runtime really
// gave.
void run_parallel(int threads, void (*body)(int thread, int size, void* context), void* context);

// The number of threads the next region gets: torch.get_num_threads() when torch's runtime is used.
int num_threads();
void set_own_threads(int threads);  // size of our own pool; no effect on OpenMP's
const char* thread_runtime();       // "libgomp (shared with torch)" or "own pool"

}  // namespace fastllm
