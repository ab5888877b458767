// Integer dots of int8 activations and byte codes, exact in int32.
#pragma once
#include "cpu/packed.h"

namespace fastllm::FASTLLM_ISA {

// Where signed codes are not shifted to unsigned ones for the dot product (vpdpbusd), the sign is
// moved from the weight to the activation (vpmaddubsw: |w| * x stays below 2^15, so nothing
// saturates).

// acc + sum of 4 products in every lane; w unsigned (at most 15 without VNNI), x signed.
FASTLLM_INLINE vi dot_unsigned(vi acc, vi w, vi x) {
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#elif defined(__AVX512BW__)
  const __m512i pairs = _mm512_maddubs_epi16((__m512i)w, (__m512i)x);
  return acc + (vi)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)w, (__m256i)x);
  return acc + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  const __m128i pairs = _mm_maddubs_epi16((__m128i)w, (__m128i)x);
  return acc + (vi)_mm_madd_epi16(pairs, _mm_set1_epi16(1));
#endif
}
FASTLLM_INLINE vi dot_signed(vi acc, vi w, vi x) {
#if defined(__AVX512VNNI__)
  return dot_unsigned(acc, w ^ static_cast<int32_t>(0x80808080), x);
#elif defined(__AVX2__)
  return dot_unsigned(acc, (vi)_mm256_abs_epi8((__m256i)w),
                      (vi)_mm256_sign_epi8((__m256i)x, (__m256i)w));
#else
  return dot_unsigned(acc, (vi)_mm_abs_epi8((__m128i)w), (vi)_mm_sign_epi8((__m128i)x, (__m128i)w));
#endif
}

}  // namespace fastllm::FASTLLM_ISA
