// Rows sorted by expert, and one list of tasks over all experts.
#pragma once
#include "cpu/integers.h"
#include "cpu/row_groups.h"

namespace fastllm::FASTLLM_ISA {
namespace {

struct Span {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// The rows of an expert, whatever the offsets hold.
FASTLLM_INLINE Span expert_span(const int32_t* offsets, int64_t expert, int64_t rows) {
  const int64_t begin = clamped(offsets[expert], 0, rows);
  return {begin, clamped(offsets[expert + 1], begin, rows)};
}

// A list of tasks in which expert e has count(e) of them. A thread asks for ascending tasks, as
// next_task hands them out, and walks the experts once.
struct ExpertTasks {
  int64_t experts, expert = 0, first = 0;

  template <class Count>
  bool find(int64_t task, const Count& count) {
    for (; expert < experts; ++expert) {
      const int64_t here = count(expert);
      if (task < first + here) return true;
      first += here;
    }
    return false;
  }
};

// Rows of an expert in blocks, small enough that there are tasks for every thread. Every block packs
// the weight again, which costs as much as the products of 10 rows; 1 MB of packed rows, of which a
// tile reads 4 bytes a cycle, may come from the L3 cache.
struct RowBlocks {
  int64_t most;

  RowBlocks(int64_t rows, int64_t row_bytes, const Team& team) {
    const int64_t fit = (1 << 20) / larger(row_bytes, 1);
    most = divide_up(clamped(rows / (8 * team.size), 96, larger(fit, 96)), kDenseRows) * kDenseRows;
  }
  int64_t count(Span rows) const { return divide_up(rows.size(), most); }
  // Blocks of about equal sizes, in whole groups.
  Span block(Span rows, int64_t index) const {
    const int64_t groups = divide_up(rows.size(), kDenseRows), blocks = count(rows);
    const int64_t begin = groups * index / blocks, end = groups * (index + 1) / blocks;
    return {rows.begin + begin * kDenseRows, smaller(rows.begin + end * kDenseRows, rows.end)};
  }
};

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
