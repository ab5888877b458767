// The weights of experts as the tiles read them: rows that are packed into panels on the way, or
// panels. A product has one or two sides (gate and up), each a run of rows of an expert's weight.
#pragma once
#include "cpu/moe_tasks.h"
#include "cpu/row_groups.h"
#include "cpu/rows_tile.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// Rows of bf16 or fp32. With few rows of x, the weight's rows are read where they lie. With many, a
// strip of every side is packed into this thread's scratch and meets all
// rows of the task; the rows that the next strip is made of are asked for meanwhile.
template <class D>
class PlainExperts {
 public:
  static constexpr bool reads_rows = kReadsRowsOf<D>, by_strips = false;
  static constexpr int rows = kDenseRows, strip = kDenseStrip, few = kFewRowsOf<D>;
  static constexpr int64_t element = sizeof(Element<D>);

  PlainExperts(const ExpertWeights& w, int64_t k, int sides)
      : w_(w),
        k_(k),
        words_(words_of<D>(k)),
        side_words_(words_ * kPanelRows * strip),
        panels_(static_cast<uint32_t*>(
            thread_scratch(Scratch::panels, static_cast<size_t>(side_words_ * sides) * 4))) {}

  static int few_rows() { return few; }
  static int wide(int64_t rows) { return rows <= few ? 1 : strip; }
  static int64_t width(int64_t) { return kDenseRows; }
  int64_t row_bytes() const { return words_ * D::steps * 4; }
  // row(i) points to row i of the group, or is null: a row of zeros.
  template <class Row>
  void pack_group(const Row& row, int64_t, char* to) const {
    pack_row_group<D>([&](int i) { return reinterpret_cast<const Element<D>*>(row(i)); }, k_,
                      reinterpret_cast<uint32_t*>(to));
  }

  // `few_rows`: the expert has at most `few`, so that strips are single panels.
  void begin_expert(int64_t e, bool few_rows) {
    expert_ = rows_of(e);
    direct_ = reads_rows && few_rows && expert_.whole_lines();
  }
  // The first lines of the weight from `row` on.
  void prefetch(int64_t e, int64_t row, int64_t end) const { rows_of(e).prefetch(row, end); }
  // Packs `count` panels of rows [row, end); `more`: the next strip follows.
  void begin_strip(int side, int64_t row, int64_t count, int64_t end, bool more) {
    if (direct_) {
      end_[side] = end;
      more_ = more;
      return;
    }
    uint32_t* to = panels_ + side * side_words_;
    for (int64_t p = 0; p < count; ++p, row += kPanelRows, to += words_ * kPanelRows)
      pack(row, smaller(end - row, kPanelRows), more ? row + count * kPanelRows : end, end, to);
  }
  template <int MR, int NP>
  void tile(int side, int64_t row, const char* x, int64_t width, int64_t, float* sums) const {
    const auto* words = reinterpret_cast<const uint32_t*>(x);
#if defined(__AVX512F__)
    if constexpr (NP == 1 && reads_rows)
      if (direct_) return expert_.tile<D, MR>(row, end_[side], more_, words, width, sums);
#endif
    (void)row;
    dense_tile<D, MR, NP>(panels_ + side * side_words_, words_, 0, words, width, sums);
  }

 private:
  RowsInPlace rows_of(int64_t e) const {
    return {w_.data + e * w_.expert_bytes, w_.row_bytes, k_ * element};
  }
  // One panel, in pieces of 256 bytes a row; as many bytes of rows [ahead, end) are fetched.
  void pack(int64_t row, int64_t count, int64_t ahead, int64_t end, uint32_t* to) const {
    constexpr int64_t piece = 256;
    const char *from = expert_.data + row * w_.row_bytes,
               *next = expert_.data + ahead * w_.row_bytes;
    const int64_t bytes = k_ * element, fetched = smaller(end - ahead, kPanelRows);
    for (int64_t b = 0; b < bytes; b += piece) {
      for (int64_t i = 0; i < fetched; ++i) prefetch_lines<piece / 64>(next + i * w_.row_bytes + b);
      const int64_t size = smaller(bytes - b, piece);
      pack_panel(from + b, w_.row_bytes, count, size, (size + 3) / 4, to + b / 4 * kPanelRows);
    }
  }

  const ExpertWeights& w_;
  const int64_t k_, words_, side_words_;
  uint32_t* const panels_;
  RowsInPlace expert_{};
  bool direct_ = false, more_ = false;
  int64_t end_[2] = {};
};

// NP panels from output `row` on, which need not be the first of a panel: where an expert's gate
// does not fill its panels, the up rows begin inside one.
template <int MR, int NP, class W>
FASTLLM_INLINE void panels_tile(const W& w, int64_t row, const char* x, int64_t width, int64_t left,
                                float* sums) {
  const int64_t panel = row / kPanelRows, shift = row % kPanelRows;
  if (shift == 0) return w.template whole_tile<MR, NP>(panel, x, width, left, sums);
  alignas(64) float one[MR * kPanelRows];
  for (int64_t p = 0; p <= NP && panel + p < w.panels(); ++p) {
    w.template whole_tile<MR, 1>(panel + p, x, width, 0, one);
    for (int64_t m = 0; m < MR; ++m)
      for (int64_t c = 0; c < kPanelRows; ++c) {
        const int64_t column = p * kPanelRows + c - shift;
        if (column >= 0 && column < NP * kPanelRows)
          sums[m * NP * kPanelRows + column] = one[m * kPanelRows + c];
      }
  }
}

// How far ahead a tile fetches weights, if `left` panels of its run follow.
FASTLLM_INLINE int64_t fetch_distance(int64_t panel_bytes, int64_t left) {
  const int64_t distance = prefetch_distance(panel_bytes);
  return distance <= left * panel_bytes ? distance : 0;
}

// Panels of bf16 or fp32.
template <class D>
class DensePanels {
 public:
  static constexpr bool by_strips = false;
  static constexpr int rows = kDenseRows, strip = kDenseStrip, few = 4;

  DensePanels(const ExpertWeights& w, int64_t n, int64_t k)
      : w_(w), k_(k), words_(words_of<D>(k)), panels_(divide_up(n, kPanelRows)) {}

  static int few_rows() { return few; }
  static int wide(int64_t rows) { return rows <= few ? 1 : strip; }
  static int64_t width(int64_t) { return kDenseRows; }
  int64_t row_bytes() const { return words_ * D::steps * 4; }
  template <class Row>
  void pack_group(const Row& row, int64_t, char* to) const {
    pack_row_group<D>([&](int i) { return reinterpret_cast<const Element<D>*>(row(i)); }, k_,
                      reinterpret_cast<uint32_t*>(to));
  }
  int64_t panels() const { return panels_; }
  void begin_expert(int64_t e, bool) { expert_ = w_.data + e * w_.expert_bytes; }
  void prefetch(int64_t e, int64_t row, int64_t) const {
    prefetch_range(w_.data + e * w_.expert_bytes + row / kPanelRows * panel_bytes(), panel_bytes());
  }
  void begin_strip(int, int64_t, int64_t, int64_t, bool) const {}
  template <int MR, int NP>
  void tile(int, int64_t row, const char* x, int64_t width, int64_t left, float* sums) const {
    panels_tile<MR, NP>(*this, row, x, width, left, sums);
  }
  template <int MR, int NP>
  void whole_tile(int64_t panel, const char* x, int64_t width, int64_t left, float* sums) const {
    dense_tile<D, MR, NP>(reinterpret_cast<const uint32_t*>(expert_ + panel * panel_bytes()),
                          words_, fetch_distance(panel_bytes(), left),
                          reinterpret_cast<const uint32_t*>(x), width, sums);
  }

 private:
  int64_t panel_bytes() const { return words_ * kPanelRows * 4; }
  const ExpertWeights& w_;
  const int64_t k_, words_, panels_;
  const char* expert_ = nullptr;
};

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
