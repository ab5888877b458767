// Experts in quantized panels: the tiles of quant_matmul over the panels of one expert after the
// other.
#pragma once
#include "cpu/matmul_int8.h"
#include "cpu/moe_weights.h"

namespace fastllm::FASTLLM_ISA {
namespace {

template <class F>
class QuantizedPanels {
 public:
  static constexpr int rows = kBlockRows, strip = kBlockStrip, few = kBlockFew;

  QuantizedPanels(const ExpertWeights& w, int64_t n, int64_t k)
      : w_(w), panels_(divide_up(n, kPanelRows)), blocks_(k / kBlock) {}

  int64_t panels() const { return panels_; }
  void begin_expert(int64_t e, bool) {
    data_ = w_.data + e * w_.expert_bytes;
    scales_ = reinterpret_cast<const uint16_t*>(w_.scales + e * w_.expert_scales);
  }
  void prefetch(int64_t e, int64_t row, int64_t) const {
    const int64_t block = row / kPanelRows * blocks_;
    prefetch_range(w_.data + e * w_.expert_bytes + block * block_bytes<F>,
                   blocks_ * block_bytes<F>);
    prefetch_range(w_.scales + e * w_.expert_scales + block * block_scales<F> * 2,
                   blocks_ * block_scales<F> * 2);
  }
  void begin_strip(int, int64_t, int64_t, int64_t, bool) const {}

 protected:
  const uint8_t* data(int64_t panel) const {
    return reinterpret_cast<const uint8_t*>(data_) + panel * blocks_ * block_bytes<F>;
  }
  const uint16_t* scales(int64_t panel) const {
    return scales_ + panel * blocks_ * block_scales<F>;
  }
  int64_t distance(int64_t left) const { return fetch_distance(blocks_ * block_bytes<F>, left); }

  const ExpertWeights& w_;
  const int64_t panels_, blocks_;
  const char* data_ = nullptr;
  const uint16_t* scales_ = nullptr;
};

// Rows come as values of the layer's dtype, or as records that were quantized before.
template <class F>
class Int8Experts : public QuantizedPanels<F> {
 public:
  Int8Experts(const ExpertWeights& w, int64_t n, int64_t k, DType type, bool records)
      : QuantizedPanels<F>(w, n, k), type_(type), records_(records) {}

  static int64_t width(int64_t rows) { return tile_rows<Int8Experts>(rows); }
  int64_t row_bytes() const { return this->blocks_ * static_cast<int64_t>(sizeof(Int8Block)); }
  template <class Row>
  void pack_group(const Row& row, int64_t width, char* to) const {
    Int8Block* out = reinterpret_cast<Int8Block*>(to);
    for (int64_t i = 0; i < width; ++i) pack_row(row(i), width, out + i);
  }
  template <int MR, int NP>
  void tile(int, int64_t row, const char* x, int64_t width, int64_t left, float* sums) const {
    panels_tile<MR, NP>(*this, row, x, width, left, sums);
  }
  template <int MR, int NP>
  void whole_tile(int64_t panel, const char* x, int64_t width, int64_t left, float* sums) const {
    int8_tile<F, MR, NP>(this->data(panel), this->scales(panel), this->blocks_,
                         this->distance(left), reinterpret_cast<const Int8Block*>(x), width, sums);
  }

 private:
  void pack_row(const char* row, int64_t width, Int8Block* out) const {
    const int64_t columns = this->blocks_ * kBlock;
    if (!row)
      for (int64_t b = 0; b < this->blocks_; ++b) __builtin_memset(out + b * width, 0, sizeof *out);
    else if (records_)
      for (int64_t b = 0; b < this->blocks_; ++b)
        out[b * width] = reinterpret_cast<const Int8Block*>(row)[b];
    else if (type_ == DType::bf16)
      quantize_row<F>(reinterpret_cast<const uint16_t*>(row), columns, out, width);
    else
      quantize_row<F>(reinterpret_cast<const float*>(row), columns, out, width);
  }
  const DType type_;
  const bool records_;
};

template <class F, class Dot>
class FloatExperts : public QuantizedPanels<F> {
 public:
  using X = std::conditional_t<Dot::columns == 2, uint16_t, float>;
  FloatExperts(const ExpertWeights& w, int64_t n, int64_t k, DType type)
      : QuantizedPanels<F>(w, n, k), type_(type) {}

  static int64_t width(int64_t rows) { return tile_rows<FloatExperts>(rows); }
  int64_t row_bytes() const { return this->blocks_ * (block_steps<Dot> + 1) * 4; }
  template <class Row>
  void pack_group(const Row& row, int64_t width, char* to) const {
    uint32_t* out = reinterpret_cast<uint32_t*>(to);
    for (int64_t i = 0; i < width; ++i) pack_row(row(i), width, out + i);
  }
  template <int MR, int NP>
  void tile(int, int64_t row, const char* x, int64_t width, int64_t left, float* sums) const {
    panels_tile<MR, NP>(*this, row, x, width, left, sums);
  }
  template <int MR, int NP>
  void whole_tile(int64_t panel, const char* x, int64_t width, int64_t left, float* sums) const {
    block_tile<F, Dot, MR, NP>(this->data(panel), this->scales(panel), this->blocks_,
                               this->distance(left), reinterpret_cast<const uint32_t*>(x), width,
                               sums);
  }

 private:
  void pack_row(const char* row, int64_t width, uint32_t* out) const {
    const int64_t columns = this->blocks_ * kBlock;
    if (!row) {
      for (int64_t i = 0; i < row_bytes() / 4; ++i) out[i * width] = 0;
      return;
    }
    if (type_ == DType::bf16)
      return prepare_blocks<F, Dot>(reinterpret_cast<const uint16_t*>(row), columns, out, width);
    if constexpr (Dot::columns == 1)
      prepare_blocks<F, Dot>(reinterpret_cast<const float*>(row), columns, out, width);
  }
  const DType type_;
};

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
