// One list of tasks over the experts of a layer for a product of n outputs: a task is a run of
// strips of one expert's weight for a block of its rows. Experts with many rows are cut into many
// tasks, those without rows have none.
#pragma once
#include "cpu/experts.h"
#include "cpu/matmul_tasks.h"

namespace fastllm::FASTLLM_ISA {
namespace {

struct MoeTask {
  int64_t expert = -1;
  Span rows{};                 // of the sorted order
  int64_t width = 1;           // rows of a group
  int64_t strip = 0, end = 0;  // strips of `wide` panels
  int wide = 1;
};

// What reading and preparing a weight costs, in rows that meet it.
constexpr int64_t kMoeWeightRows = 12;
constexpr int64_t kMoeTasksPerThread = 16;

// Tasks are found in ascending order. W gives the sizes of tiles and of prepared rows.
template <class W>
class MoeTasks {
 public:
  MoeTasks(const W& w, const MoeArgs& args, int64_t outputs, const Team& team)
      : a(args), w_(w), panels_(divide_up(outputs, kPanelRows)) {
    int64_t rows = 0, active = 0;
    for (int64_t e = 0; e < a.experts; ++e) {
      const int64_t size = expert_span(a.offsets, e, a.count()).size();
      rows += size;
      active += size > 0;
    }
    const int64_t cost = rows + kMoeWeightRows * active;
    unit_ = larger(divide_up(cost, kMoeTasksPerThread * team.size), 1);
    streams = rows <= active * W::few;
  }

  // Task `index` of the list; false past its end.
  bool find(int64_t index, MoeTask* task) {
    while (expert_ < a.experts) {
      if (index < first_ + count_) {
        const int64_t at = index - first_, block = at / runs_, run = at % runs_;
        const int64_t begin = groups_ * block / blocks_ * width_;
        const int64_t end = groups_ * (block + 1) / blocks_ * width_;
        task->expert = expert_;
        task->rows = {span_.begin + begin, smaller(span_.begin + end, span_.end)};
        task->width = width_;
        task->strip = strips_ * run / runs_;
        task->end = strips_ * (run + 1) / runs_;
        task->wide = wide_;
        return true;
      }
      first_ += count_;
      count_ = 0;
      if (++expert_ < a.experts) cut();
    }
    return false;
  }

  bool streams;  // few rows an expert: the list is bound by reading the weights

 private:
  void cut() {
    span_ = expert_span(a.offsets, expert_, a.count());
    const int64_t rows = span_.size();
    if (rows == 0 || panels_ == 0) return;
    wide_ = rows <= W::few ? 1 : W::strip;
    width_ = W::width(rows);
    groups_ = divide_up(rows, width_);
    strips_ = divide_up(panels_, wide_);
    const int64_t parts = divide_up(rows + kMoeWeightRows, unit_);
    blocks_ = divide_up(groups_, larger(kRowBlockBytes / larger(w_.row_bytes() * width_, 1), 1));
    runs_ = clamped(divide_up(parts, blocks_), 1, strips_);
    if (runs_ * blocks_ < parts) blocks_ = smaller(divide_up(parts, runs_), groups_);
    count_ = blocks_ * runs_;
  }

  const MoeArgs& a;
  const W& w_;
  const int64_t panels_;
  int64_t unit_ = 1;
  int64_t expert_ = -1, first_ = 0, count_ = 0;
  Span span_{};
  int64_t groups_ = 0, blocks_ = 1, runs_ = 1, strips_ = 0, width_ = 1;
  int wide_ = 1;
};

// Calls run(task) for the tasks that this thread gets. Where weights are streamed, the next task is
// asked for before a task runs, and its first lines are fetched meanwhile: begin(task).
template <class Tasks, class Begin, class Run>
FASTLLM_INLINE void run_moe_tasks(Tasks& list, MoeTask task, bool more, int counter,
                                  const Team& team, const Begin& begin, const Run& run) {
  while (more) {
    MoeTask next;
    bool another = false;
    if (list.streams && (another = list.find(next_task(team, counter), &next))) begin(next);
    run(task);
    if (!list.streams) another = list.find(next_task(team, counter), &next);
    task = next;
    more = another;
  }
}

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
