// Experts in quantized panels: the products of quant_matmul over the panels of one expert after the
// other. Formats and modes are chosen at run time, so this is compiled once.
#pragma once
#include "cpu/moe_weights.h"
#include "cpu/quant_kernels.h"

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

  // sums[group][width][wide * 16] of the outputs from `output` on, for all groups of a task's rows;
  // `next`: the outputs that are asked for afterwards, or -1. An output need not be the first of a
  // panel: where an expert's gate does not fill its panels, the up rows begin inside one. `spare`
  // has the size of `sums`.
  void multiply(int64_t output, int64_t next, const MoeTask& task, const char* x, float* sums,
                float* spare) const {
    const int64_t panel = output / kPanelRows, shift = output % kPanelRows;
    const StripPanels following = panels_from(next / kPanelRows, task.wide);
    const StripPanels* after = next < 0 ? nullptr : &following;
    times_panels(panel, shift ? nullptr : after, task, x, sums);
    if (!shift) return;
    times_panels(panel + task.wide, after, task, x, spare);
    const int64_t columns = task.wide * kPanelRows;
    const int64_t rows = divide_up(task.rows.size(), task.width) * task.width;
    for (int64_t r = 0; r < rows; ++r, sums += columns, spare += columns)
      for (int64_t c = 0; c < columns; ++c)
        sums[c] = c + shift < columns ? sums[c + shift] : spare[c + shift - columns];
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
  void times_panels(int64_t panel, const StripPanels* next, const MoeTask& task, const char* x,
                    float* sums) const {
    if (panel >= panels_) return;  // nobody reads these sums
    if (task.few && kernel_.few) {
      const Panel from = panels_from(panel, 1).panels[0];
      const int64_t group = task.width * row_bytes();
      for (int64_t left = task.rows.size(); left > 0; left -= task.width) {
        multiply_few(kernel_, from, smaller(left, task.width), x, task.width, sums);
        x += group;
        sums += task.width * kPanelRows;
      }
      return;
    }
    multiply_strip(kernel_, panels_from(panel, task.wide), next, x, task.width, task.rows.size(), 0,
                   divide_up(task.rows.size(), task.width), task.few, sums);
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
