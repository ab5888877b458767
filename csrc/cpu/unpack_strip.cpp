// A strip of 32 columns (a block of every row) is dequantized and transposed; 16 rows x 32 columns
// take about 250 instructions, the products of one block of 168 rows 2,700.
#include "cpu/unpack_strip.h"

#include <type_traits>

#include "cpu/matmul_dense.h"
#include "cpu/quant_codes.h"
#include "cpu/transpose.h"

namespace fastllm::FASTLLM_ISA {
namespace {

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

// 16 columns of panel `panel` of the 16 rows of a group, a lane a row; columns that do not exist are
// zero.
struct Bf16Columns {
  FASTLLM_INLINE void read(const PackedMatrix& w, int64_t group, int64_t panel, vf (*out)[NV]) {
    const int64_t words = (w.k + 1) / 2;
    const uint8_t* from = w.data + group * words * kPanelRows * 4;
    for (int64_t i = 0; i < kPanelRows / 2; ++i) {
      const int64_t word = panel * (kPanelRows / 2) + i;
      for (int v = 0; v < NV; ++v) {
        const vi pair = word < words ? vloadi(from + (word * kPanelRows + v * VL) * 4) : vi{};
        out[2 * i][v] = vbits(pair << 16);
        out[2 * i + 1][v] = vbits(pair & static_cast<int32_t>(0xffff0000));
      }
    }
  }
};
struct FloatColumns {
  FASTLLM_INLINE void read(const PackedMatrix& w, int64_t group, int64_t panel, vf (*out)[NV]) {
    const uint8_t* from = w.data + group * w.k * kPanelRows * 4;
    for (int64_t i = 0; i < kPanelRows; ++i) {
      const int64_t column = panel * kPanelRows + i;
      for (int v = 0; v < NV; ++v)
        out[i][v] = column < w.k ? vbits(vloadi(from + (column * kPanelRows + v * VL) * 4)) : vf{};
    }
  }
};
template <class F>
struct QuantizedColumns {
  const F format;
  const int64_t scale_bytes;  // of a panel

  __attribute__((always_inline)) void read(const PackedMatrix& w, int64_t group, int64_t panel,
                                           vf (*out)[NV]) const {
    const int64_t block = group * (w.k / kBlock) + panel / 2;
    const uint8_t* scales = w.scales + group * scale_bytes;
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      vf values[16];
      decode_half<typename F::Codes>(w.data + block * F::block_bytes, static_cast<int>(panel % 2),
                                     v, values);
      const vf d = format.d(scales, w.k, panel * 16, v);
      const vf minimum = format.minimum(scales, w.k, panel * 16, v);
#pragma GCC unroll 16
      for (int c = 0; c < 16; ++c) {
        out[c][v] = values[c] * d;
        if constexpr (F::Scales::has_minimum) out[c][v] = out[c][v] + minimum;
      }
    }
  }
};

template <class D, class Columns>
void unpack(const Columns& columns, const PackedMatrix& w, int64_t panel, int count,
            uint32_t* panels) {
  using Words = std::conditional_t<D::columns == 2, PairWords, FloatWords>;
  const int64_t groups = (w.n + kPanelRows - 1) / kPanelRows;
  const int64_t words = (w.n + D::columns - 1) / D::columns;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t live = words - g * Words::count;
    uint32_t* to = panels + g * Words::count * kPanelRows;
    vf first[kPanelRows][NV];
    columns.read(w, g, panel, first);
#if defined(__AVX512F__)
    vf second[kPanelRows][NV] = {};
    if (count == 2) columns.read(w, g, panel + 1, second);
    Words::store(first, second, live, to, count == 2 ? to + words * kPanelRows : nullptr);
#else
    (void)count;
    Words::store(first, live, to);
#endif
  }
}

template <class D>
void unpack_as(const PackedMatrix& w, int64_t panel, int count, uint32_t* panels) {
  if (w.format == Format::bf16) return unpack<D>(Bf16Columns{}, w, panel, count, panels);
  if (w.format == Format::f32) return unpack<D>(FloatColumns{}, w, panel, count, panels);
  const int64_t scale_bytes = row_scale_bytes(w.format, w.k) * kPanelRows;
  with_format(w.format, [&](auto format) {
    unpack<D>(QuantizedColumns<decltype(format)>{format, scale_bytes}, w, panel, count, panels);
  });
}

}  // namespace

void unpack_strip(DType type, const PackedMatrix& w, int64_t panel, int count, uint32_t* panels) {
  if (type == DType::bf16)
    unpack_as<Bf16Dense>(w, panel, count, panels);
  else
    unpack_as<Float32>(w, panel, count, panels);
}

}  // namespace fastllm::FASTLLM_ISA
