// int8 codes as words of bf16, which is exact, by tables of bytes.
#pragma once
#include "cpu/simd.h"

namespace fastllm::FASTLLM_ISA {
namespace {

#if defined(__AVX512BF16__)
// The two bytes of bf16(0) to bf16(127).
struct MagnitudeBytes {
  alignas(64) uint8_t high[128] = {}, low[128] = {};
  constexpr MagnitudeBytes() {
    for (int i = 1; i < 128; ++i) {
      const auto bits = __builtin_bit_cast(uint32_t, static_cast<float>(i));
      high[i] = static_cast<uint8_t>(bits >> 24);
      low[i] = static_cast<uint8_t>(bits >> 16);
    }
  }
};
constexpr MagnitudeBytes kMagnitudeBytes;

// 64 codes as words of bf16: those of the lower and those of the upper half of each 128 bits.
struct Words {
  vi lower, upper;
};
FASTLLM_INLINE __m512i look_up(const uint8_t (&table)[128], __m512i at) {
  return _mm512_permutex2var_epi8(_mm512_load_si512(table), at, _mm512_load_si512(table + 64));
}
// The bytes of a word are looked up by the magnitude of its code, the sign joins the high one. The
// magnitude of -128 has the place of 0 in the tables: Lowest mends that with two instructions;
// without it, `seen` collects the bit that tells them apart, and what has met it is done again. The
// magnitude is a subtraction and a minimum, which all four pipes of Zen 4 run: vpabsb and whatever
// makes a mask share the two pipes of the dot products.
template <bool Lowest>
FASTLLM_INLINE Words signed_words(__m512i codes, __m512i& seen) {
  const __m512i magnitude = _mm512_min_epu8(codes, _mm512_sub_epi8(_mm512_setzero_si512(), codes));
  __m512i high = look_up(kMagnitudeBytes.high, magnitude);
  if constexpr (Lowest)  // the high byte of 128 is 0x43; less is less than what was found
    high = _mm512_max_epu8(high, _mm512_subs_epu8(magnitude, _mm512_set1_epi8(128 - 0x43)));
  else
    seen = _mm512_or_si512(seen, magnitude);
  const __m512i low = look_up(kMagnitudeBytes.low, magnitude);
  high = _mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8(-128), 0xf8);  // a | (b & c)
  return {(vi)_mm512_unpacklo_epi8(low, high), (vi)_mm512_unpackhi_epi8(low, high)};
}
FASTLLM_INLINE bool has_lowest(__m512i seen) {
  return __builtin_expect(_mm512_movepi8_mask(seen) != 0, false);
}
#endif

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
