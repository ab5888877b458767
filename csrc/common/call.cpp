#include "common/call.h"

#include "common/parallel.h"

namespace fastllm {
namespace {

struct Batch {
  const Call* calls;
  size_t count;
  TaskCounter* counters;  // [count][kCountersPerCall]
  Barrier barrier;
};

void enter(int thread, int size, void* context) {
  auto* batch = static_cast<Batch*>(context);
  for (size_t i = 0; i < batch->count; ++i) {
    const Team team{thread, size, &batch->barrier, batch->counters + i * kCountersPerCall};
    if (i) team_sync(team);
    batch->calls[i].run(team);
  }
}

}  // namespace

void run_calls(const Call* calls, size_t count, TaskCounter* counters) {
  for (size_t i = 0; i < count * kCountersPerCall; ++i) counters[i].next = 0;
  Batch batch{calls, count, counters, {}};
  run_parallel(num_threads(), enter, &batch);
}

void run_call(const Call& call) {
  TaskCounter counters[kCountersPerCall];
  run_calls(&call, 1, counters);
}

void run_alone(const Call& call) {
  TaskCounter counters[kCountersPerCall];
  for (TaskCounter& counter : counters) counter.next = 0;
  Batch batch{&call, 1, counters, {}};
  enter(0, 1, &batch);
}

}  // namespace fastllm
