// The inner loops of attention's backward: products of packed operands (attention_backward_pack.h)
// and the probabilities and score gradients of a tile.
//
// Scores are kept transposed, a row of lanes for each key: log-sum-exp and delta are then plain
// vectors, and P and dS leave the registers in the order in which dV and dK take them. dQ takes dS
// in pairs of keys, which two rows of lanes zipped give; nothing is transposed.
#pragma once
#include "cpu/attention_backward_pack.h"
#include "cpu/attention_variants.h"
#include "cpu/packed.h"

namespace fastllm::FASTLLM_ISA {
namespace {

FASTLLM_INLINE vf multiply_add(vf acc, float a, vf b) { return vfma_once(vset(a), b, acc); }
FASTLLM_INLINE vf load_words(const float* p) { return vload(p); }
#if defined(__AVX512BF16__)
FASTLLM_INLINE vf multiply_add(vf acc, uint32_t a, vi b) {
  const __m512i pair = _mm512_set1_epi32(static_cast<int>(a));
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)pair, (__m512bh)b);
}
FASTLLM_INLINE vi load_words(const uint32_t* p) { return (vi)_mm512_loadu_si512(p); }
#endif

// acc[r][c] += a[r] . b[c] over `steps` words. The word of row r at step i is a[i * AStep + r *
// ARow].
template <int ARow, int AStep, int C, class Word>
FASTLLM_INLINE void product(vf (&acc)[kRows][C], const Word* a, const Word* b, int64_t steps) {
  for (int64_t i = 0; i < steps; ++i, a += AStep, b += kWide) {
    decltype(load_words(b)) bv[C];
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) bv[c] = load_words(b + c * VL);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) acc[r][c] = multiply_add(acc[r][c], a[r * ARow], bv[c]);
    }
  }
}
template <int C>
FASTLLM_INLINE void clear(vf (&acc)[kRows][C]) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) acc[r][c] = vset(0.f);
}

// out[n][r] = a[n] . b[r] for the kRows keys of a block of rows and the queries [begin, end).
template <class E>
static void score_rows(float (*out)[kQueries], const typename E::Word* a, const typename E::Word* b,
                       int64_t steps, int begin, int end) {
  for (int r = begin; r < end; r += kWide)
    for (int64_t first = 0; first < steps; first += E::kDimChain) {
      const int64_t n = steps - first < E::kDimChain ? steps - first : E::kDimChain;
      vf acc[kRows][2];
      clear(acc);
      product<1, kRows>(acc, a + first * kRows, b + r * steps + first * kWide, n);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
        for (int c = 0; c < 2; ++c) {
          float* to = out[i] + r + c * VL;
          vstore(to, first ? vload(to) + acc[i][c] : acc[i][c]);
        }
    }
}

// Steps [begin, end) that a block of rows takes part in.
struct Range {
  int begin, end;
};

template <int ARow, int AStep, int C, class Word>
FASTLLM_INLINE void add_block(float* out, int64_t stride, const Word* a, const Word* b,
                              const Range& range) {
  vf acc[kRows][C];
  clear(acc);
  product<ARow, AStep>(acc, a + range.begin * AStep, b + range.begin * kWide,
                       range.end - range.begin);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) {
      float* to = out + r * stride + c * VL;
      vstore(to, vload(to) + acc[r][c]);
    }
}

// out[blocks * kRows][stride] += A B, each block of rows over its own range of steps, kChain of them
// summed from zero at a time. b: kQueries / pair steps.
template <class E, int ARow, int AStep>
static void add_product(float* out, int64_t stride, const typename E::Word* a,
                        const typename E::Word* b, int64_t dim, const Range* ranges, int blocks) {
  constexpr int kSteps = kQueries / E::kPair;
  for (int64_t d = 0; d < dim; d += kWide, b += kSteps * kWide)
    for (int i = 0; i < blocks; ++i) {
      float* to = out + i * kRows * stride + d;
      const typename E::Word* rows = a + i * kRows * ARow;
      for (Range part{ranges[i].begin, 0}; part.begin < ranges[i].end; part.begin = part.end) {
        part.end = (part.begin / E::kChain + 1) * E::kChain;
        if (part.end > ranges[i].end) part.end = ranges[i].end;
        if (dim - d <= VL)
          add_block<ARow, AStep, 1>(to, stride, rows, b, part);
        else
          add_block<ARow, AStep, 2>(to, stride, rows, b, part);
      }
    }
}

// What a score goes through to become a logit of base E::kBase: scale * s or, with a cap, cap *
// tanh(to_cap * s).
struct Logits {
  float scale, to_cap, cap;
};

// Scores and gradients of a tile on their way to the products over queries (p, ds) and over keys
// (ds_pairs: the same words as ds where a word is one element).
template <class E>
struct TileBuffers {
  using Word = typename E::Word;
  float (*s)[kQueries];   // [kRows]
  float (*dp)[kQueries];  // [kRows]
  Word (*p)[kQueries / E::kPair];
  Word (*ds)[kQueries / E::kPair];
  Word (*ds_pairs)[kQueries];  // [kTile / kPair]
};

template <class E>
FASTLLM_INLINE void store_pair(const TileBuffers<E>& t, E, int n, int r, const vf* p,
                               const vf* ds) {
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
#if defined(__AVX512BF16__)
    if constexpr (E::kPair == 2) {
      const __m256bh p_half = _mm512_cvtneps_pbh((__m512)p[i]);
      __builtin_memcpy(t.p[n + i] + r / 2, &p_half, sizeof p_half);
      const __m256bh ds_half = _mm512_cvtneps_pbh((__m512)ds[i]);
      __builtin_memcpy(t.ds[n + i] + r / 2, &ds_half, sizeof ds_half);
      continue;
    }
#endif
    vstore(reinterpret_cast<float*>(t.p[n + i]) + r, E::rounded(p[i]));
    vstore(reinterpret_cast<float*>(t.ds[n + i]) + r, E::rounded(ds[i]));
  }
#if defined(__AVX512BF16__)
  if constexpr (E::kPair == 2) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)ds[0]));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)ds[1]));
    _mm512_storeu_si512(t.ds_pairs[n / 2] + r, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
#endif
}

// P and dS of kRows keys from key n on and the queries [begin, end), from their scores and dP.
// With Masked, key n + i is seen by the lanes in [low[i], high[i]) only.
template <class E, bool Masked, bool Capped>
static void gradient_rows(const TileBuffers<E>& t, const Logits& logits, const float* lse,
                          const float* delta, int n, int begin, int end, const int* low,
                          const int* high) {
  for (int r = begin; r < end; r += VL) {
    const vf row_lse = vload(lse + r), row_delta = vload(delta + r);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; i += 2) {
      vf p[2], ds[2];
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const vf s = vload(t.s[i + j] + r);
        vf slope = vset(1.f), x;
        if constexpr (Capped) {
          const vf squashed = vtanh(s * logits.to_cap);
          slope = vfma(-squashed, squashed, slope);
          x = vfma(squashed, vset(logits.cap), -row_lse);
        } else {
          x = vfma(s, vset(logits.scale), -row_lse);
        }
        // P is at most 1, whatever the rounding of lse says where logits are billions.
        p[j] = E::power(vmin(vset(0.f), x));
        ds[j] = p[j] * (vload(t.dp[i + j] + r) - row_delta);
        if constexpr (Capped) ds[j] *= slope;
        if constexpr (Masked) {
          const vi at = lane_index() + r;
          const vi seen = (at >= low[i + j]) & (at < high[i + j]);
          p[j] = seen ? p[j] : vset(0.f);
          ds[j] = seen ? ds[j] : vset(0.f);
        }
      }
      store_pair(t, E{}, n + i, r, p, ds);
    }
  }
}

template <class E>
FASTLLM_INLINE auto gradient_kernel(bool masked, bool capped) {
  return capped   ? masked ? gradient_rows<E, true, true> : gradient_rows<E, false, true>
         : masked ? gradient_rows<E, true, false>
                  : gradient_rows<E, false, false>;
}

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
