// Products with fp32 sums: bf16 pairs by vdpbf16ps, everything else by fp32 FMA. A row of x is
// prepared as words of 4 bytes, one a step: a float, or a pair of bf16. Here are the steps, and tiles
// of dense weights: one accumulator an output over a chunk of K, chunks added up in ascending order.
#pragma once
#include "cpu/packed.h"

namespace fastllm::FASTLLM_ISA {

// How x and the decoded weights meet: the columns of a step, and acc + w * x.
struct PairDot {
  static constexpr int columns = 2;
  FASTLLM_INLINE vf dot(vf acc, vi w, vi x) {
#if defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x);
#else
    (void)w, (void)x;
    return acc;
#endif
  }
};
struct FloatDot {
  static constexpr int columns = 1;
  FASTLLM_INLINE vf dot(vf acc, vi w, vi x) { return vfma_once(vbits(w), vbits(x), acc); }
};

FASTLLM_INLINE uint32_t word_of(float v) { return __builtin_bit_cast(uint32_t, v); }

// Dense panels: `words` words of 4 bytes a row, each one float or a pair of bf16. Bf16Float: pairs
// of bf16 multiplied in fp32, the even column first. chunk: the words of one chain of sums.
struct Bf16Pair {
  using Dot = PairDot;
  static constexpr int steps = 1, columns = 2, chunk = 128;
  FASTLLM_INLINE vi weight(vi word, int) { return word; }
};
struct Bf16Float {
  using Dot = FloatDot;
  static constexpr int steps = 2, columns = 2, chunk = 128;
  FASTLLM_INLINE vi weight(vi word, int step) {
    return step ? word & static_cast<int32_t>(0xffff0000) : word << 16;
  }
};
struct Float32 {
  using Dot = FloatDot;
  static constexpr int steps = 1, columns = 1, chunk = 32;
  FASTLLM_INLINE vi weight(vi word, int) { return word; }
};

// Sums of 256 bf16 or 32 fp32 columns are added up in ascending order: a long row is summed more
// exactly than by one chain, and the same for any number of rows. The peer of one fp32 row is a
// product of a vector, summed in 16 lanes and more: its 128 columns err by 0.5e-5 (unit normal
// numbers), as chains of 32 do; chains of 64 err by 0.8e-5 and of 128 by 1.3e-5.
template <class D, int MR, int NP>
static __attribute__((noinline)) void dense_tile(const uint32_t* data, int64_t words, int64_t ahead,
                                                 const uint32_t* x, int64_t width, float* out) {
  constexpr int V = NP * NV;
  const uint32_t* panel = data;
  for (int64_t begin = 0; begin == 0 || begin < words; begin += D::chunk) {
    const int64_t end = begin + D::chunk < words ? begin + D::chunk : words;
    vf acc[MR][V];
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[m][v] = vf{};
    for (int64_t k = begin; k < end; ++k, panel += kPanelRows) {
      if (ahead)
#pragma GCC unroll 4
        for (int p = 0; p < NP; ++p)
          stream_lines<1>(reinterpret_cast<const char*>(panel + p * words * kPanelRows) + ahead);
      vi w[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) w[v] = vloadi(panel + v / NV * words * kPanelRows + v % NV * VL);
#pragma GCC unroll 2
      for (int s = 0; s < D::steps; ++s, x += width)
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) {
          const vi xm = splat_word(x + m);
#pragma GCC unroll 16
          for (int v = 0; v < V; ++v) acc[m][v] = D::Dot::dot(acc[m][v], D::weight(w[v], s), xm);
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        float* sums = out + m * NP * kPanelRows + v * VL;
        vstore(sums, begin ? vload(sums) + acc[m][v] : acc[m][v]);
      }
  }
}

// A row of x for a dense weight: its words, `width` apart, an odd last column completed with zero.
template <class D, class X>
static void prepare_dense(const X* x, int64_t n, uint32_t* out, int64_t width) {
  if constexpr (D::Dot::columns == 2) {
    int64_t c = 0;
    for (; c + 2 <= n; c += 2, out += width) __builtin_memcpy(out, x + c, 4);
    if (c < n) *out = static_cast<uint32_t>(x[c]);
  } else {
    int64_t c = 0;
    for (; c < n; ++c, out += width) *out = word_of(load1(x + c));
    if (D::columns == 2 && n % 2) *out = 0;
  }
}

}  // namespace fastllm::FASTLLM_ISA
