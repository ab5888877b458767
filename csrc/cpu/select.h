// Thresholds without sorting: the k-th largest value, and the value at which a sum of weights is
// reached, by bisection over the ordered bits of floats (at most 32 passes over a short list).
#pragma once
#include "cpu/lse.h"

namespace fastllm::FASTLLM_ISA {

FASTLLM_INLINE bool vany(vi mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  return _mm_movemask_ps((__m128)mask) != 0;
#endif
}

// An integer that orders like the float (-0 just below +0).
FASTLLM_INLINE int64_t order_of(float x) {
  const int32_t bits = __builtin_bit_cast(int32_t, x);
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}
FASTLLM_INLINE float of_order(int64_t order) {
  const int32_t bits = static_cast<int32_t>(order);
  return __builtin_bit_cast(float, bits < 0 ? bits ^ 0x7fffffff : bits);
}

// The largest float in [low, high] for which reached(x) holds; low must, and reached must be
// monotone.
template <class Reached>
FASTLLM_INLINE float last_reached(float low, float high, Reached reached) {
  int64_t yes = order_of(low), no = order_of(high) + 1;
  while (no - yes > 1) {
    const int64_t middle = yes + (no - yes) / 2;
    if (reached(of_order(middle)))
      yes = middle;
    else
      no = middle;
  }
  return of_order(yes);
}

// A list is n floats, padded with -inf to a multiple of VL.
FASTLLM_INLINE void pad_list(float* list, int64_t n) {
  for (int i = 0; i < VL; ++i) list[n + i] = -__builtin_inff();
}

// The k-th largest of a list, or low if fewer than k values are above it.
static inline float kth_largest(const float* list, int64_t n, int64_t k, float low, float high) {
  return last_reached(low, high, [&](float x) {
    vi count = vseti(0);
    for (int64_t i = 0; i < n; i += VL) count -= vload(list + i) >= vset(x);
    int64_t total = 0;
    for (int i = 0; i < VL; ++i) total += count[i];
    return total >= k;
  });
}

// Sum of weights where list >= x: fp32 inside chunks of 512, double across, always in list order.
static inline double mass_above(const float* list, const float* weight, int64_t n, float x) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += 512) {
    const int64_t end = n - begin < 512 ? n : begin + 512;
    vf sum = vset(0.f);
    for (int64_t i = begin; i < end; i += VL)
      sum += vload(list + i) >= vset(x) ? vload(weight + i) : vset(0.f);
    total += vsum(sum);
  }
  return total;
}

// Appends the values of x[n] (n a multiple of VL) that are >= low, in order; returns the new
// length. Writes up to VL floats past it.
static inline int64_t append_above(float* list, int64_t length, const float* x, int64_t n,
                                   float low) {
  for (int64_t c = 0; c < n; c += VL) {
    const vf v = vload(x + c);
#if defined(__AVX512F__)
    const __mmask16 keep = _mm512_cmp_ps_mask((__m512)v, (__m512)vset(low), _CMP_GE_OQ);
    // Compressing in a register and storing it whole: the storing form is microcoded on some cores.
    vstore(list + length, (vf)_mm512_maskz_compress_ps(keep, (__m512)v));
    length += __builtin_popcount(keep);
#else
    if (!vany(v >= vset(low))) continue;
    for (int i = 0; i < VL; ++i)
      if (v[i] >= low) list[length++] = v[i];
#endif
  }
  return length;
}

}  // namespace fastllm::FASTLLM_ISA
