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
FASTLLM_INLINE vi vmax(vi a, vi b) { return a > b ? a : b; }
FASTLLM_INLINE vi vmin(vi a, vi b) { return a < b ? a : b; }
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
static inline int32_t take_largest(int32_t* keys, int64_t n) {
  vi best = vload_keys(keys), place = vlanes();
  vi here = place;
  for (int64_t c = VL; c < n; c += VL) {
    const vi key = vload_keys(keys + c);
    here = here + VL;
    const vi better = key > best;
    best = better ? key : best;
    place = better ? here : place;
  }
  const int32_t found = vhmin(best == vseti(vhmax(best)) ? place : vseti(INT32_MAX));
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
