// y = x @ W.T + bias for packed weights. Rows of x are brought into the form that the tiles read,
// then strips of outputs are handed out.
#include "cpu/matmul_dense.h"
#include "cpu/matmul_int8.h"
#include "ops_core.h"

namespace fastllm::FASTLLM_ISA {
namespace {

template <class F>
struct Blocks {
  static constexpr int rows = kBlockRows, strip = kBlockStrip, few = kBlockFew;
  static constexpr int64_t row_block = kRowBlockBytes;
  const QuantMatmulArgs& a;
  int64_t blocks = a.k / kBlock;

  void begin_strip(int64_t, int64_t) const {}
  const uint8_t* data(int64_t panel) const {
    return static_cast<const uint8_t*>(a.data) + panel * blocks * block_bytes<F>;
  }
  const uint16_t* scales(int64_t panel) const {
    return static_cast<const uint16_t*>(a.scales) + panel * blocks * block_scales<F>;
  }
  void prefetch_panel(int64_t panel) const {
    prefetch_range(data(panel), blocks * block_bytes<F>);
    prefetch_range(scales(panel), blocks * block_scales<F> * 2);
  }
};

template <class F>
struct Int8Product : Blocks<F> {
  explicit Int8Product(const QuantMatmulArgs& args) : Blocks<F>{args} {}
  int64_t row_bytes() const { return this->blocks * static_cast<int64_t>(sizeof(Int8Block)); }
  void prepare(const RowGroups& to, int64_t row) const {
    const QuantMatmulArgs& a = this->a;
    Int8Block* out = reinterpret_cast<Int8Block*>(to.group(row / to.width)) + row % to.width;
    if (row >= a.m) {
      for (int64_t b = 0; b < this->blocks; ++b)
        __builtin_memset(out + b * to.width, 0, sizeof *out);
    } else if (a.x_type == DType::bf16) {
      quantize_row<F>(static_cast<const uint16_t*>(a.x) + row * a.x_stride, a.k, out, to.width);
    } else {
      quantize_row<F>(static_cast<const float*>(a.x) + row * a.x_stride, a.k, out, to.width);
    }
  }
  template <int MR, int NP>
  void tile(int64_t panel, const char* x, int64_t width, bool first, float* sums) const {
    int8_tile<F, MR, NP>(this->data(panel), this->scales(panel), this->blocks,
                         first ? prefetch_distance(this->blocks * block_bytes<F>) : 0,
                         reinterpret_cast<const Int8Block*>(x), width, sums);
  }
};

template <class F, class Dot>
struct FloatProduct : Blocks<F> {
  explicit FloatProduct(const QuantMatmulArgs& args) : Blocks<F>{args} {}
  int64_t row_bytes() const { return this->blocks * (block_steps<Dot> + 1) * 4; }
  void prepare(const RowGroups& to, int64_t row) const {
    const QuantMatmulArgs& a = this->a;
    uint32_t* out = reinterpret_cast<uint32_t*>(to.group(row / to.width)) + row % to.width;
    if (row >= a.m) {
      for (int64_t i = 0; i < row_bytes() / 4; ++i) out[i * to.width] = 0;
      return;
    }
    if (a.x_type == DType::bf16)
      return prepare_blocks<F, Dot>(static_cast<const uint16_t*>(a.x) + row * a.x_stride, a.k, out,
                                    to.width);
    if constexpr (Dot::columns == 1)
      prepare_blocks<F, Dot>(static_cast<const float*>(a.x) + row * a.x_stride, a.k, out, to.width);
  }
  template <int MR, int NP>
  void tile(int64_t panel, const char* x, int64_t width, bool first, float* sums) const {
    block_tile<F, Dot, MR, NP>(this->data(panel), this->scales(panel), this->blocks,
                               first ? prefetch_distance(this->blocks * block_bytes<F>) : 0,
                               reinterpret_cast<const uint32_t*>(x), width, sums);
  }
};

template <class D>
struct DenseProduct : DenseRows<D> {
  const void* data;
  explicit DenseProduct(const QuantMatmulArgs& a)
      : DenseRows<D>{a.x, a.x_type, a.m, a.k, a.x_stride}, data(a.data) {}
  void begin_strip(int64_t, int64_t) const {}
  void prefetch_panel(int64_t panel) const {
    const int64_t bytes = this->words() * kPanelRows * 4;
    prefetch_range(static_cast<const char*>(data) + panel * bytes, bytes);
  }
  template <int MR, int NP>
  void tile(int64_t panel, const char* x, int64_t width, bool first, float* sums) const {
    const int64_t words = this->words();
    dense_tile<D, MR, NP>(static_cast<const uint32_t*>(data) + panel * words * kPanelRows, words,
                          first ? prefetch_distance(words * kPanelRows * 4) : 0,
                          reinterpret_cast<const uint32_t*>(x), width, sums);
  }
};

template <class F>
void quantized(const QuantMatmulArgs& a, const Team& team) {
  if (a.activation == Activation::int8)
    return product(Int8Product<F>(a), a.out, a.m, a.scratch, team);
  if constexpr (kHaveBf16Dot)
    if (a.activation == Activation::bf16)
      return product(FloatProduct<F, PairDot>(a), a.out, a.m, a.scratch, team);
  product(FloatProduct<F, FloatDot>(a), a.out, a.m, a.scratch, team);
}

}  // namespace

void quant_matmul(const QuantMatmulArgs& a, const Team& team) {
  switch (a.format) {
    case Format::q4_0: return quantized<Q4_0>(a, team);
    case Format::q4_1: return quantized<Q4_1>(a, team);
    case Format::q8_0: return quantized<Q8_0>(a, team);
    case Format::bf16: return product(DenseProduct<Bf16Dense>(a), a.out, a.m, a.scratch, team);
    case Format::f32: return product(DenseProduct<Float32>(a), a.out, a.m, a.scratch, team);
    default: return;
  }
}

}  // namespace fastllm::FASTLLM_ISA
