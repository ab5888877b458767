// The largest of a short list, one after the other, on integers that order like floats: a list in
// L1 is read once a pick.
#pragma once
#include "cpu/integers.h"
#include "cpu/select.h"

namespace fastllm::FASTLLM_ISA {
namespace {

constexpr int32_t kRemoved = INT32_MIN;  // below the order of every float, -inf included

FASTLLM_INLINE vi vload_keys(const int32_t* p) {
  vi v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
FASTLLM_INLINE void vstore_keys(int32_t* p, vi v) { __builtin_memcpy(p, &v, sizeof v); }
FASTLLM_INLINE vi vlanes() {
  vi v;
  for (int i = 0; i < VL; ++i) v[i] = i;
  return v;
}
// Not with ?:, which GCC 12 turns into a comparison and a blend of twice the latency.
FASTLLM_INLINE vi vmax(vi a, vi b) {
#if defined(__AVX512F__)
  return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
  return (vi)_mm_max_epi32((__m128i)a, (__m128i)b);
#endif
}
FASTLLM_INLINE vi vmin(vi a, vi b) { return ~vmax(~a, ~b); }
FASTLLM_INLINE int32_t vhmax(vi v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32((__m512i)v);
#else
  int32_t best = v[0];
  for (int i = 1; i < VL; ++i) best = v[i] > best ? v[i] : best;
  return best;
#endif
}
FASTLLM_INLINE int32_t vhmin(vi v) { return ~vhmax(~v); }

// order_of (select.h) for a vector; both zeros have the order of +0.
FASTLLM_INLINE vi vorder(vf x) {
  const vi bits = vbits(x + 0.f);
  return bits ^ ((bits >> 31) & vseti(0x7fffffff));
}

// Takes the largest key off the list (n a multiple of VL) and returns its place, the first of equals.
// Two passes, for the value and for the place: one that carries both along waits for a comparison
// and a blend at each step (61 ns a pick of 256 keys where two take 40).
static inline int32_t take_largest(int32_t* keys, int64_t n) {
  vi even = vload_keys(keys), odd = even;
  int64_t c = VL;
  for (; c + 2 * VL <= n; c += 2 * VL) {
    even = vmax(even, vload_keys(keys + c));
    odd = vmax(odd, vload_keys(keys + c + VL));
  }
  if (c < n) even = vmax(even, vload_keys(keys + c));
  const vi top = vseti(vhmax(vmax(even, odd)));
  vi place = vseti(INT32_MIN), here = ~vlanes();  // of ~place, the largest is the first
  for (c = 0; c < n; c += VL, here -= VL)
    place = vmax(place, vload_keys(keys + c) == top ? here : vseti(INT32_MIN));
  const int32_t found = ~vhmax(place);
  keys[found] = kRemoved;
  return found;
}

struct TwoKeys {
  int32_t first, second;
};

// The two largest of n keys (any n: up to VL - 1 keys behind them are read, not used).
static inline TwoKeys two_largest(const int32_t* keys, int64_t n) {
  const vi lanes = vlanes();
  vi first = vseti(kRemoved), second = first;
  for (int64_t c = 0; c < n; c += VL) {
    const vi key = lanes < vseti(static_cast<int32_t>(smaller(n - c, VL))) ? vload_keys(keys + c)
                                                                           : vseti(kRemoved);
    second = vmax(second, vmin(first, key));
    first = vmax(first, key);
  }
  const int32_t top = vhmax(first);
  const int32_t lane = vhmin(first == vseti(top) ? lanes : vseti(INT32_MAX));
  return {top, vhmax(lanes == vseti(lane) ? second : first)};
}

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
