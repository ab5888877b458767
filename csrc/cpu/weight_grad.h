// The gradient of a weight from an expert's rows: y [m, n] = the sum over rows r of a[r]' b[r]. Sums
// are fp32, over ascending rows; long runs are added up from blocks of kSummedRows, whatever the
// tasks.
#pragma once
#include "cpu/experts.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// A strip of b over so many rows is 32 KB of panels: it stays in the L1 cache.
template <class D>
constexpr int64_t kSummedRows = D::columns == 2 ? 512 : 256;

// Rows of y that a task makes, at most: those of a over a block take 528 KB of the L2 cache.
constexpr int64_t kMostOutputs = 528, kLeastOutputs = 96;

// Into how many tasks an expert's gradient of m rows is cut: its share of the tasks that the team
// wants, if it has `rows` of all `total`.
FASTLLM_INLINE int64_t weight_grad_tasks(int64_t m, int64_t rows, int64_t total, const Team& team) {
  const int64_t share = divide_up(kTasksPerThread * team.size * rows, larger(total, 1));
  const int64_t least = divide_up(m, kMostOutputs);
  return clamped(share, least, larger(least, divide_up(m, kLeastOutputs)));
}
FASTLLM_INLINE Span weight_grad_rows(int64_t m, int64_t tasks, int64_t index) {
  const int64_t groups = divide_up(m, kDenseRows);
  return {groups * index / tasks * kDenseRows,
          smaller(groups * (index + 1) / tasks * kDenseRows, m)};
}

template <class Y>
FASTLLM_INLINE void put_sums(Y* y, const float* before, const float* sums, int64_t n) {
  int64_t c = 0;
  for (; c + VL <= n; c += VL)
    store(y + c, before ? vload(before + c) + vload(sums + c) : vload(sums + c));
  for (; c < n; ++c) store1(y + c, before ? before[c] + sums[c] : sums[c]);
}

// Rows `out` of y [m, n], of type Y. left(r) and right(r) point to row r of a [rows, m] and b.
template <class D, class Y, class Left, class Right>
static void weight_grad(Y* y, int64_t m, int64_t n, Span out, int64_t rows, const Left& left,
                        const Right& right) {
  constexpr int64_t R = kDenseRows, block = kSummedRows<D>;
  if (out.size() <= 0 || n <= 0) return;
  if (rows <= 0) {
    __builtin_memset(y + out.begin * n, 0, static_cast<size_t>(out.size() * n) * sizeof(Y));
    return;
  }
  const Element<D>*a[block], *b[block];
  const int64_t groups = divide_up(out.size(), R), size = group_words<D>(smaller(rows, block));
  auto* packed = static_cast<uint32_t*>(
      thread_scratch(Scratch::rows, static_cast<size_t>(groups * size + kGroupSlack) * 4));
  auto* strip = static_cast<uint32_t*>(thread_scratch(
      Scratch::panels,
      static_cast<size_t>(words_of<D>(smaller(rows, block)) * kPanelRows * kDenseStrip) * 4));
  float* before = nullptr;  // the sums of earlier blocks: in y itself if it is fp32
  if constexpr (sizeof(Y) == sizeof(float)) {
    before = y + out.begin * n;
  } else if (rows > block) {
    before = static_cast<float*>(
        thread_scratch(Scratch::sums, static_cast<size_t>(out.size() * n) * sizeof(float)));
  }
  for (int64_t r0 = 0; r0 < rows; r0 += block) {
    const int64_t k = smaller(block, rows - r0), words = words_of<D>(k);
    for (int64_t r = 0; r < k; ++r) a[r] = left(r0 + r), b[r] = right(r0 + r);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t row = out.begin + g * R;
      pack_column_group<D>([&](int64_t c) { return a[c] + row; }, smaller(R, m - row),
                           row + VL <= m, k, packed + g * group_words<D>(k));
    }
    const bool last = r0 + k == rows;
    rows_times_strips<D>(
        packed, out.size(), words, n, 0, divide_up(n, kPanelRows), strip,
        [&](int64_t panel, int count) {
          const int64_t column = panel * kPanelRows;
          pack_row_strip<D>([&](int64_t c) { return b[c] + column; }, n - column, count, k, strip);
        },
        [&](int64_t row, int64_t live, int64_t column, int64_t columns, const float* sums,
            int64_t stride) {
          for (int64_t i = 0; i < live; ++i) {
            const int64_t at = (row + i) * n + column;
            const float* earlier = r0 ? before + at : nullptr;
            if (last)
              put_sums(y + out.begin * n + at, earlier, sums + i * stride, columns);
            else
              put_sums(before + at, earlier, sums + i * stride, columns);
          }
        });
  }
}

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
