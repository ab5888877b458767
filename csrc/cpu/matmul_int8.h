// int8 activations against packed codes: exact int32 sums over blocks of 32 columns, then one FMA
// with the scales and one with the minimum. Rows of x are prepared as records of 40 bytes a block.
//
// Cost on AVX-512 VNNI (two 512-bit multiplier ports): a row and panel of 16 outputs need 8
// vpdpbusd, one product of scales and one or two FMA a block, so 8/10 (8/11 with a minimum) of the
// bare int8 peak is the ceiling. A tile of 6 rows x 32 outputs keeps 12 int32 and 12 fp32
// accumulators in registers.
#pragma once
#include "cpu/packed.h"

namespace fastllm::FASTLLM_ISA {

// Two accumulators an output: 6 rows x 32 outputs on 32 registers.
#if defined(__AVX512F__)
constexpr int kBlockRows = 6, kBlockStrip = 2, kBlockFew = 8;
#elif defined(__AVX2__)
constexpr int kBlockRows = 2, kBlockStrip = 1, kBlockFew = 4;
#else
constexpr int kBlockRows = 1, kBlockStrip = 1, kBlockFew = 4;
#endif

// One row's block of 32 columns: codes, scale, and what completes the sum: the start value of the
// int32 accumulator (minus offset times the sum of the codes), or dx * sum for formats with a
// minimum.
struct Int8Block {
  int8_t q[kBlock];
  float scale;
  union {
    int32_t start;
    float sum;
  };
};
static_assert(sizeof(Int8Block) == 40);

// Whether signed codes are shifted to unsigned ones for the dot product (vpdpbusd), or the sign is
// moved from the weight to the activation (vpmaddubsw: |w| * x stays below 2^15, so nothing
// saturates).
#if defined(__AVX512VNNI__)
constexpr bool kShiftSigned = true;
#else
constexpr bool kShiftSigned = false;
#endif
template <class F>
constexpr int int8_offset = (F::nibbles || kShiftSigned) ? F::offset : 0;

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

// Quantizes n columns of a row (a multiple of 32) into records `step` records apart.
// amax is found on the bit patterns, where NaN is above everything: it ends in the scale and is not
// lost.
template <class F, class X>
static void quantize_row(const X* x, int64_t n, Int8Block* out, int64_t step) {
  constexpr int parts = kBlock / VL;
  typedef int8_t vb __attribute__((vector_size(VL)));
  for (int64_t c = 0; c < n; c += kBlock, out += step) {
    vf v[parts];
    vi top = vi{};
#pragma GCC unroll 8
    for (int i = 0; i < parts; ++i) {
      v[i] = load(x + c + i * VL);
      const vi magnitude = vbits(v[i]) & 0x7fffffff;
      top = magnitude > top ? magnitude : top;
    }
    const float amax = __builtin_bit_cast(float, reduce_max(top));
    float inverse = 127.f / amax;
    if (!(inverse <= __FLT_MAX__)) inverse = 0.f;  // zero or too small a block
    const vf magic = vset(12582912.f);  // 1.5 * 2^23: adding it rounds to the nearest integer
    vi total = vi{};
#pragma GCC unroll 8
    for (int i = 0; i < parts; ++i) {
      const vi q = vbits(v[i] * inverse + magic) - vbits(magic);
      const vb bytes = __builtin_convertvector(q, vb);
      __builtin_memcpy(out->q + i * VL, &bytes, sizeof bytes);
      total += q;
    }
    out->scale = amax / 127.f;
    const int32_t sum = reduce_add(total);
    if constexpr (F::scales == 2)
      out->sum = static_cast<float>(sum) * out->scale;
    else
      out->start = -int8_offset<F> * sum;
  }
}

// out[MR][NP * 16] = x[MR rows] times NP panels, over all blocks; weights `ahead` bytes on are
// prefetched.
template <class F, int MR, int NP>
static __attribute__((noinline)) void int8_tile(const uint8_t* data, const uint16_t* scales,
                                                int64_t blocks, int64_t ahead, const Int8Block* x,
                                                int64_t step, float* out) {
  constexpr int V = NP * NV;
  vf acc[MR][V];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[m][v] = vf{};

  for (int64_t b = 0; b < blocks; ++b, x += step) {
    vi sum[MR][V];
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sum[m][v] = int8_offset<F> ? splat_word(&x[m].start) : vi{};
    if (ahead) {
#pragma GCC unroll 4
      for (int p = 0; p < NP; ++p) {
        const int64_t block = p * blocks + b;
        prefetch_lines<block_bytes<F> / 64>(data + block * block_bytes<F> + ahead);
        prefetch_lines<1>(reinterpret_cast<const char*>(scales + block * block_scales<F>) +
                          ahead / (2 * F::words / F::scales));
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < F::words; ++i) {
      vi w[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v)
        w[v] = vloadi(data + (v / NV * blocks + b) * block_bytes<F> + i * 4 * kPanelRows +
                      v % NV * VL * 4);
      if constexpr (F::nibbles) {
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) {
          const vi low = splat_word(x[m].q + 4 * i), high = splat_word(x[m].q + 16 + 4 * i);
#pragma GCC unroll 16
          for (int v = 0; v < V; ++v) {
            sum[m][v] = dot_unsigned(sum[m][v], w[v] & 0x0f0f0f0f, low);
            sum[m][v] = dot_unsigned(sum[m][v], (w[v] >> 4) & 0x0f0f0f0f, high);
          }
        }
      } else {
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) {
          const vi word = splat_word(x[m].q + 4 * i);
#pragma GCC unroll 16
          for (int v = 0; v < V; ++v) sum[m][v] = dot_signed(sum[m][v], w[v], word);
        }
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
        acc[m][v] =
            vfma_once(__builtin_convertvector(sum[m][v], vf), d * vset(x[m].scale), acc[m][v]);
        if constexpr (F::scales == 2) acc[m][v] = vfma_once(minimum, vset(x[m].sum), acc[m][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) vstore(out + m * NP * kPanelRows + v * VL, acc[m][v]);
}

}  // namespace fastllm::FASTLLM_ISA
