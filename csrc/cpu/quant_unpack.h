// Packed codes and scales to the canonical form of a segment.
#pragma once
#include "cpu/quant_codes.h"
#include "cpu/quant_kernels.h"

namespace fastllm::FASTLLM_ISA {
namespace {

#if defined(__AVX512VNNI__)
constexpr bool kUnsignedDots = true;  // vpdpbusd wants unsigned codes: signed ones are shifted
#else
constexpr bool kUnsignedDots = false;
#endif

// What is added to codes so that the dot product can take them as unsigned.
template <class C>
constexpr int32_t int8_offset_of() {
  return C::is_signed ? (kUnsignedDots ? 128 : 0) : C::offset;
}

struct Int8Words {
  static constexpr int columns = 4;
  template <class C>
  FASTLLM_INLINE void store(vi raw, int v, int64_t, uint8_t* to) {
    vi codes = int8_codes<C>(raw);
    if (C::is_signed && kUnsignedDots) codes = codes ^ static_cast<int32_t>(0x80808080);
    __builtin_memcpy(to + v * VL * 4, &codes, sizeof codes);
  }
};
struct FloatWordsOf {
  static constexpr int columns = 1;
  template <class C>
  FASTLLM_INLINE void store(vi raw, int v, int64_t stride, uint8_t* to) {
    vf values[4];
    decode_floats<C>(raw, values);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      __builtin_memcpy(to + j * stride + v * VL * 4, &values[j], sizeof values[j]);
  }
};
#if defined(__AVX512BF16__)
struct PairWordsOf {
  static constexpr int columns = 2;
  template <class C>
  FASTLLM_INLINE void store(vi raw, int, int64_t stride, uint8_t* to) {
    vi pairs[2];
    decode_pairs<C>(raw, pairs);
    __builtin_memcpy(to, &pairs[0], sizeof pairs[0]);
    __builtin_memcpy(to + stride, &pairs[1], sizeof pairs[1]);
  }
};
#endif

// Lines `ahead` bytes on are prefetched to the L2 cache.
template <class C, class Words>
void unpack_codes(const uint8_t* from, int64_t columns, int64_t ahead, int panels, uint8_t* to) {
  constexpr int64_t size = C::words * 4 * kPanelRows;
  const int64_t stride = panels * 4 * kPanelRows, step = 4 / Words::columns * stride;
  for (int64_t c = 0; c < columns; c += kBlock, from += size) {
    prefetch_lines<size / 64>(from + ahead);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i, to += step)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v)
          Words::template store<C>(C::raw(from, v, i, half), v, stride, to);
  }
}

template <class S>
void unpack_scales(const QuantKernel& kernel, const uint8_t* from, int64_t column, int64_t columns,
                   int panels, float* to) {
  const bool halves = kernel.sums == Sums::halves;
  for (int64_t c = column; c < column + columns; c += kernel.chunk) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      float* out = to + v * VL;
      if constexpr (S::integer_scales) {
        if (halves) {
          vstore(out, S::d_super(from, c, v));
          vstore(out + kPanelRows, vbits(S::factor(from, c, v)));
          vstore(out + 2 * kPanelRows, vbits(S::factor(from, c + 16, v)));
          continue;
        }
      }
      vstore(out, S::d(from, kernel.k, c, kernel.shift, v) * kernel.factor);
      if constexpr (S::has_minimum)
        vstore(out + kPanelRows, S::minimum(from, kernel.k, c, kernel.shift, v));
    }
    to += panels * kPanelScales;
  }
}

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
