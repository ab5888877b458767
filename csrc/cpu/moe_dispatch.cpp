// A stable counting sort of slots by expert. Every chunk of slots is counted by one thread; then
// every thread finds where its chunks begin in each expert's run, and scatters them in their order.
#include "common/scratch.h"
#include "cpu/integers.h"
#include "ops.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// The id counted from the first expert here, or -1: not served here.
FASTLLM_INLINE int64_t local_expert(const MoeDispatchArgs& a, int64_t slot) {
  const int64_t expert = a.ids[slot] - a.first;
  return expert >= 0 && expert < a.experts ? expert : -1;
}

// Where the slots of chunk `chunk` go in each expert's run, and the offsets.
void place_runs(const MoeDispatchArgs& a, int64_t chunks, int64_t chunk, int32_t* next,
                int32_t* offsets) {
  __builtin_memset(next, 0, static_cast<size_t>(a.experts) * 4);
  __builtin_memset(offsets, 0, static_cast<size_t>(a.experts + 1) * 4);
  for (int64_t c = 0; c < chunks; ++c) {
    const int32_t* counts = a.counts + c * a.experts;
    for (int64_t e = 0; e < a.experts; ++e) offsets[e + 1] += counts[e];
    if (c < chunk)
      for (int64_t e = 0; e < a.experts; ++e) next[e] += counts[e];
  }
  for (int64_t e = 0; e < a.experts; ++e) {
    next[e] += offsets[e];
    offsets[e + 1] += offsets[e];
  }
}

}  // namespace

void moe_dispatch(const MoeDispatchArgs& a, const Team& team) {
  const int64_t chunks = divide_up(a.count, kDispatchChunk);
  int64_t begin, end;
  my_share(team, chunks, 1, &begin, &end);
  for (int64_t c = begin; c < end; ++c) {
    int32_t* counts = a.counts + c * a.experts;
    __builtin_memset(counts, 0, static_cast<size_t>(a.experts) * 4);
    const int64_t last = smaller((c + 1) * kDispatchChunk, a.count);
    for (int64_t s = c * kDispatchChunk; s < last; ++s)
      if (const int64_t e = local_expert(a, s); e >= 0) ++counts[e];
  }
  if (chunks > 1) team_sync(team);
  // One chunk is one thread's work: nobody has to wait for anybody. Thread 0 has no share of it
  // only where there is nothing to sort.
  if (begin == end && !(chunks == 0 && team.thread == 0)) return;
  auto* next = static_cast<int32_t*>(
      thread_scratch(Scratch::rows, static_cast<size_t>(2 * a.experts + 1) * 4));
  int32_t* offsets = next + a.experts;
  place_runs(a, chunks, begin, next, offsets);
  for (int64_t s = begin * kDispatchChunk; s < smaller(end * kDispatchChunk, a.count); ++s)
    if (const int64_t e = local_expert(a, s); e >= 0) a.slots[next[e]++] = static_cast<int32_t>(s);
  if (end < chunks) return;
  __builtin_memcpy(a.offsets, offsets, static_cast<size_t>(a.experts + 1) * 4);
  for (int64_t row = offsets[a.experts]; row < a.count; ++row) a.slots[row] = -1;
}

}  // namespace fastllm::FASTLLM_ISA
