// The inner loops of attention: a few rows of Q against a tile of 64 positions, and their softmax.
//
// Both products are the same loop: R rows of A, broadcast word by word, times vectors of B as the
// cache holds them, one accumulator per (row, lane), summed in ascending order. A row's bits
// therefore do not depend on R, on the vectors computed beside it, or on the rows around it.
#pragma once
#include "common/cache.h"
#include "cpu/simd.h"

namespace fastllm::FASTLLM_ISA {

constexpr int kTile = 64;   // positions of a KV tile
constexpr int kChunk = 16;  // positions interleaved in K
#if defined(__AVX512F__)
constexpr int kMaxRows = 12;  // x 2 vectors: 24 accumulators of 32 registers
#else
constexpr int kMaxRows = 6;  // x 2 vectors: 12 accumulators of 16 registers
#endif
constexpr int kTileVectors = kTile / VL;

FASTLLM_INLINE vf vbroadcast(const float* p) { return vset(*p); }

// Element types. A word is what one lane of B holds per step: an f32, or a pair of bf16 that are
// neighbours along the summed dimension. `A` is how the broadcast operand is kept: kParts of them
// make a step.
struct F32 {
  using Elem = float;
  using Word = float;
  using A = float;
  static constexpr int kPerWord = 1, kParts = 1;
  static constexpr bool kReadsCodes = false;
  static constexpr int kExpDegree = 6;
};
struct Bf16 {
  using Elem = uint16_t;
  using Word = uint32_t;
  static constexpr int kPerWord = 2;
  static constexpr int kExpDegree = 5;  // P is rounded to bf16, but lse is fp32
#if defined(__AVX512BF16__)
  using A = uint32_t;  // the pair itself, for vdpbf16ps
  static constexpr int kParts = 1;
  static constexpr bool kReadsCodes = true;  // int8 pages are multiplied as they lie
#else
  using A = float;  // both halves widened
  static constexpr int kParts = 2;
  static constexpr bool kReadsCodes = false;
#endif
};
// Half precision is widened on the way in and multiplied as f32, by the kernels of f32.
struct F16 {
  using Elem = Half;
  using Word = float;
  using A = float;
  static constexpr int kPerWord = 1, kParts = 1;
  static constexpr bool kReadsCodes = false;
  static constexpr int kExpDegree = 5;
};
// Two neighbours of an int8 page.
struct CodePair {
  int8_t low, high;
};

// A few words of B in a row of steps; a product takes runs one after the other.
template <class Word>
struct Run {
  const Word* words;
  int64_t steps;
};

// The two products for up to kMaxRows rows of A (other numbers than the kernels have take the next
// larger one, with padded rows). attention_tile.cpp compiles them, once for all ops.
//
// scores(scores, q, k, steps, positions, ahead): scores[r][0 .. positions) = Q K^T, rounded up to
// whole vectors; q is packed [step][part][kMaxRows].
//
// values(o, o_stride, alpha, p, runs, count, v_stride, dim, ahead): o[r] = alpha[r] * o[r] + P V
// over the words of `runs`; o_stride is dim rounded up to whole vectors, v_stride the words from
// one step of V to the next. A tile is summed from zero: chains are as short as a tile.
//
// Both ask for as many bytes from `ahead` on as they read of B, unless it is null.
template <class A, class Word>
struct RowKernels {
  void (*scores)(float (*)[kTile], const A*, const Word*, int64_t, int64_t, const char*);
  void (*values)(float*, int64_t, const float*, const A*, const Run<Word>*, int, int64_t, int64_t,
                 const char*);
};
RowKernels<F32::A, F32::Word> row_kernels(F32, int64_t rows);
RowKernels<Bf16::A, Bf16::Word> row_kernels(Bf16, int64_t rows);
FASTLLM_INLINE RowKernels<F16::A, F16::Word> row_kernels(F16, int64_t rows) {
  return row_kernels(F32{}, rows);
}
// The same sums with int8 pages for B, one run and Dv a multiple of 32 (if Bf16::kReadsCodes).
RowKernels<Bf16::A, CodePair> code_kernels(int64_t rows);

namespace {

// Words of Q K^T summed in one chain before they join the total. Of bf16 128 dimensions: one chain
// over 224 put lse past its bound. Of f32 8, which err as a blocked GEMM does and cost 0.5% of the
// forward: 16 put lse of D = 16 past its bound, 32 erred by a fifth to two fifths more on average.
template <class E>
constexpr int64_t kChain = 64;
template <>
constexpr int64_t kChain<F32> = 8;

// Step i of a loop asks for its share of the bytes that are wanted next. They lie from `ahead` on and
// are asked for in ascending order, evenly over the loop: the hardware's own prefetcher joins in, and
// requests that find no free miss buffer are dropped (decode reads each tile once and computes a tile
// in a third of the time that its bytes take to come). Where L1 is small it has no room for them
// beside the tile at hand, and they go to L2 (decode of 32/8 heads of 128 on Zen 4: 21 GB/s into L1,
// as without any request, 31 into L2; Zen 5, whose L1 has 48 KB: 31 into L1).
template <int Lines>
FASTLLM_INLINE void prefetch(const char* ahead, int64_t i) {
  if (!ahead) return;
  if (l1_is_small) {
#pragma GCC unroll 8
    for (int line = 0; line < Lines; ++line)
      _mm_prefetch(ahead + (i * Lines + line) * 64, _MM_HINT_T1);
  } else {
#pragma GCC unroll 8
    for (int line = 0; line < Lines; ++line)
      _mm_prefetch(ahead + (i * Lines + line) * 64, _MM_HINT_T0);
  }
}

template <int Value>
struct Constant {
  static constexpr int value = Value;
};

// acc[r][c] += A[r] . B[c] over `steps` words. A word of row r, step i, part h: a[i * AStep + h *
// APart + r * ARow]. Vectors of B: 16 words of a chunk side by side, chunks `chunk_stride` words apart,
// steps `step_stride`. A step asks for so many Lines from `ahead` on. With Masked, the last vector
// holds only 8 words (AVX-512 with 8 columns left over).
template <int AStep, int APart, int ARow, bool Masked, int Lines, int R, int C>
FASTLLM_INLINE void dot_tile(F32, vf (&acc)[R][C], const float* a, const float* b,
                             int64_t chunk_stride, int64_t step_stride, int64_t steps,
                             const char* ahead) {
  constexpr int kPerChunk = kChunk / VL;
  for (int64_t i = 0; i < steps; ++i, a += AStep, b += step_stride) {
    prefetch<Lines>(ahead, i);
    vf bv[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const float* p = b + c / kPerChunk * chunk_stride + c % kPerChunk * VL;
#if defined(__AVX512F__)
      bv[c] = Masked ? (vf)_mm512_maskz_loadu_ps(0xff, p) : vload(p);
#else
      bv[c] = vload(p);
#endif
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const vf av = vbroadcast(a + r * ARow);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) acc[r][c] = vfma(av, bv[c], acc[r][c]);
    }
  }
}

#if defined(__AVX512BF16__)
template <int AStep, int APart, int ARow, bool Masked, int Lines, int R, int C>
FASTLLM_INLINE void dot_tile(Bf16, vf (&acc)[R][C], const uint32_t* a, const uint32_t* b,
                             int64_t chunk_stride, int64_t step_stride, int64_t steps,
                             const char* ahead) {
  for (int64_t i = 0; i < steps; ++i, a += AStep, b += step_stride) {
    prefetch<Lines>(ahead, i);
    __m512i bv[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const uint32_t* p = b + c * chunk_stride;
      bv[c] = Masked ? _mm512_maskz_loadu_epi32(0xff, p) : _mm512_loadu_si512(p);
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const __m512i av = _mm512_set1_epi32(static_cast<int>(a[r * ARow]));
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c)
        acc[r][c] = (vf)_mm512_dpbf16_ps((__m512)acc[r][c], (__m512bh)av, (__m512bh)bv[c]);
    }
  }
}
#else
template <int AStep, int APart, int ARow, bool Masked, int Lines, int R, int C>
FASTLLM_INLINE void dot_tile(Bf16, vf (&acc)[R][C], const float* a, const uint32_t* b,
                             int64_t chunk_stride, int64_t step_stride, int64_t steps,
                             const char* ahead) {
  constexpr int kPerChunk = kChunk / VL;
  for (int64_t i = 0; i < steps; ++i, a += AStep, b += step_stride) {
    prefetch<Lines>(ahead, i);
    vi bv[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const uint32_t* p = b + c / kPerChunk * chunk_stride + c % kPerChunk * VL;
#if defined(__AVX512F__)
      bv[c] = Masked ? (vi)_mm512_maskz_loadu_epi32(0xff, p) : (vi)_mm512_loadu_si512(p);
#else
      __builtin_memcpy(&bv[c], p, sizeof bv[c]);
#endif
    }
#pragma GCC unroll 2
    for (int part = 0; part < 2; ++part) {
      vf half[C];  // the low half of a word comes first
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c)
        half[c] = vbits(part ? bv[c] & vseti(static_cast<int>(0xffff0000u)) : bv[c] << 16);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const vf av = vbroadcast(a + part * APart + r * ARow);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) acc[r][c] = vfma(av, half[c], acc[r][c]);
      }
    }
  }
}
#endif

// 2^x for x <= 0 (of any size; -inf gives 0, NaN stays): x = k + r, |r| <= 1/2, 2^r by a minimax
// polynomial with p(0) = 1 exactly, of relative error 1.1e-7 (degree 5) or 2e-8 (degree 6).
template <int Degree>
FASTLLM_INLINE vf vexp2(vf x) {
#if defined(__AVX512F__)
  x = (vf)_mm512_max_ps(_mm512_set1_ps(-200.f), (__m512)x);  // the second operand's NaN is kept
  const vf k = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vf clamped = vset(-126.f) > x ? vset(-126.f) : x;
  const vf magic = vset(12582912.f);  // 1.5 * 2^23: rounds to an integer, left in the low bits
  const vf shifted = clamped + magic;
  const vf k = shifted - magic;
#endif
#if defined(__AVX512F__)
  const vf r = x - k;
#else
  const vf r = clamped - k;
#endif
  vf p;
  if constexpr (Degree == 5) {
    p = vfma(vset(0.0013264724984765053f), r, vset(0.009671512991189957f));
    p = vfma(p, r, vset(0.05550733581185341f));
    p = vfma(p, r, vset(0.24022242426872253f));
    p = vfma(p, r, vset(0.6931470036506653f));
  } else {
    p = vfma(vset(0.00015353361959569156f), r, vset(0.0013398875016719103f));
    p = vfma(p, r, vset(0.00961843691766262f));
    p = vfma(p, r, vset(0.055503323674201965f));
    p = vfma(p, r, vset(0.24022647738456726f));
    p = vfma(p, r, vset(0.6931471824645996f));
  }
  p = vfma(p, r, vset(1.f));
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)k);
#else
  const vf y = p * vbits((vbits(shifted) - vbits(magic) + 127) << 23);
  return x < vset(-126.f) ? vset(0.f) : y;
#endif
}

FASTLLM_INLINE float max_lane(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  return vhmax(v);
#endif
}

// P of one row for the second product, as its kernels read it.
FASTLLM_INLINE void store_p(F32, float* p, int64_t vector, vf x) { vstore(p + vector * VL, x); }
FASTLLM_INLINE void store_p(F16, float* p, int64_t vector, vf x) {
  vstore(p + vector * VL, vround_f16(x));
}
#if defined(__AVX512BF16__)
FASTLLM_INLINE void store_p(Bf16, uint32_t* p, int64_t vector, vf x) {
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);
  __builtin_memcpy(p + vector * VL / 2, &rounded, sizeof rounded);
}
#else
FASTLLM_INLINE void store_p(Bf16, float* p, int64_t vector, vf x) {
  vstore(p + vector * VL, vround_bf16(x));
}
#endif

// The running softmax of kMaxRows rows: maxima of the scores and, per lane, sums of P.
struct Softmax {
  alignas(64) float m[16];
  alignas(64) float l[kMaxRows][VL];
};

FASTLLM_INLINE void start(Softmax& s) {
  for (int r = 0; r < 16; ++r) s.m[r] = -__builtin_inff();
  for (int r = 0; r < kMaxRows; ++r) vstore(s.l[r], vset(0.f));
}

// Advances `rows` rows by one tile: P = exp2(scale * (scores - m)), and alpha, the factor of what was
// summed so far; scale > 0. The maximum goes first: scale * score - m in one fma would leave the
// rounding of m behind, which is more than an exponent holds where logits are billions. Scores of -inf
// (masked) add nothing; a row of nothing else is left as it is. With Scaled, what is stored is P *
// v_scale, not what is summed.
template <class E, bool Scaled>
static void softmax_rows(Softmax& s, float* alpha, typename E::A* p, const float (*scores)[kTile],
                         int64_t rows, float scale, const float* v_scale) {
  constexpr int64_t kPRow = kTile * E::kParts / E::kPerWord;
  alignas(64) float tile_max[16], shift[16];
  for (int r = 0; r < 16; ++r) tile_max[r] = -__builtin_inff();
  for (int64_t r = 0; r < rows; ++r) {
    vf top = vload(scores[r]);
#pragma GCC unroll 16
    for (int c = 1; c < kTileVectors; ++c) top = vmax(top, vload(scores[r] + c * VL));
    tile_max[r] = max_lane(top);
  }
  for (int r = 0; r < 16; r += VL) {
    const vf before = vload(s.m + r), now = vmax(before, vload(tile_max + r));
    const vf zero_if_none = now == vset(-__builtin_inff()) ? vset(0.f) : now;
    vstore(s.m + r, now);
    vstore(shift + r, zero_if_none);
    vstore(tile_max + r, vexp2<6>((before - zero_if_none) * scale));
  }
  for (int64_t r = 0; r < rows; ++r) {
    alpha[r] = tile_max[r];
    const vf m = vbroadcast(shift + r);
    vf sum = vset(0.f);
#pragma GCC unroll 16
    for (int c = 0; c < kTileVectors; ++c) {
      const vf e = vexp2<E::kExpDegree>((vload(scores[r] + c * VL) - m) * scale);
      sum = sum + e;
      store_p(E{}, p + r * kPRow, c, Scaled ? e * vload(v_scale + c * VL) : e);
    }
    vstore(s.l[r], vfma(vload(s.l[r]), vbroadcast(alpha + r), sum));
  }
}

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
