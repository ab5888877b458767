// Tiles of few rows of x times a weight that lies in rows, read where it lies.
#pragma once
#include "cpu/integers.h"
#include "cpu/matmul_float.h"
#include "cpu/transpose.h"

namespace fastllm::FASTLLM_ISA {

#if defined(__AVX512F__)
constexpr bool kReadsRows = true;

// MR rows of x times a panel of 16 rows of a weight that lies in rows, K a multiple of 64 bytes: 16
// words of 16 rows are transposed in registers and used at once. The sums are dense_tile's. A panel
// that is packed first and then read has 256 dependent sums after the packing: the two together
// took 1.2 us for K = 512 where this takes half.
template <class D, int MR>
static __attribute__((noinline)) void rows_tile(const char* const* rows, int64_t ahead,
                                                int64_t fetched, int64_t words, const uint32_t* x,
                                                int64_t width, float* out) {
  for (int64_t begin = 0; begin == 0 || begin < words; begin += D::chunk) {
    const int64_t end = begin + D::chunk < words ? begin + D::chunk : words;
    vf acc[MR];
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m) acc[m] = vf{};
    for (int64_t w = begin; w < end; w += 16) {
      vi r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) r[i] = vloadi(rows[i] + 4 * w);
      for (int64_t i = 0; i < fetched; ++i) prefetch_lines<1>(rows[i] + 4 * w + ahead);
      transpose_16x16(r);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i, x += width)
#pragma GCC unroll 12
        for (int m = 0; m < MR; ++m) acc[m] = D::Dot::dot(acc[m], r[i], splat_word(x + m));
    }
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m) {
      float* sums = out + m * kPanelRows;
      vstore(sums, begin ? vload(sums) + acc[m] : acc[m]);
    }
  }
}
#else
constexpr bool kReadsRows = false;
#endif

// Whether weights of D are read in place, and for how many rows of x.
template <class D>
constexpr bool kReadsRowsOf = kReadsRows && D::steps == 1;  // a word of both is one step
template <class D>
constexpr int kFewRowsOf = kReadsRowsOf<D> ? 12 : 4;

// The rows of a weight where they lie, `stride` bytes apart, of which `bytes` count.
struct RowsInPlace {
  const char* data;
  int64_t stride, bytes;

  bool whole_lines() const { return bytes % 64 == 0; }
  // The first lines of the panel from `row` on, of rows before `end`: 8 KB in all, as of a packed
  // weight. The hardware sees 16 streams too late.
  void prefetch(int64_t row, int64_t end) const {
    constexpr int64_t most = 512;
    for (int64_t i = row; i < end && i < row + kPanelRows; ++i)
      for (int64_t b = 0; b < bytes && b < most; b += 64)
        __builtin_prefetch(data + i * stride + b, 0, 2);
  }
#if defined(__AVX512F__)
  // The panel from `row` on, of whole lines; `more`: the next one, of rows before `end`, is asked
  // for meanwhile.
  template <class D, int MR>
  void tile(int64_t row, int64_t end, bool more, const uint32_t* x, int64_t width,
            float* sums) const {
    const char* rows[kPanelRows];  // past the end the last one again: nobody reads its sums
    for (int64_t i = 0; i < kPanelRows; ++i) rows[i] = data + smaller(row + i, end - 1) * stride;
    const int64_t left = more ? end - row - kPanelRows : 0;
    rows_tile<D, MR>(rows, kPanelRows * stride, smaller(left, kPanelRows), bytes / 4, x, width,
                     sums);
  }
#endif
};

}  // namespace fastllm::FASTLLM_ISA
