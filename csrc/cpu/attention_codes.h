// The two products over int8 pages as they lie, for the few rows of a decoded token: codes become
// pairs of bf16 in registers, where a tile of words would be written to L1 and read again. A row's
// sums are those of the kernels over words, in the same order.
#pragma once
#include "cpu/attention_words.h"
#include "cpu/signed_words.h"

namespace fastllm::FASTLLM_ISA {
namespace {

#if defined(__AVX512BF16__)
FASTLLM_INLINE vf dot(vf sum, uint32_t a, vi b) {
  const __m512i every = _mm512_set1_epi32(static_cast<int>(a));
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)every, (__m512bh)b);
}

// Step i asks for its share of what the next pass over the same tile reads. It is in L2 and comes to
// L1 in ascending order, although a pass reads only a part of each row of V or of K's chunks (32/8
// heads of 128 on two Zen 4 cores: 23.1 GB/s without, 25.2 with it).
template <int Lines>
FASTLLM_INLINE void prefetch_near(const char* from) {
  if (!from) return;
#pragma GCC unroll 4
  for (int line = 0; line < Lines; ++line) _mm_prefetch(from + line * 64, _MM_HINT_T0);
}

// acc[r][c] = Q K^T of C chunks, `stride` pairs apart. Two steps of a chunk are one line, and lines
// are read whole: a step of two chunks at once reads every line twice while it is on its way (2.0
// us a tile against 1.5).
template <bool Lowest, int R, int C>
FASTLLM_INLINE bool dot_chunks(vf (&acc)[R][C], const uint32_t* q, const CodePair* k,
                               int64_t stride, int64_t steps, const char* ahead, const char* near) {
  const __m512i halves = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);  // so a step is Words.lower
  __m512i seen = _mm512_setzero_si512();
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) acc[r][c] = vset(0.f);
  for (int64_t i = 0; i < steps; i += 2, q += 2 * kMaxRows, k += 2 * kChunk) {
    prefetch<C>(ahead, i / 2);
    prefetch_near<C>(near ? near + i / 2 * C * 64 : nullptr);
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) {
      const __m512i codes = _mm512_permutexvar_epi64(halves, _mm512_loadu_si512(k + c * stride));
      const Words b = signed_words<Lowest>(codes, seen);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) acc[r][c] = dot(acc[r][c], q[r], b.lower);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) acc[r][c] = dot(acc[r][c], q[kMaxRows + r], b.upper);
    }
  }
  return has_lowest(seen);
}

template <int R>
static void code_score_rows(float (*scores)[kTile], const uint32_t* q, const CodePair* k,
                            int64_t steps, int64_t positions, const char* ahead) {
  constexpr int C = R <= 4 ? 2 : 1, kColumns = C * kChunk;
  for (int64_t first = 0; first < positions; first += kColumns)
    for (int64_t begin = 0; begin < steps; begin += kChain<Bf16>) {
      const int64_t n = steps - begin < kChain<Bf16> ? steps - begin : kChain<Bf16>;
      const uint32_t* a = q + begin * kMaxRows;
      const CodePair* b = k + first * steps + begin * kChunk;
      const int64_t done = (first * steps + begin * kColumns) * sizeof(CodePair);
      const char* near = reinterpret_cast<const char*>(k + kColumns * steps) + done;
      vf acc[R][C];
      if (dot_chunks<false>(acc, a, b, kChunk * steps, n, ahead ? ahead + done : nullptr,
                            first + kColumns < positions ? near : nullptr))
        dot_chunks<true>(acc, a, b, kChunk * steps, n, nullptr, nullptr);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) {
          float* to = scores[r] + first + c * kChunk;
          vstore(to, begin ? vload(to) + acc[r][c] : acc[r][c]);
        }
    }
}

// acc[r][2c], acc[r][2c + 1] = P V of the halves of C vectors of pairs.
template <bool Lowest, int R, int C>
FASTLLM_INLINE bool dot_columns(vf (&acc)[R][2 * C], const uint32_t* p, const CodePair* v,
                                int64_t steps, int64_t dim, const char* ahead, const char* near) {
  __m512i seen = _mm512_setzero_si512();
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < 2 * C; ++c) acc[r][c] = vset(0.f);
  for (int64_t i = 0; i < steps; ++i, v += dim) {
    prefetch<C>(ahead, i);
    prefetch_near<C>(near ? near + i * dim * sizeof(CodePair) : nullptr);
    Words b[C];
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c)
      b[c] = signed_words<Lowest>(_mm512_loadu_si512(v + c * 2 * VL), seen);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) {
        acc[r][2 * c] = dot(acc[r][2 * c], p[r * (kTile / 2) + i], b[c].lower);
        acc[r][2 * c + 1] = dot(acc[r][2 * c + 1], p[r * (kTile / 2) + i], b[c].upper);
      }
  }
  return has_lowest(seen);
}

// Lanes of the lower and upper halves in the order of the page.
FASTLLM_INLINE Pair in_order(vf lower, vf upper) {
  const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  return {(vf)_mm512_permutex2var_ps((__m512)lower, first, (__m512)upper),
          (vf)_mm512_permutex2var_ps((__m512)lower, second, (__m512)upper)};
}

template <int R, int C>
FASTLLM_INLINE void code_value_columns(float* o, int64_t o_stride, const float* alpha,
                                       const uint32_t* p, const CodePair* v, int64_t steps,
                                       int64_t dim, const char* ahead, bool more) {
  const char* near = more ? reinterpret_cast<const char*>(v + C * 2 * VL) : nullptr;
  vf acc[R][2 * C];
  if (dot_columns<false, R, C>(acc, p, v, steps, dim, ahead, near))
    dot_columns<true, R, C>(acc, p, v, steps, dim, nullptr, nullptr);
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    const vf scale = vbroadcast(alpha + r);
#pragma GCC unroll 2
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
  const auto columns = [&](int64_t d, auto width) __attribute__((always_inline)) {
    code_value_columns<R, width.value>(o + d, o_stride, alpha, p, run->words + d, run->steps, dim,
                                       ahead ? ahead + d * run->steps * 2 : nullptr,
                                       d + width.value * 2 * VL < dim);
  };
  int64_t d = 0;
  for (; d + C * 2 * VL <= dim; d += C * 2 * VL) columns(d, Constant<C>{});
  if (d < dim) columns(d, Constant<1>{});
}

struct CodeKernels {
  template <int R>
  static constexpr RowKernels<uint32_t, CodePair> of = {code_score_rows<R>, code_value_rows<R>};
};
#endif

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
