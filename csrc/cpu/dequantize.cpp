// The values of a packed weight, in rows: each panel is decoded 16 columns at a time with a row in
// each lane, scaled, and transposed. Bound by the bytes of the result.
#include "cpu/integers.h"
#include "cpu/quant_codes.h"
#include "cpu/transpose.h"
#include "ops_quantize.h"

namespace fastllm::FASTLLM_ISA {
namespace {

constexpr int kColumns = 16;

// Columns of 16 rows, column after column, into rows of y; the first `count` rows exist.
template <class Y>
FASTLLM_INLINE void store_rows(float* columns, Y* y, int64_t stride, int64_t count) {
#if defined(__AVX512F__)
  vi r[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = vloadi(columns + i * kPanelRows);
  transpose_16x16(r);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    if (i < count) store(y + i * stride, vbits(r[i]));
#else
  alignas(64) float rows[kPanelRows * kColumns];
  for (int c = 0; c < kColumns; c += 4)
    for (int i = 0; i < kPanelRows; i += 4) {
      const float* from = columns + c * kPanelRows + i;
      __m128 a = _mm_load_ps(from), b = _mm_load_ps(from + kPanelRows),
             d = _mm_load_ps(from + 2 * kPanelRows), e = _mm_load_ps(from + 3 * kPanelRows);
      _MM_TRANSPOSE4_PS(a, b, d, e);
      float* to = rows + i * kColumns + c;
      _mm_store_ps(to, a);
      _mm_store_ps(to + kColumns, b);
      _mm_store_ps(to + 2 * kColumns, d);
      _mm_store_ps(to + 3 * kColumns, e);
    }
  for (int64_t i = 0; i < count; ++i)
    for (int c = 0; c < kColumns; c += VL)
      store(y + i * stride + c, vload(rows + i * kColumns + c));
#endif
}

template <class F, class Y>
void one_panel(const DequantizeArgs& a, F format, int64_t panel, Y* y) {
  constexpr int64_t block_bytes = F::block_bytes;
  const uint8_t* data = static_cast<const uint8_t*>(a.data) + panel * (a.k / kBlock) * block_bytes;
  const uint8_t* scales =
      static_cast<const uint8_t*>(a.scales) + panel * kPanelRows * row_scale_bytes(a.format, a.k);
  const int64_t count = smaller(kPanelRows, a.n - panel * kPanelRows);
  y += panel * kPanelRows * a.k;
  for (int64_t column = 0; column < a.k; column += kColumns) {
    alignas(64) float columns[kColumns * kPanelRows];
    for (int v = 0; v < NV; ++v) {
      vf code[kColumns];
      decode_half<typename F::Codes>(data + column / kBlock * block_bytes, column / kColumns % 2, v,
                                     code);
      const vf d = format.d(scales, a.k, column, v), m = format.minimum(scales, a.k, column, v);
#pragma GCC unroll 16
      for (int c = 0; c < kColumns; ++c) {
        const vf value = code[c] * d;
        vstore(columns + c * kPanelRows + v * VL, F::Scales::has_minimum ? value + m : value);
      }
    }
    store_rows(columns, y + column, a.k, count);
  }
}

}  // namespace

void dequantize(const DequantizeArgs& a, const Team& team) {
  int64_t begin, end;
  my_share(team, divide_up(a.n, kPanelRows), 1, &begin, &end);
  dispatch_stored_float(a.type, [&](auto type) {
    auto* y = static_cast<decltype(type)*>(a.y);
    with_format(a.format, [&](auto format) {
      for (int64_t panel = begin; panel < end; ++panel) one_panel(a, format, panel, y);
    });
  });
}

}  // namespace fastllm::FASTLLM_ISA
