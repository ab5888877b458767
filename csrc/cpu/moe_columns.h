// The weights of experts that lie transposed, as the tiles read them: [experts, k, n], the outputs of
// a column side by side. A strip of panels is made of every column's next few outputs; the words,
// and so the bits of the sums, are those of rows.
#pragma once
#include "cpu/integers.h"
#include "cpu/row_groups.h"
#include "ops_moe.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// One word for each of 16 pairs (gate, up): of all gates (side 0) or of all ups.
FASTLLM_INLINE void pack_pair_words(const float* low, const float*, int side, uint32_t* out) {
  uint32_t words[2 * kPanelRows];
  __builtin_memcpy(words, low, sizeof(words));
  for (int i = 0; i < kPanelRows; ++i) out[i] = words[2 * i + side];
}
FASTLLM_INLINE void pack_pair_words(const uint16_t* low, const uint16_t* high, int side,
                                    uint32_t* out) {
  uint32_t one[kPanelRows], two[kPanelRows];
  __builtin_memcpy(one, low, sizeof(one));
  __builtin_memcpy(two, high, sizeof(two));
  if (side == 0)
    for (int i = 0; i < kPanelRows; ++i) out[i] = (one[i] & 0xffff) | two[i] << 16;
  else
    for (int i = 0; i < kPanelRows; ++i) out[i] = one[i] >> 16 | (two[i] & 0xffff0000);
}

// pack_row_strip of one side of pairs: row(c) points to the strip's first pair in column c, `count`
// pairs exist.
template <class D, class Row>
static void pack_pair_strip(const Row& row, int side, int64_t count, int panels, int64_t k,
                            uint32_t* to) {
  const int64_t size = words_of<D>(k) * kPanelRows;
  for (int64_t c = 0; c < k; c += D::columns, to += kPanelRows) {
    const bool both = D::columns == 1 || c + 1 < k;
    const Element<D>* low = row(c);
    const Element<D>* high = D::columns == 2 && both ? row(c + 1) : low;
    for (int p = 0; p < panels; ++p) {
      const int64_t first = p * kPanelRows, live = count - first;
      uint32_t* out = to + p * size;
      if (live >= kPanelRows && both) {
        pack_pair_words(low + 2 * first, high + 2 * first, side, out);
        continue;
      }
      for (int64_t i = 0; i < kPanelRows; ++i) {
        const int64_t at = 2 * (first + i) + side;
        if constexpr (D::columns == 1) {
          out[i] = i < live ? word_of(low[at]) : 0;
        } else {
          out[i] = i < live ? low[at] : 0;
          if (i < live && both) out[i] |= static_cast<uint32_t>(high[at]) << 16;
        }
      }
    }
  }
}

// Columns of bf16 or fp32, their outputs in runs of gate and up or in pairs.
template <class D>
class ColumnExperts {
 public:
  static constexpr bool by_strips = false;
  static constexpr int rows = kDenseRows, strip = kDenseStrip, few = 4;

  ColumnExperts(const ExpertWeights& w, int64_t n, int64_t k, int sides)
      : w_(w),
        n_(n),
        k_(k),
        stride_(w.row_bytes / static_cast<int64_t>(sizeof(Element<D>))),
        words_(words_of<D>(k)),
        side_words_(words_ * kPanelRows * strip),
        panels_(static_cast<uint32_t*>(
            thread_scratch(Scratch::panels, static_cast<size_t>(side_words_ * sides) * 4))) {}

  static int few_rows() { return few; }
  static int wide(int64_t) { return strip; }
  static int64_t width(int64_t) { return kDenseRows; }
  int64_t row_bytes() const { return words_ * D::steps * 4; }
  template <class Row>
  void pack_group(const Row& row, int64_t, char* to) const {
    pack_row_group<D>([&](int i) { return reinterpret_cast<const Element<D>*>(row(i)); }, k_,
                      reinterpret_cast<uint32_t*>(to));
  }
  void begin_expert(int64_t e, bool) {
    expert_ = reinterpret_cast<const Element<D>*>(w_.data + e * w_.expert_bytes);
  }
  // The strip's outputs in the first columns.
  void prefetch(int64_t e, int64_t row, int64_t) const {
    const auto* from = reinterpret_cast<const Element<D>*>(w_.data + e * w_.expert_bytes);
    for (int64_t c = 0; c < smaller(k_, 64); ++c)
      __builtin_prefetch(from + c * stride_ + output(row), 0, 2);
  }
  // Packs `count` panels of outputs [row, end); `more`: the next strip follows, whose outputs are
  // asked for in every column that is read.
  void begin_strip(int side, int64_t row, int64_t count, int64_t end, bool more) {
    uint32_t* to = panels_ + side * side_words_;
    const Element<D>* from = expert_ + output(row);
    const int64_t per_line = 64 / static_cast<int64_t>(sizeof(Element<D>));
    const int64_t next = output(row + count * kPanelRows) - output(row);
    const int panels = static_cast<int>(count);
    const auto column = [&](int64_t c) __attribute__((always_inline)) {
      const Element<D>* at = from + c * stride_;
      if (more)
        for (int64_t i = 0; i < next; i += per_line) __builtin_prefetch(at + next + i, 0, 2);
      return at;
    };
    if (w_.paired)
      pack_pair_strip<D>(column, side, end - row, panels, k_, to);
    else
      pack_row_strip<D>(column, end - row, panels, k_, to);
  }
  template <int MR, int NP>
  void tile(int side, int64_t, const char* x, int64_t width, int64_t, float* sums) const {
    dense_tile<D, MR, NP>(panels_ + side * side_words_, words_, 0,
                          reinterpret_cast<const uint32_t*>(x), width, sums);
  }

 private:
  // Where output `row` of the sides, one after the other, lies in a column: its pair, or itself.
  int64_t output(int64_t row) const { return w_.paired ? 2 * (row % n_) : row; }

  const ExpertWeights& w_;
  const int64_t n_, k_, stride_, words_, side_words_;
  uint32_t* const panels_;
  const Element<D>* expert_ = nullptr;
};

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
