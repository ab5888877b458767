// Products with fp32 sums: bf16 pairs by vdpbf16ps, everything else by fp32 FMA. A row of x is
// prepared as words of 4 bytes, one a step: a float, or a pair of bf16. Weights are decoded in
// registers, two ways:
//   dense:     one accumulator an output over a chunk of K, chunks added up in ascending order
//   quantized: a fresh sum of x times unscaled codes a block, then an FMA with the scale (and one
//     with the minimum).
// The codes are exact in bf16 and fp32, so no dequantized weight is ever rounded.
#pragma once
#include "cpu/packed.h"

namespace fastllm::FASTLLM_ISA {

#if defined(__AVX512BF16__)
constexpr bool kHaveBf16Dot = true;
#else
constexpr bool kHaveBf16Dot = false;
#endif

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

// The word of 4 codes at column 4i (of the low or high half of a 4-bit block) as weights of 4 /
// columns steps. A 4-bit pair is (4i + s, 4i + s + 2), which shifts bring to the low bits of both
// halves of a lane.
template <class F, class Dot>
FASTLLM_INLINE void decode_word(vi word, int half, vi* out) {
  if constexpr (Dot::columns == 2) {
#if defined(__AVX512BF16__)
    if constexpr (F::nibbles) {
      // vpermw looks at 5 bits of each 16: the table of 16 codes stands there twice.
      alignas(64) static constexpr uint16_t unsigned_codes[32] = {
          0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120,
          0x4130, 0x4140, 0x4150, 0x4160, 0x4170, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
          0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};
      alignas(64) static constexpr uint16_t signed_codes[32] = {
          0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
          0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
          0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
      const __m512i table = _mm512_load_si512(F::offset ? signed_codes : unsigned_codes);
#pragma GCC unroll 2
      for (int s = 0; s < 2; ++s)
        out[s] = (vi)_mm512_permutexvar_epi16((__m512i)(word >> (8 * s + 4 * half)), table);
    } else {
#pragma GCC unroll 2
      for (int s = 0; s < 2;
           ++s) {  // an int8 has at most 8 significant bits: the top half of its fp32 is exact
        const vi first = vbits(__builtin_convertvector(word << (24 - 16 * s) >> 24, vf));
        const vi second = vbits(__builtin_convertvector(word << (16 - 16 * s) >> 24, vf));
        out[s] = (vi)_mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32((__m512i)first, 16),
                                             (__m512i)second);
      }
    }
#endif
  } else {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      vi code;
      if constexpr (F::nibbles)
        code = ((word >> (8 * j + 4 * half)) & 15) - F::offset;
      else
        code = word << (24 - 8 * j) >> 24;
      out[j] = vbits(__builtin_convertvector(code, vf));
    }
  }
}
// The first column of a step of a block, and the distance to the second one of a pair.
template <class F, class Dot>
FASTLLM_INLINE int step_column(int step) {
  if constexpr (Dot::columns == 1) return step;
  return F::nibbles ? step / 2 * 4 + step % 2 : 2 * step;
}
template <class F>
constexpr int pair_distance = F::nibbles ? 2 : 1;
template <class Dot>
constexpr int block_steps = kBlock / Dot::columns;

FASTLLM_INLINE uint32_t word_of(float v) { return __builtin_bit_cast(uint32_t, v); }

// A row of x for a quantized weight: block_steps words a block, `width` apart, then the sum of the
// block.
template <class F, class Dot, class X>
static void prepare_blocks(const X* x, int64_t n, uint32_t* out, int64_t width) {
  for (int64_t c = 0; c < n; c += kBlock) {
    for (int step = 0; step < block_steps<Dot>; ++step, out += width) {
      const X* at = x + c + step_column<F, Dot>(step);
      if constexpr (Dot::columns == 2)
        *out = static_cast<uint32_t>(at[0]) | static_cast<uint32_t>(at[pair_distance<F>]) << 16;
      else
        *out = word_of(load1(at));
    }
    vf sum = vf{};
    for (int i = 0; i < kBlock; i += VL) sum += load(x + c + i);
    *out = word_of(reduce_add(sum));
    out += width;
  }
}

// out[MR][NP * 16] over all blocks; panels lie `blocks` blocks apart.
template <class F, class Dot, int MR, int NP>
static __attribute__((noinline)) void block_tile(const uint8_t* data, const uint16_t* scales,
                                                 int64_t blocks, int64_t ahead, const uint32_t* x,
                                                 int64_t width, float* out) {
  constexpr int V = NP * NV, per_word = 4 / Dot::columns;
  vf acc[MR][V];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[m][v] = vf{};

  for (int64_t b = 0; b < blocks; ++b) {
    vf sum[MR][V];
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sum[m][v] = vf{};
    if (ahead) {
#pragma GCC unroll 4
      for (int p = 0; p < NP; ++p) {
        const int64_t block = p * blocks + b;
        prefetch_lines<block_bytes<F> / 64>(data + block * block_bytes<F> + ahead);
        prefetch_lines<1>(reinterpret_cast<const char*>(scales + block * block_scales<F>) +
                          ahead / (2 * F::words / F::scales));
      }
    }
#pragma GCC unroll 2
    for (int half = 0; half < (F::nibbles ? 2 : 1); ++half)
      for (int i = 0; i < F::words; ++i) {
        vi w[V][per_word];
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v)
          decode_word<F, Dot>(vloadi(data + (v / NV * blocks + b) * block_bytes<F> +
                                     i * 4 * kPanelRows + v % NV * VL * 4),
                              half, w[v]);
#pragma GCC unroll 4
        for (int s = 0; s < per_word; ++s, x += width)
#pragma GCC unroll 16
          for (int m = 0; m < MR; ++m) {
            const vi xm = splat_word(x + m);
#pragma GCC unroll 16
            for (int v = 0; v < V; ++v) sum[m][v] = Dot::dot(sum[m][v], w[v][s], xm);
          }
      }
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const uint16_t* s = scales + (v / NV * blocks + b) * block_scales<F> + v % NV * VL;
      const vf d = vload_f16(s);
      vf minimum = vf{};
      if constexpr (F::scales == 2) minimum = vload_f16(s + kPanelRows);
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        acc[m][v] = vfma_once(sum[m][v], d, acc[m][v]);
        if constexpr (F::scales == 2)
          acc[m][v] = vfma_once(minimum, vbits(splat_word(x + m)), acc[m][v]);
      }
    }
    x += width;
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) vstore(out + m * NP * kPanelRows + v * VL, acc[m][v]);
}

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
          prefetch_lines<1>(reinterpret_cast<const char*>(panel + p * words * kPanelRows) + ahead);
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
