// The pool, barriers, sharing of work, and the order of recorded calls.
#include <atomic>
#include <thread>

#include "harness.h"

namespace fastllm::test {
namespace {

struct Counted {
  std::atomic<int> entered{0};
  std::atomic<uint64_t> threads_seen{0};
  int size = 0;
};

void count_entry(int thread, int size, void* context) {
  auto* counted = static_cast<Counted*>(context);
  CHECK(thread >= 0 && thread < size);
  counted->entered.fetch_add(1);
  counted->threads_seen.fetch_or(uint64_t{1} << thread);
  if (thread == 0) counted->size = size;
}

void regions_enter_every_thread_once() {
  for (int round = 0; round < 300; ++round) {
    const int threads = 1 + (round * 7) % 6;  // sizes change up and down between regions
    Counted counted;
    run_parallel(threads, count_entry, &counted);
    CHECK(counted.entered == threads);
    CHECK(counted.size == threads);
    CHECK(counted.threads_seen == (uint64_t{1} << threads) - 1);
  }
}

void regions_of_two_callers_do_not_mix() {
  const auto many = [] {
    for (int round = 0; round < 100; ++round) {
      Counted counted;
      run_parallel(3, count_entry, &counted);
      CHECK(counted.entered == 3);
    }
  };
  std::thread other(many);
  many();
  other.join();
}

struct Phases {
  Barrier barrier;
  int values[8] = {};  // plain ints: the barrier alone must make them visible
};

void write_then_read(int thread, int size, void* context) {
  auto* phases = static_cast<Phases*>(context);
  for (int round = 1; round <= 200; ++round) {
    phases->values[thread] = round;
    barrier_wait(&phases->barrier, size);
    for (int other = 0; other < size; ++other) CHECK(phases->values[other] == round);
    barrier_wait(&phases->barrier, size);
  }
}

void barriers_separate_phases() {
  for (int threads : {2, 3, 5}) {
    Phases phases;
    run_parallel(threads, write_then_read, &phases);
  }
}

void shares_partition() {
  for (int64_t n : {0, 1, 2, 7, 64, 1000})
    for (int64_t unit : {1, 3, 16, 512})
      for (int size : {1, 2, 3, 5, 8}) {
        int64_t next = 0;
        for (int thread = 0; thread < size; ++thread) {
          int64_t begin, end;
          my_share({thread, size, nullptr, nullptr}, n, unit, &begin, &end);
          CHECK(begin == next && begin <= end && end <= n);
          CHECK(begin == n || begin % unit == 0);
          next = end;
        }
        CHECK(next == n);
      }
}

struct Tasks {
  Barrier barrier;
  TaskCounter counters[kCountersPerCall];
  std::atomic<int> taken[500] = {};
};

void take_tasks(int thread, int size, void* context) {
  auto* tasks = static_cast<Tasks*>(context);
  const Team team{thread, size, &tasks->barrier, tasks->counters};
  int64_t last = -1;
  for (int64_t task; (task = next_task(team, 1)) < 500; last = task) {
    CHECK(task > last);
    tasks->taken[task].fetch_add(1);
  }
}

void tasks_are_handed_out_once() {
  for (int threads : {1, 2, 5}) {
    Tasks tasks;
    run_parallel(threads, take_tasks, &tasks);
    for (auto& taken : tasks.taken) CHECK(taken == 1);
    CHECK(tasks.counters[0].next == 0);
  }
}

// Each call reads what all threads of the call before it wrote.
struct Chain {
  const int64_t* in;
  int64_t* out;
  int64_t n;
};
void add_neighbours(const Chain& a, const Team& team) {
  for (int64_t i; (i = next_task(team)) < a.n;) a.out[i] = a.in[i] + a.in[a.n - 1 - i] + 1;
}

void recorded_calls_run_in_order_with_barriers() {
  constexpr int64_t n = 97;
  constexpr int steps = 40;
  std::vector<std::vector<int64_t>> rows(steps + 1, std::vector<int64_t>(n, 0));
  std::vector<Call> calls;
  for (int s = 0; s < steps; ++s)
    calls.emplace_back("add_neighbours", &add_neighbours,
                       Chain{rows[s].data(), rows[s + 1].data(), n});
  std::vector<TaskCounter> counters(calls.size() * kCountersPerCall);
  for (int threads : {1, 2, 3, 5}) {
    set_own_threads(threads);
    for (int round = 0; round < 20; ++round) {
      for (int s = 1; s <= steps; ++s) rows[s].assign(n, -1);
      run_calls(calls.data(), calls.size(), counters.data());
      int64_t want = 0;
      for (int s = 1; s <= steps; ++s) {
        want = 2 * want + 1;
        for (int64_t value : rows[s]) CHECK(value == want);
      }
    }
  }
  run_calls(nullptr, 0, nullptr);
}

}  // namespace

void test_parallel() {
  CHECK(std::string(thread_runtime()) == "own pool");
  regions_enter_every_thread_once();
  regions_of_two_callers_do_not_mix();
  barriers_separate_phases();
  shares_partition();
  tasks_are_handed_out_once();
  recorded_calls_run_in_order_with_barriers();
}

}  // namespace fastllm::test
