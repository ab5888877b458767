// 16 x 16 transpose of 4-byte words.
#pragma once
#include "cpu/simd.h"

namespace fastllm::FASTLLM_ISA {

#if defined(__AVX512F__)
constexpr int kTransposeRows = 16;

// r[i] becomes column i: three rounds that exchange 4, 8, then 16 and 32 bytes between rows.
FASTLLM_INLINE void transpose_16x16(vi* r) {
  vi t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = (vi)_mm512_unpacklo_epi32((__m512i)r[i], (__m512i)r[i + 1]);
    t[i + 1] = (vi)_mm512_unpackhi_epi32((__m512i)r[i], (__m512i)r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = (vi)_mm512_unpacklo_epi64((__m512i)t[i], (__m512i)t[i + 2]);
    r[i + 1] = (vi)_mm512_unpackhi_epi64((__m512i)t[i], (__m512i)t[i + 2]);
    r[i + 2] = (vi)_mm512_unpacklo_epi64((__m512i)t[i + 1], (__m512i)t[i + 3]);
    r[i + 3] = (vi)_mm512_unpackhi_epi64((__m512i)t[i + 1], (__m512i)t[i + 3]);
  }
  // r[4g + c] now holds, in its four quarters q, column 4q + c of rows 4g .. 4g + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i a = (__m512i)r[c], b = (__m512i)r[4 + c], d = (__m512i)r[8 + c],
                  e = (__m512i)r[12 + c];
    const __m512i ab02 = _mm512_shuffle_i32x4(a, b, 0x88), ab13 = _mm512_shuffle_i32x4(a, b, 0xdd);
    const __m512i de02 = _mm512_shuffle_i32x4(d, e, 0x88), de13 = _mm512_shuffle_i32x4(d, e, 0xdd);
    t[c] = (vi)_mm512_shuffle_i32x4(ab02, de02, 0x88);
    t[8 + c] = (vi)_mm512_shuffle_i32x4(ab02, de02, 0xdd);
    t[4 + c] = (vi)_mm512_shuffle_i32x4(ab13, de13, 0x88);
    t[12 + c] = (vi)_mm512_shuffle_i32x4(ab13, de13, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}
#endif

}  // namespace fastllm::FASTLLM_ISA
