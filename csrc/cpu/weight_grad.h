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

// Gradients that no cache holds until they are read are written past the caches, in whole lines: an
// ordinary store reads the line first. With 64 rows an expert the lines come faster than the
// products hide (Zen 4, two threads, tiles of 12 lines: 9 GB/s, past the caches 33).
constexpr int64_t kStreamedBytes = 32 << 20;

// Whether a gradient of `count` elements in rows of n is written so.
template <class Y>
FASTLLM_INLINE bool streams_gradient(const Y* y, int64_t n, int64_t count) {
  const int64_t size = sizeof(Y);
  return VL == 16 && kDenseStrip == 2 && count * size >= kStreamedBytes && n * size % 64 == 0 &&
         reinterpret_cast<uintptr_t>(y) % 64 == 0;
}

#if defined(__AVX512F__)
// Both vectors as bf16, one behind the other.
FASTLLM_INLINE vi vpack_bf16(vf low, vf high) {
  alignas(64) static constexpr uint16_t odd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                   23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                   45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return (vi)_mm512_permutex2var_epi16((__m512i)vround_bf16_high(low), _mm512_load_si512(odd),
                                       (__m512i)vround_bf16_high(high));
}
FASTLLM_INLINE void stream_sums(float* y, const float*, const float* sums, int64_t n) {
  for (int64_t c = 0; c < n; c += VL) _mm512_stream_ps(y + c, (__m512)vload(sums + c));
}
FASTLLM_INLINE void stream_sums(uint16_t* y, const float* before, const float* sums, int64_t n) {
  for (int64_t c = 0; c < n; c += 2 * VL) {
    vf low = vload(sums + c), high = vload(sums + c + VL);
    if (before) low = vload(before + c) + low, high = vload(before + c + VL) + high;
    _mm512_stream_si512(reinterpret_cast<__m512i*>(y + c), (__m512i)vpack_bf16(low, high));
  }
}
FASTLLM_INLINE void end_stream() { _mm_sfence(); }
#else
template <class Y>
FASTLLM_INLINE void stream_sums(Y* y, const float* before, const float* sums, int64_t n) {
  put_sums(y, before, sums, n);
}
FASTLLM_INLINE void end_stream() {}
#endif

// Rows `out` of y [m, n], of type Y. left(r) and right(r) point to row r of a [rows, m] and b.
// `streamed`: streams_gradient.
template <class D, class Y, class Left, class Right>
static void weight_grad(Y* y, int64_t m, int64_t n, Span out, int64_t rows, const Left& left,
                        const Right& right, bool streamed) {
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
    // fp32 sums of earlier blocks lie in y itself, and so in the caches.
    const bool streams = streamed && last && !(r0 && sizeof(Y) == 4);
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
            if (streams)
              stream_sums(y + out.begin * n + at, earlier, sums + i * stride, columns);
            else if (last)
              put_sums(y + out.begin * n + at, earlier, sums + i * stride, columns);
            else
              put_sums(before + at, earlier, sums + i * stride, columns);
          }
        });
  }
  if (streamed) end_stream();
}

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
