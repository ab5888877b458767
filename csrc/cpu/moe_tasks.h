// One list of tasks over the experts of a layer for a product of n outputs: a task is a run of
// panels of one expert's weight for a block of its rows. Experts with many rows are cut into many
// tasks, those without rows have none.
#pragma once
#include "cpu/experts.h"
#include "cpu/matmul_tasks.h"
#include "ops_moe.h"

namespace fastllm::FASTLLM_ISA {
namespace {

struct MoeTask {
  int64_t expert = -1;
  Span rows{};                 // of the sorted order
  int64_t width = 1;           // rows of a group
  int64_t panel = 0, end = 0;  // in strips of `wide`, of which the last may hold fewer
  int wide = 1;
  bool few = true;  // all of the expert's rows are one small tile
};

// What reading and preparing a weight costs, in rows that meet it.
constexpr int64_t kMoeWeightRows = 12;
constexpr int64_t kMoeTasksPerThread = 16;

// A thread's tasks. W gives the sizes of tiles and of prepared rows.
//
// Many rows: tasks are handed out one by one, in ascending order. Few rows an expert (`streams`):
// the product is bound by reading the weights, and every thread owns one range of them from the
// start, so that it knows what it reads next and asks for it in time.
template <class W>
class MoeTasks {
 public:
  MoeTasks(const W& w, const MoeArgs& args, int64_t outputs, int counter, const Team& team)
      : a(args), w_(w), team_(team), counter_(counter), panels_(divide_up(outputs, kPanelRows)) {
    int64_t rows = 0, active = 0;
    for (int64_t e = 0; e < a.experts; ++e) {
      const int64_t size = expert_span(a.offsets, e, a.count()).size();
      rows += size;
      active += size > 0;
    }
    const int64_t cost = rows + kMoeWeightRows * active;
    unit_ = larger(divide_up(cost, kMoeTasksPerThread * team.size), 1);
    streams_ = rows <= active * w.few_rows();
    begin_ = cost * panels_ * team.thread / team.size;
    end_ = cost * panels_ * (team.thread + 1) / team.size;
  }

  // Whether the list is bound by reading the weights.
  bool streams() const { return streams_; }

  // The next task of this thread; false past the last.
  bool next(MoeTask* task) {
    return streams_ ? next_of_range(task) : find(next_task(team_, counter_), task);
  }

 private:
  // The panels of the next expert that lie between begin_ and end_: what they cost, counted from
  // the list's beginning.
  bool next_of_range(MoeTask* task) {
    while (panels_ && ++expert_ < a.experts && first_ < end_) {
      span_ = expert_span(a.offsets, expert_, a.count());
      const int64_t rows = span_.size(), cost = rows ? rows + kMoeWeightRows : 0;
      const int64_t before = first_;
      first_ += cost * panels_;
      if (rows == 0 || first_ <= begin_) continue;
      size(rows);
      const auto panel_at = [&](int64_t at) {
        return at >= first_ ? panels_ : larger(at - before, 0) / cost / wide_ * wide_;
      };
      const int64_t panel = panel_at(begin_), end = panel_at(end_);
      if (panel >= end) continue;
      *task = {expert_, span_, width_, panel, end, wide_, few_};
      return true;
    }
    return false;
  }

  // Task `index` of the list of all threads.
  bool find(int64_t index, MoeTask* task) {
    while (expert_ < a.experts) {
      if (index < first_ + count_) {
        const int64_t at = index - first_, block = at / runs_, run = at % runs_;
        const int64_t begin = groups_ * block / blocks_ * width_;
        const int64_t end = groups_ * (block + 1) / blocks_ * width_;
        *task = {expert_,
                 {span_.begin + begin, smaller(span_.begin + end, span_.end)},
                 width_,
                 strips_ * run / runs_ * wide_,
                 smaller(strips_ * (run + 1) / runs_ * wide_, panels_),
                 wide_,
                 few_};
        return true;
      }
      first_ += count_;
      count_ = 0;
      if (++expert_ < a.experts) cut();
    }
    return false;
  }

  void size(int64_t rows) {
    few_ = rows <= w_.few_rows();
    wide_ = w_.wide(rows);
    width_ = w_.width(rows);
  }
  void cut() {
    span_ = expert_span(a.offsets, expert_, a.count());
    const int64_t rows = span_.size();
    if (rows == 0 || panels_ == 0) return;
    size(rows);
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
  const Team& team_;
  const int counter_;
  const int64_t panels_;
  bool streams_;
  int64_t unit_ = 1, begin_ = 0, end_ = 0;
  int64_t expert_ = -1, first_ = 0, count_ = 0;
  Span span_{};
  int64_t groups_ = 0, blocks_ = 1, runs_ = 1, strips_ = 0, width_ = 1;
  int wide_ = 1;
  bool few_ = true;
};

// Calls run(task) for the tasks that this thread gets, from `task` on (`more`: there is one). Where
// weights are streamed, the first lines of the next task are fetched while one runs: begin(task).
template <class Tasks, class Begin, class Run>
FASTLLM_INLINE void run_moe_tasks(Tasks& list, MoeTask task, bool more, const Begin& begin,
                                  const Run& run) {
  while (more) {
    MoeTask next;
    bool another = false;
    if (list.streams() && (another = list.next(&next))) begin(next);
    run(task);
    if (!list.streams()) another = list.next(&next);
    task = next;
    more = another;
  }
}

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
