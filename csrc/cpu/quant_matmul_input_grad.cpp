// dx = dy @ W for a packed W: the product sums over the rows of W, which the panels of W interleave.
// A strip of 32 columns (a block of every row) is dequantized and transposed into panels in this
// thread's scratch, where it meets many rows of dy; the tiles are those of linear. 16 rows x 32
// columns take about 250 instructions, the products of one block of 168 rows 2,700.
#include <type_traits>

#include "cpu/matmul_dense.h"
#include "cpu/transpose.h"
#include "ops_core.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// 16 columns (half `half` of a block) of 16 rows as they are worth: out[c] has a lane a row.
template <class F>
FASTLLM_INLINE void decode_columns(const uint8_t* data, const uint16_t* scales, int half,
                                   vf (*out)[NV]) {
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    const vf d = vload_f16(scales + v * VL);
    vf minimum = vf{};
    if constexpr (F::scales == 2) minimum = vload_f16(scales + kPanelRows + v * VL);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int word = F::nibbles ? i : 4 * half + i;
      vi codes[4];
      decode_word<F, FloatDot>(vloadi(data + word * 4 * kPanelRows + v * VL * 4),
                               F::nibbles ? half : 0, codes);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        out[4 * i + j][v] = vbits(codes[j]) * d;
        if constexpr (F::scales == 2) out[4 * i + j][v] = out[4 * i + j][v] + minimum;
      }
    }
  }
}

// The 16 rows as words of `Words` panels of 16 columns: pairs of rows rounded to bf16, or floats.
// Words from `live` on belong to rows that do not exist.
struct PairWords {
  static constexpr int count = kPanelRows / 2;

#if defined(__AVX512F__)
  FASTLLM_INLINE vi pairs(vf low, vf high) {  // columns of 8 words side by side
#if defined(__AVX512BF16__)
    return (vi)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
#else
    const __m256i a = _mm512_cvtepi32_epi16((__m512i)vround_bf16_bits(low));
    const __m256i b = _mm512_cvtepi32_epi16((__m512i)vround_bf16_bits(high));
    return (vi)_mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
#endif
  }
  FASTLLM_INLINE void store(const vf (*first)[NV], const vf (*second)[NV], int64_t live,
                            uint32_t* panel, uint32_t* next) {
    vi r[16];
#pragma GCC unroll 16
    for (int c = 0; c < 16; ++c) r[c] = pairs(first[c][0], second[c][0]);
    transpose_16x16(r);
#pragma GCC unroll 8
    for (int w = 0; w < count; ++w)
      if (w < live) {
        __builtin_memcpy(panel + w * kPanelRows, &r[w], 64);
        if (next) __builtin_memcpy(next + w * kPanelRows, &r[count + w], 64);
      }
  }
#else
  FASTLLM_INLINE void store(const vf (*columns)[NV], int64_t live, uint32_t* panel) {
    for (int c = 0; c < kPanelRows; ++c) {
      uint16_t rows[kPanelRows];
      for (int v = 0; v < NV; ++v) vstore_bf16(rows + v * VL, columns[c][v]);
      for (int w = 0; w < count && w < live; ++w)
        __builtin_memcpy(panel + w * kPanelRows + c, rows + 2 * w, 4);
    }
  }
#endif
};

struct FloatWords {
  static constexpr int count = kPanelRows;

  FASTLLM_INLINE void store(const vf (*columns)[NV], int64_t live, uint32_t* panel) {
#if defined(__AVX512F__)
    vi r[16];
#pragma GCC unroll 16
    for (int c = 0; c < 16; ++c) r[c] = vbits(columns[c][0]);
    transpose_16x16(r);
#pragma GCC unroll 16
    for (int w = 0; w < count; ++w)
      if (w < live) __builtin_memcpy(panel + w * kPanelRows, &r[w], 64);
#else
    for (int c = 0; c < kPanelRows; ++c) {
      float rows[kPanelRows];
      for (int v = 0; v < NV; ++v) vstore(rows + v * VL, columns[c][v]);
      for (int w = 0; w < count && w < live; ++w)
        __builtin_memcpy(panel + w * kPanelRows + c, rows + w, 4);
    }
#endif
  }
#if defined(__AVX512F__)
  FASTLLM_INLINE void store(const vf (*first)[NV], const vf (*second)[NV], int64_t live,
                            uint32_t* panel, uint32_t* next) {
    store(first, live, panel);
    if (next) store(second, live, next);
  }
#endif
};

template <class F, class D>
struct InputGradProduct : DenseRows<D> {
  // Rows of dy that a dequantized strip meets: all of a training batch's, which then stream from the
  // L3 cache. With blocks of 512 KB, as in linear, 1024 x 1536 x 576 takes 4.5 ms, not 4.0.
  static constexpr int64_t row_block = 8 << 20;
  using Words = std::conditional_t<D::columns == 2, PairWords, FloatWords>;
  const QuantMatmulInputGradArgs& a;
  uint32_t* panels;
  explicit InputGradProduct(const QuantMatmulInputGradArgs& args)
      : DenseRows<D>{args.dy, args.type, args.m, args.n, args.dy_stride},
        a(args),
        panels(static_cast<uint32_t*>(thread_scratch(
            Scratch::panels, this->words() * kPanelRows * DenseRows<D>::strip * 4))) {}

  void prefetch_panel(int64_t) const {}
  void begin_strip(int64_t panel, int64_t count) const {
    const int64_t blocks = a.out.n / kBlock, groups = (a.n + kPanelRows - 1) / kPanelRows;
    const int64_t words = this->words();
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t block = g * blocks + panel / 2;
      const uint8_t* data = static_cast<const uint8_t*>(a.data) + block * block_bytes<F>;
      const uint16_t* scales = a.scales + block * block_scales<F>;
      const int64_t live = words - g * Words::count;
      uint32_t* to = panels + g * Words::count * kPanelRows;
      vf first[kPanelRows][NV];
      decode_columns<F>(data, scales, panel % 2, first);
#if defined(__AVX512F__)
      vf second[kPanelRows][NV] = {};
      if (count == 2) decode_columns<F>(data, scales, 1, second);
      Words::store(first, second, live, to, count == 2 ? to + words * kPanelRows : nullptr);
#else
      (void)count;
      Words::store(first, live, to);
#endif
    }
  }
  template <int MR, int NP>
  void tile(int64_t, const char* x, int64_t width, bool, float* sums) const {
    dense_tile<D, MR, NP>(panels, this->words(), 0, reinterpret_cast<const uint32_t*>(x), width,
                          sums);
  }
};

template <class F>
void input_grad(const QuantMatmulInputGradArgs& a, const Team& team) {
  if (a.type == DType::bf16)
    product(InputGradProduct<F, Bf16Dense>(a), a.out, a.m, a.scratch, team);
  else
    product(InputGradProduct<F, Float32>(a), a.out, a.m, a.scratch, team);
}

}  // namespace

void quant_matmul_input_grad(const QuantMatmulInputGradArgs& a, const Team& team) {
  switch (a.format) {
    case Format::q4_0: return input_grad<Q4_0>(a, team);
    case Format::q4_1: return input_grad<Q4_1>(a, team);
    case Format::q8_0: return input_grad<Q8_0>(a, team);
    default: return;  // checked before: dense formats are products of torch
  }
}

}  // namespace fastllm::FASTLLM_ISA
