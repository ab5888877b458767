// Experts in quantized panels: the products of quant_matmul over the panels of one expert after the
// other. Formats and modes are chosen at run time, so this is compiled once.
#pragma once
#include "cpu/moe_weights.h"
#include "cpu/quant_strips.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// The mode of a weight in a layer's mode: e4m3 codes have fp8 where others have int8.
FASTLLM_INLINE Activation mode_of(Format format, Activation mode) {
  const bool float8 = format == Format::fp8 || format == Format::fp8_block;
  return float8 && mode == Activation::int8 ? Activation::fp8 : mode;
}

class QuantExperts {
 public:
  static constexpr bool by_strips = true;
  static constexpr int strip = kWideStrip;

  // `prepared`: rows come as prepare() makes them, not as values of the layer's dtype.
  QuantExperts(const ExpertWeights& w, int64_t n, int64_t k, DType type, Activation mode,
               bool prepared)
      : w_(w),
        kernel_(quant_kernel(w.format, mode_of(w.format, mode), k)),
        panels_(divide_up(n, kPanelRows)),
        unit_(kernel_.word_columns == 4 ? kernel_.row_offset(kBlock) : 4),
        type_(type),
        prepared_(prepared) {}

  // Rows of an expert whose weight is decoded in registers, twice for more than kFewRows: unpacking
  // it first costs as much as the products of 12 rows.
  int few_rows() const { return kernel_.few ? 2 * kFewRows : kFewRows; }
  int wide(int64_t rows) const {
    if (rows > few_rows()) return kWideStrip;
    return kernel_.few ? 1 : few_tile(rows).panels;
  }
  int64_t width(int64_t rows) const {
    if (rows > few_rows()) return kernel_.wide_rows();
    if (!kernel_.few) return few_tile(rows).rows;
    return rows > kFewRows ? kFewRows : few_width(rows);
  }
  int64_t row_bytes() const { return kernel_.row_bytes(); }
  // One row of values as products want it.
  void prepare(const char* row, char* to) const { kernel_.prepare_row(kernel_, row, type_, to, 1); }

  // row(i) points to row i of the group, or is null: a row of zeros.
  template <class Row>
  void pack_group(const Row& row, int64_t width, char* to) const {
    for (int64_t i = 0; i < width; ++i, to += unit_) {
      const char* from = row(i);
      if (!from || !prepared_) {
        kernel_.prepare_row(kernel_, from, type_, to, width);
        continue;
      }
      for (int64_t at = 0; at < row_bytes(); at += unit_)
        __builtin_memcpy(to + at * width, from + at, static_cast<size_t>(unit_));
    }
  }

  void begin_expert(int64_t e, bool) {
    codes_ = reinterpret_cast<const uint8_t*>(w_.data) + e * w_.expert_bytes;
    scales_ = reinterpret_cast<const uint8_t*>(w_.scales) + e * w_.expert_scales;
  }
  void prefetch(int64_t e, int64_t row, int64_t) const {
    const int64_t panel = row / kPanelRows;
    prefetch_range(w_.data + e * w_.expert_bytes + panel * kernel_.panel_codes,
                   kernel_.panel_codes);
    prefetch_range(w_.scales + e * w_.expert_scales + panel * kernel_.panel_scales,
                   kernel_.panel_scales);
  }

  // The outputs from side * n + 16 * panel on of SIDES sides, for all rows of a task; `more`: the
  // strips behind them are asked for afterwards. done(row, rows, sums of the first and of the last
  // side, stride) gets every group.
  template <int SIDES, class Done>
  void multiply(int64_t panel, int64_t n, bool more, const MoeTask& task, const char* x,
                const Done& done) const {
    const RowGroups rows{task.rows.size(), task.width, row_bytes(), const_cast<char*>(x)};
    const int64_t columns = task.wide * kPanelRows;
    // Where an expert's gate does not fill its panels, the up rows begin inside one: they are taken
    // from the sums of two strips.
    const int64_t up = panel * kPanelRows + (SIDES - 1) * n, shift = up % kPanelRows;
    const int count = SIDES + (shift ? 1 : 0);
    const int64_t first[3] = {panel, up / kPanelRows, up / kPanelRows + task.wide};
    const auto finish = [&](int64_t g, float* sums, int64_t size) {
      float* two = sums + (SIDES - 1) * size;
      if (shift) shift_sums(two, two + size, task.width, columns, shift);
      done(g * task.width, smaller(rows.rows - g * task.width, task.width), sums, two, columns);
    };
    if (task.few && kernel_.few) return multiply_panels(first, count, rows, finish);
    StripPanels here[3], next[3];
    for (int s = 0; s < count; ++s) {
      here[s] = panels_from(first[s], task.wide);
      next[s] = panels_from(first[s] + task.wide, task.wide);
    }
    multiply_strips(kernel_, here, count, more ? next : nullptr, rows, 0, rows.groups(), task.few,
                    finish);
  }

 private:
  StripPanels panels_from(int64_t panel, int count) const {
    StripPanels s{};
    s.count = count;
    for (int p = 0; p < count; ++p, ++panel)
      if (panel < panels_)
        s.panels[p] = {codes_ + panel * kernel_.panel_codes,
                       scales_ + panel * kernel_.panel_scales};
    return s;
  }
  // Few rows (of at most two groups), single panels.
  template <class Finish>
  void multiply_panels(const int64_t* first, int count, const RowGroups& x,
                       const Finish& finish) const {
    alignas(64) float sums[3][kFewRows * kPanelRows];
    for (int64_t g = 0; g < x.groups(); ++g) {
      for (int s = 0; s < count; ++s)
        if (first[s] < panels_)  // else nobody reads these sums
          multiply_few(kernel_, panels_from(first[s], 1).panels[0],
                       smaller(x.rows - g * x.width, x.width), x.group(g), x.width, sums[s]);
      finish(g, sums[0], kFewRows * kPanelRows);
    }
  }
  // Columns [shift, shift + columns) of two strips side by side.
  static void shift_sums(float* sums, const float* behind, int64_t rows, int64_t columns,
                         int64_t shift) {
    for (int64_t r = 0; r < rows; ++r, sums += columns, behind += columns)
      for (int64_t c = 0; c < columns; ++c)
        sums[c] = c + shift < columns ? sums[c + shift] : behind[c + shift - columns];
  }

  const ExpertWeights& w_;
  const QuantKernel kernel_;
  const int64_t panels_, unit_;
  const DType type_;
  const bool prepared_;
  const uint8_t *codes_ = nullptr, *scales_ = nullptr;
};

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
