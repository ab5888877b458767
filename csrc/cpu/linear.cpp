// y = x @ weight.T + bias for weights in rows. With few rows of x the weight is read where it lies;
// with many, a strip of panels is packed into this thread's scratch and meets all rows of x while it
// lies in the cache. The sums are those of packed weights, so the bits are too.
#include "cpu/matmul_dense.h"
#include "cpu/pack_panel.h"
#include "cpu/rows_tile.h"
#include "ops_core.h"

namespace fastllm::FASTLLM_ISA {
namespace {

template <class D>
struct LinearProduct : DenseRows<D> {
  static constexpr int64_t element = D::columns == 2 ? 2 : 4;
  static constexpr bool reads_rows = kReadsRows && D::steps == 1;  // a word of both is one step
  static constexpr int few = reads_rows ? 12 : DenseRows<D>::few;
  const LinearArgs& a;
  const int64_t weight_row_bytes;  // from one row of the weight to the next
  const bool direct;               // its rows are read where they lie
  int64_t end = 0;                 // few rows: where this thread's rows of the weight end
  uint32_t* panels;

  LinearProduct(const LinearArgs& args, const Team& team)
      : DenseRows<D>{args.x, args.type, args.m, args.k, args.x_stride},
        a(args),
        weight_row_bytes(args.weight_stride * element),
        direct(reads_rows && args.m <= few && args.k * element % 64 == 0),
        panels(static_cast<uint32_t*>(thread_scratch(
            Scratch::panels, this->words() * kPanelRows * DenseRows<D>::strip * 4))) {
    int64_t begin;
    my_share(team, a.out.n, kPanelRows, &begin, &end);
  }

  const char* row(int64_t i) const {
    return static_cast<const char*>(a.weight) + i * weight_row_bytes;
  }
  // The first lines of this thread's rows, which the hardware sees as 16 streams too late.
  void prefetch_panel(int64_t panel) const {
    constexpr int64_t most = 512;  // of a row: 8 KB in all, as of a packed weight
    const int64_t first = panel * kPanelRows, bytes = a.k * element;
    for (int64_t i = first; i < end && i < first + kPanelRows; ++i)
      for (int64_t b = 0; b < bytes && b < most; b += 64) __builtin_prefetch(row(i) + b, 0, 2);
  }
  void begin_strip(int64_t panel, int64_t count) const {
    if (direct) return;
    for (int64_t p = 0; p < count; ++p) {
      const int64_t first = (panel + p) * kPanelRows, left = a.out.n - first;
      pack_panel(row(first), weight_row_bytes, left < kPanelRows ? left : kPanelRows, a.k * element,
                 this->words(), panels + p * this->words() * kPanelRows);
    }
  }
  template <int MR, int NP>
  void tile(int64_t panel, const char* x, int64_t width, bool, float* sums) const {
    const auto* words = reinterpret_cast<const uint32_t*>(x);
#if defined(__AVX512F__)
    if constexpr (NP == 1 && reads_rows)
      if (direct) return read_rows<MR>(panel * kPanelRows, words, width, sums);
#endif
    dense_tile<D, MR, NP>(panels, this->words(), 0, words, width, sums);
  }

 private:
#if defined(__AVX512F__)
  template <int MR>
  void read_rows(int64_t first, const uint32_t* x, int64_t width, float* sums) const {
    const char* rows[kPanelRows];  // past the end the last one again: nobody reads its sums
    for (int64_t i = 0; i < kPanelRows; ++i)
      rows[i] = row(first + i < a.out.n ? first + i : a.out.n - 1);
    const int64_t left = end - first - kPanelRows, next = left < kPanelRows ? left : kPanelRows;
    rows_tile<D, MR>(rows, kPanelRows * weight_row_bytes, next, this->words(), x, width, sums);
  }
#endif
};

}  // namespace

void linear(const LinearArgs& a, const Team& team) {
  if (a.type == DType::bf16)
    product(LinearProduct<Bf16Dense>(a, team), a.out, a.m, a.scratch, team);
  else
    product(LinearProduct<Float32>(a, team), a.out, a.m, a.scratch, team);
}

}  // namespace fastllm::FASTLLM_ISA
