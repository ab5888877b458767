// The two products over int8 pages as they lie, for the few rows of a decoded token: codes become
// pairs of bf16 in registers, where a tile of words would be written to L1 and read again. A row's
// sums are those of the kernels over words, in the same order. A cached tile of 64 x 128, 4 rows, on
// Zen 4: 1.17 us, widened in L1 1.80.
#pragma once
#include "cpu/attention_words.h"

namespace fastllm::FASTLLM_ISA {
namespace {

#if defined(__AVX512BF16__)
// 32 pairs as words of bf16, those of even and those of odd lanes. Taking two vectors out of one is
// what saves the instructions that zero extension and reordering would cost: lanes are put in order
// when their sums are complete.
struct Words {
  vi even, odd;
};
FASTLLM_INLINE vi word_of(vi pairs) {
  // Floats of 8 bits: a bf16 is bytes 2 and 3 of one. The low code of a pair comes first.
  const Pair pair = split_codes(pairs);
  const __m512i upper_to_lower = _mm512_set4_epi32(0x0f0e0f0e, 0x0b0a0b0a, 0x07060706, 0x03020302);
  return (vi)_mm512_mask_shuffle_epi8((__m512i)pair.high, 0x3333333333333333, (__m512i)pair.low,
                                      upper_to_lower);
}
FASTLLM_INLINE Words words_of(vi pairs) { return {word_of(pairs), word_of(pairs >> 16)}; }

// What the products gave for even and odd lanes, in the order of the page.
FASTLLM_INLINE Pair in_order(vf even, vf odd) {
  const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  return {(vf)_mm512_permutex2var_ps((__m512)even, first, (__m512)odd),
          (vf)_mm512_permutex2var_ps((__m512)even, second, (__m512)odd)};
}

// acc[r][2c], acc[r][2c + 1] += A[r] . the even and odd lanes of B[c].
template <int ARow, int R, int C>
FASTLLM_INLINE void dot_codes(vf (&acc)[R][2 * C], const uint32_t* a, const vi (&pairs)[C]) {
  Words b[C];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) b[c] = words_of(pairs[c]);
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    const __m512bh av = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[r * ARow]));
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      acc[r][2 * c] = (vf)_mm512_dpbf16_ps((__m512)acc[r][2 * c], av, (__m512bh)b[c].even);
      acc[r][2 * c + 1] = (vf)_mm512_dpbf16_ps((__m512)acc[r][2 * c + 1], av, (__m512bh)b[c].odd);
    }
  }
}

template <int R>
static void code_score_rows(float (*scores)[kTile], const uint32_t* q, const CodePair* k,
                            int64_t steps, int64_t positions, const char* ahead) {
  constexpr int C = R <= 4 ? 2 : 1;
  for (int64_t first = 0; first < positions; first += C * 2 * kChunk)
    for (int64_t begin = 0; begin < steps; begin += kChain<Bf16>) {
      const int64_t end = begin + kChain<Bf16> < steps ? begin + kChain<Bf16> : steps;
      vf acc[R][2 * C] = {};
      for (int64_t i = begin; i < end; ++i) {
        prefetch<C>(ahead, first / (2 * kChunk) * steps + i * C);
        vi pairs[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
          const CodePair* low = k + ((first / kChunk + 2 * c) * steps + i) * kChunk;
          pairs[c] = (vi)_mm512_inserti64x4(
              _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)low)),
              _mm256_loadu_si256((const __m256i*)(low + steps * kChunk)), 1);
        }
        dot_codes<1>(acc, q + i * kMaxRows, pairs);
      }
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
          float* to = scores[r] + first + c * 2 * kChunk;
          const Pair sum = in_order(acc[r][2 * c], acc[r][2 * c + 1]);
          vstore(to, begin ? vload(to) + sum.low : sum.low);
          vstore(to + VL, begin ? vload(to + VL) + sum.high : sum.high);
        }
    }
}

template <int R, int C>
FASTLLM_INLINE void code_value_columns(float* o, int64_t o_stride, const float* alpha,
                                       const uint32_t* p, const CodePair* v, int64_t steps,
                                       int64_t dim, const char* ahead) {
  vf acc[R][2 * C] = {};
  for (int64_t i = 0; i < steps; ++i, v += dim) {
    prefetch<C>(ahead, i);
    vi pairs[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) __builtin_memcpy(&pairs[c], v + c * 2 * VL, sizeof pairs[c]);
    dot_codes<kTile / 2>(acc, p + i, pairs);
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    const vf scale = vbroadcast(alpha + r);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      float* to = o + r * o_stride + c * 2 * VL;
      const Pair sum = in_order(acc[r][2 * c], acc[r][2 * c + 1]);
      vstore(to, vfma(vload(to), scale, sum.low));
      vstore(to + VL, vfma(vload(to + VL), scale, sum.high));
    }
  }
}

template <int R>
static void code_value_rows(float* o, int64_t o_stride, const float* alpha, const uint32_t* p,
                            const Run<CodePair>* run, int, int64_t, int64_t dim,
                            const char* ahead) {
  constexpr int C = R <= 4 ? 2 : 1;
  const CodePair* v = run->words;
  const auto next = [&](int64_t d) { return ahead ? ahead + d * run->steps * 2 : nullptr; };
  int64_t d = 0;
  for (; d + C * 2 * VL <= dim; d += C * 2 * VL)
    code_value_columns<R, C>(o + d, o_stride, alpha, p, v + d, run->steps, dim, next(d));
  if (d < dim) code_value_columns<R, 1>(o + d, o_stride, alpha, p, v + d, run->steps, dim, next(d));
}

struct CodeKernels {
  template <int R>
  static constexpr RowKernels<uint32_t, CodePair> of = {code_score_rows<R>, code_value_rows<R>};
};
#endif

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
