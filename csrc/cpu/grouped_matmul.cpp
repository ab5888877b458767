// y[r] = x[r] @ weight[e].T for the rows r of every expert e, or x[r] @ weight[e]. A task is a block
// of an expert's rows, or with few rows a share of its columns; it packs its rows, then strip by
// strip of the weight. The sums are those of linear.
#include "cpu/experts.h"
#include "ops_moe.h"

namespace fastllm::FASTLLM_ISA {
namespace {

template <class D>
struct GroupedMatmul {
  const GroupedMatmulArgs& a;
  const Team& team;
  const Element<D>* x;
  int64_t words, panels, runs;
  RowBlocks blocks;

  GroupedMatmul(const GroupedMatmulArgs& args, const Team& t)
      : a(args),
        team(t),
        x(static_cast<const Element<D>*>(args.x)),
        words(words_of<D>(args.k)),
        panels(divide_up(args.out.n, kPanelRows)),
        blocks(args.m, args.k * static_cast<int64_t>(sizeof(Element<D>)), t) {
    int64_t tasks = 0;
    for (int64_t e = 0; e < a.experts; ++e) tasks += blocks.count(rows_of(e));
    runs = clamped(divide_up(kTasksPerThread * team.size, larger(tasks, 1)), 1,
                   larger(divide_up(panels, kDenseStrip), 1));
  }
  Span rows_of(int64_t expert) const { return expert_span(a.offsets, expert, a.m); }

  void pack_strip(const char* weight, int64_t panel, int count, uint32_t* to) const {
    const auto* w = reinterpret_cast<const Element<D>*>(weight);
    const int64_t column = panel * kPanelRows;
    if (a.transposed)
      return pack_row_strip<D>([&](int64_t c) { return w + c * a.weight_stride + column; },
                               a.out.n - column, count, a.k, to);
    constexpr int64_t bytes = sizeof(Element<D>);
    for (int p = 0; p < count; ++p) {
      const int64_t row = (panel + p) * kPanelRows;
      pack_panel(weight + row * a.weight_stride * bytes, a.weight_stride * bytes,
                 smaller(a.out.n - row, kPanelRows), a.k * bytes, words,
                 to + p * words * kPanelRows);
    }
  }

  void run_task(int64_t expert, Span rows, int64_t run) const {
    const int64_t strips = divide_up(panels, kDenseStrip), size = group_words<D>(a.k);
    const int64_t groups = divide_up(rows.size(), kDenseRows);
    auto* packed = static_cast<uint32_t*>(thread_scratch(
        Scratch::rows, static_cast<size_t>(groups * size + kGroupSlack) * sizeof(uint32_t)));
    auto* strip = static_cast<uint32_t*>(
        thread_scratch(Scratch::panels, static_cast<size_t>(words * kPanelRows * kDenseStrip) * 4));
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = rows.begin + g * kDenseRows;
      pack_row_group<D>(
          [&](int i) { return first + i < rows.end ? x + (first + i) * a.x_stride : nullptr; }, a.k,
          packed + g * size);
    }
    MatmulOutput out = a.out;
    if (out.bias) out.bias = static_cast<const char*>(out.bias) + expert * a.bias_bytes;
    const char* weight = a.weight + expert * a.expert_bytes;
    rows_times_strips<D>(
        packed, rows.size(), words, out.n, strips * run / runs * kDenseStrip,
        smaller(strips * (run + 1) / runs * kDenseStrip, panels), strip,
        [&](int64_t panel, int count) { pack_strip(weight, panel, count, strip); },
        [&](int64_t row, int64_t live, int64_t column, int64_t, float* sums, int64_t stride) {
          store_tile(out, sums, stride, rows.begin + row, live, column);
        });
  }

  // Rows of no expert: they are the team's, not tasks.
  void clear_rest() const {
    const int64_t bytes = a.out.y_type == DType::bf16 ? 2 : 4;
    int64_t covered = 0, begin, end;
    for (int64_t e = 0; e < a.experts; ++e) {
      const Span rows = rows_of(e);
      if (e == 0 && team.thread == 0) clear(0, rows.begin, bytes);
      covered = rows.end;
    }
    my_share(team, a.m - covered, 1, &begin, &end);
    clear(covered + begin, covered + end, bytes);
  }
  void clear(int64_t begin, int64_t end, int64_t bytes) const {
    for (int64_t r = begin; r < end; ++r)
      __builtin_memset(static_cast<char*>(a.out.y) + r * a.out.y_stride * bytes, 0,
                       static_cast<size_t>(a.out.n * bytes));
  }

  void run() const {
    clear_rest();
    ExpertTasks list{a.experts};
    const auto count = [&](int64_t e) { return blocks.count(rows_of(e)) * runs; };
    for (int64_t task; list.find(task = next_task(team), count);) {
      const Span rows = rows_of(list.expert);
      const int64_t index = task - list.first;
      run_task(list.expert, blocks.block(rows, index / runs), index % runs);
    }
  }
};

}  // namespace

void grouped_matmul(const GroupedMatmulArgs& a, const Team& team) {
  if (a.type == DType::bf16)
    GroupedMatmul<Bf16Dense>(a, team).run();
  else
    GroupedMatmul<Float32>(a, team).run();
}

}  // namespace fastllm::FASTLLM_ISA
