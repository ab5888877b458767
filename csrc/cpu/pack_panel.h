// Packing rows of a dense weight into panels of kPanelRows outputs, word by word: word w of lane i
// is column w of row i (f32), or its columns 2w and 2w + 1 (bf16; a last odd one is half full).
#pragma once
#include "cpu/packed.h"
#include "cpu/transpose.h"

namespace fastllm::FASTLLM_ISA {

// Words [begin, words) of one row into lane r of a panel.
FASTLLM_INLINE void pack_row(const char* row, int64_t row_bytes, int64_t begin, int64_t words,
                             uint32_t* panel) {
  for (int64_t w = begin; w < words; ++w) {
    uint32_t word = 0;
    const int64_t left = row_bytes - 4 * w;
    if (left >= 4)
      __builtin_memcpy(&word, row + 4 * w, 4);
    else
      __builtin_memcpy(&word, row + 4 * w, 2);
    panel[w * kPanelRows] = word;
  }
}

// Four words of four rows, of which the first `live` exist.
FASTLLM_INLINE void pack_4x4(const char* rows, int64_t stride, int64_t live, uint32_t* panel) {
  const auto row = [&](int64_t i) __attribute__((always_inline)) {
    return i < live ? _mm_loadu_ps(reinterpret_cast<const float*>(rows + i * stride))
                    : _mm_setzero_ps();
  };
  __m128 a = row(0), b = row(1), c = row(2), d = row(3);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  float* to = reinterpret_cast<float*>(panel);
  _mm_storeu_ps(to, a);
  _mm_storeu_ps(to + kPanelRows, b);
  _mm_storeu_ps(to + 2 * kPanelRows, c);
  _mm_storeu_ps(to + 3 * kPanelRows, d);
}

#if defined(__AVX512F__)
// Sixteen rows of 8 words, one behind the other: an adapter's factor of rank 16. In 24 shuffles
// where the transpose of rows that are half empty takes 64.
FASTLLM_INLINE void pack_rows_of_8(const char* rows, uint32_t* panel) {
  const __m512i low = _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(4));
  __m512i p[8];  // p[k], p[4 + k]: the first and the last 4 words of rows 4k .. 4k + 3
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const __m512i a = (__m512i)vloadi(rows + 128 * k), b = (__m512i)vloadi(rows + 128 * k + 64);
    p[k] = _mm512_permutex2var_epi32(a, low, b);
    p[4 + k] = _mm512_permutex2var_epi32(a, high, b);
  }
#pragma GCC unroll 2
  for (int h = 0; h < 8; h += 4) {
    const __m512i ab02 = _mm512_shuffle_i32x4(p[h], p[h + 1], 0x88);
    const __m512i ab13 = _mm512_shuffle_i32x4(p[h], p[h + 1], 0xdd);
    const __m512i de02 = _mm512_shuffle_i32x4(p[h + 2], p[h + 3], 0x88);
    const __m512i de13 = _mm512_shuffle_i32x4(p[h + 2], p[h + 3], 0xdd);
    uint32_t* to = panel + h * kPanelRows;
    _mm512_storeu_si512(to, _mm512_shuffle_i32x4(ab02, de02, 0x88));
    _mm512_storeu_si512(to + kPanelRows, _mm512_shuffle_i32x4(ab13, de13, 0x88));
    _mm512_storeu_si512(to + 2 * kPanelRows, _mm512_shuffle_i32x4(ab02, de02, 0xdd));
    _mm512_storeu_si512(to + 3 * kPanelRows, _mm512_shuffle_i32x4(ab13, de13, 0xdd));
  }
}
#endif

[[maybe_unused]] static void pack_panel(const char* rows, int64_t stride, int64_t count,
                                        int64_t row_bytes, int64_t words, uint32_t* panel) {
  int64_t w = 0;
#if defined(__AVX512F__)
  if (row_bytes == 32 && stride == 32 && count == kPanelRows) return pack_rows_of_8(rows, panel);
  for (; w + 16 <= row_bytes / 4; w += 16) {
    vi r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = i < count ? vloadi(rows + i * stride + 4 * w) : vi{};
    transpose_16x16(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) __builtin_memcpy(panel + (w + i) * kPanelRows, &r[i], 64);
  }
  if (const int64_t rest = row_bytes / 4 - w; rest > 0) {  // all there is of a low-rank factor
    const __mmask16 some = static_cast<__mmask16>((1u << rest) - 1);
    vi r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      r[i] = i < count ? (vi)_mm512_maskz_loadu_epi32(some, rows + i * stride + 4 * w) : vi{};
    transpose_16x16(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      if (i < rest) __builtin_memcpy(panel + (w + i) * kPanelRows, &r[i], 64);
    w += rest;
  }
#else
  for (; w + 4 <= row_bytes / 4; w += 4)
    for (int64_t i = 0; i < kPanelRows; i += 4)
      pack_4x4(rows + i * stride + 4 * w, stride, count - i, panel + w * kPanelRows + i);
#endif
  for (int64_t i = 0; i < kPanelRows; ++i) {
    if (i < count)
      pack_row(rows + i * stride, row_bytes, w, words, panel + i);
    else
      for (int64_t j = w; j < words; ++j) panel[j * kPanelRows + i] = 0;
  }
}

// The same panel of a weight that lies transposed: `count` outputs side by side, column after
// column, `stride` elements apart.
FASTLLM_INLINE void pack_columns(const uint32_t* columns, int64_t stride, int64_t count, int64_t k,
                                 uint32_t* panel) {
  for (int64_t c = 0; c < k; ++c) {
    uint32_t* to = panel + c * kPanelRows;
    for (int64_t i = 0; i < kPanelRows; ++i) to[i] = i < count ? columns[c * stride + i] : 0;
  }
}
FASTLLM_INLINE void pack_columns(const uint16_t* columns, int64_t stride, int64_t count, int64_t k,
                                 uint32_t* panel) {
  const bool whole = count >= kPanelRows;
  for (int64_t c = 0; c < k; c += 2) {
    const uint16_t *low = columns + c * stride, *high = low + stride;
    uint32_t* to = panel + c / 2 * kPanelRows;
    if (whole && c + 1 < k) {
      for (int i = 0; i < kPanelRows; ++i) to[i] = low[i] | static_cast<uint32_t>(high[i]) << 16;
    } else {
      for (int i = 0; i < kPanelRows; ++i) {
        to[i] = i < count ? low[i] : 0;
        if (i < count && c + 1 < k) to[i] |= static_cast<uint32_t>(high[i]) << 16;
      }
    }
  }
}

}  // namespace fastllm::FASTLLM_ISA
