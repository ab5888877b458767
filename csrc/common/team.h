// What a kernel knows of its threads. Kernels are SPMD: run(args, team) is entered by every thread
// of the team at once. Plain __atomic builtins and no std types: this header is compiled at every
// ISA level.
#pragma once
#include <cstdint>

namespace fastllm {

struct alignas(64) Barrier {
  int arrived = 0;
  alignas(64) int generation = 0;
};

// Work counters of one kernel call, zero when the call starts; one line of cache each.
struct alignas(64) TaskCounter {
  int64_t next = 0;
};
constexpr int kCountersPerCall = 2;

struct Team {
  int thread;
  int size;
  Barrier* barrier;
  TaskCounter* counters;  // [kCountersPerCall]
};

void barrier_wait(Barrier* barrier, int size);

// All threads of the team reach this point before any goes on.
static inline void team_sync(const Team& team) {
  if (team.size > 1) barrier_wait(team.barrier, team.size);
}

// The next task of a dynamically shared list; tasks are handed out in ascending order.
static inline int64_t next_task(const Team& team, int counter = 0) {
  return __atomic_fetch_add(&team.counters[counter].next, 1, __ATOMIC_RELAXED);
}

// This thread's contiguous share [begin, end) of n items, in units of `unit` items.
static inline void my_share(const Team& team, int64_t n, int64_t unit, int64_t* begin,
                            int64_t* end) {
  const int64_t units = (n + unit - 1) / unit;
  const int64_t low = units * team.thread / team.size, high = units * (team.thread + 1) / team.size;
  *begin = low * unit < n ? low * unit : n;
  *end = high * unit < n ? high * unit : n;
}

template <class Args>
using Kernel = void(const Args&, const Team&);

}  // namespace fastllm
