// Making the words of a KV tile from what is stored otherwise: pages of a narrower type, or rows in
// natural order. Nothing is rounded: int8 codes are exact in every type, halves in f32.
//
// A tile: K [4][D/w][16][w], V [64/w][Dv][w], with w = 2 for bf16 and 1 for the others.
#pragma once
#include "cpu/attention_tile.h"
#include "cpu/integers.h"
#include "cpu/transpose.h"
#include "ops_core.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// Where a thread makes the words of a tile.
template <class E>
struct TileScratch {
  typename E::Word *k, *v;
  float* scale[2];  // of K and V, a position each
};

// A row of zeros, for positions that no query of the document sees.
alignas(64) constexpr float kZeroRow[kMaxHeadDim] = {};

// The narrow elements of a page come in pairs: two neighbours of the interleaved order. Both halves
// of VL pairs, widened to f32.
struct Pair {
  vf low, high;
};
// Code c, the first byte of a lane, makes the float 2^23 + 128 + c of its own bits, the second byte
// 2^15 + 128 + c: a logical operation and a subtraction each, where sign extension and conversion
// are three operations that fewer ports have (a cached tile of 64 x 128, 4 rows: 1.96 -> 1.69 us on
// Zen 4).
FASTLLM_INLINE Pair split_codes(vi x) {
  return {vbits((x & 0xff) ^ 0x4b000080) - vset(8388736.f),
          vbits((x & 0xff00) ^ 0x47008000) - vset(32896.f)};
}
FASTLLM_INLINE Pair load_pairs(const int8_t* p) { return split_codes(vload_u16(p)); }
FASTLLM_INLINE Pair load_pairs(const Half* p) {
  vi x;
  __builtin_memcpy(&x, p, sizeof x);
  return {vhalf_to_float(x & 0xffff), vhalf_to_float((x >> 16) & 0xffff)};
}

// n pairs, n a multiple of 8: low[i], high[i]. As many bytes are asked for from `ahead` on.
template <class Narrow>
FASTLLM_INLINE void split_pairs(float* low, float* high, const Narrow* from, int64_t n,
                                const Narrow* ahead) {
  int64_t i = 0;
  for (; i + VL <= n; i += VL) {
    _mm_prefetch(reinterpret_cast<const char*>(ahead + 2 * i), _MM_HINT_T0);
    const Pair pair = load_pairs(from + 2 * i);
    vstore(low + i, pair.low);
    vstore(high + i, pair.high);
  }
  if (i < n) {  // 8 of 16 lanes
    Narrow rest[2 * VL] = {};
    __builtin_memcpy(rest, from + 2 * i, (n - i) * 2 * sizeof(Narrow));
    const Pair pair = load_pairs(rest);
    __builtin_memcpy(low + i, &pair.low, (n - i) * 4);
    __builtin_memcpy(high + i, &pair.high, (n - i) * 4);
  }
}

// 64 positions of an interleaved page of narrow elements, [4][D/2][16][2] and [32][Dv][2], as f32.
template <class Narrow>
static void expand_keys(float* to, const Narrow* from, int64_t dim, const Narrow* ahead) {
  for (int64_t i = 0; i < kTile / kChunk * dim / 2; ++i)
    split_pairs(to + 2 * i * kChunk, to + (2 * i + 1) * kChunk, from + 2 * i * kChunk, kChunk,
                ahead + 2 * i * kChunk);
}
template <class Narrow>
static void expand_values(float* to, const Narrow* from, int64_t dim, const Narrow* ahead) {
  for (int64_t i = 0; i < kTile / 2; ++i)
    split_pairs(to + 2 * i * dim, to + (2 * i + 1) * dim, from + 2 * i * dim, dim,
                ahead + 2 * i * dim);
}
// As pairs of bf16, the upper halves of the floats, the order stays.
FASTLLM_INLINE void expand_words(uint32_t* to, const int8_t* from, int64_t words,
                                 const int8_t* ahead) {
  for (int64_t i = 0; i < words; i += VL) {
    if (i % 32 == 0) _mm_prefetch(reinterpret_cast<const char*>(ahead + 2 * i), _MM_HINT_T0);
    const Pair pair = load_pairs(from + 2 * i);
    const vi word = (vbits(pair.low) >> 16 & 0xffff) | vbits(pair.high);
    __builtin_memcpy(to + i, &word, sizeof word);
  }
}
FASTLLM_INLINE void expand_keys(uint32_t* to, const int8_t* from, int64_t dim,
                                const int8_t* ahead) {
  expand_words(to, from, kTile * dim / 2, ahead);
}
FASTLLM_INLINE void expand_values(uint32_t* to, const int8_t* from, int64_t dim,
                                  const int8_t* ahead) {
  expand_words(to, from, kTile * dim / 2, ahead);
}

// Four or sixteen words of a row, from where they lie in natural order.
FASTLLM_INLINE __m128i four_words(const float* p) { return _mm_loadu_si128((const __m128i*)p); }
FASTLLM_INLINE __m128i four_words(const uint16_t* p) { return _mm_loadu_si128((const __m128i*)p); }
FASTLLM_INLINE __m128i four_words(const Half* p) {
#if defined(__F16C__)
  return _mm_castps_si128(_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)p)));
#else
  return (__m128i)vhalf_to_float(vload_u16(p));
#endif
}
#if defined(__AVX512F__)
FASTLLM_INLINE vi sixteen_words(const float* p, __mmask16 words) {
  return (vi)_mm512_maskz_loadu_epi32(words, p);
}
FASTLLM_INLINE vi sixteen_words(const uint16_t* p, __mmask16 words) {
  return (vi)_mm512_maskz_loadu_epi32(words, p);
}
FASTLLM_INLINE vi sixteen_words(const Half* p, __mmask16 words) {
  return (vi)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(words, p));
}
#endif

// Sixteen rows of K as a chunk [steps][16] of words; `steps` is a multiple of 4.
template <class E>
FASTLLM_INLINE void pack_chunk(typename E::Word* to, const typename E::Elem* const* rows,
                               int64_t steps) {
#if defined(__AVX512F__)
  for (int64_t i = 0; i < steps; i += 16) {
    const int64_t n = steps - i < 16 ? steps - i : 16;
    const __mmask16 words = static_cast<__mmask16>((1u << n) - 1);
    vi r[16];
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) r[j] = sixteen_words(rows[j] + i * E::kPerWord, words);
    transpose_16x16(r);
    if (n == 16) {
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) __builtin_memcpy(to + (i + j) * kChunk, &r[j], sizeof r[j]);
    } else {
      alignas(64) vi rest[16];
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) rest[j] = r[j];
      __builtin_memcpy(to + i * kChunk, rest, n * sizeof rest[0]);
    }
  }
#else
  for (int64_t i = 0; i < steps; i += 4) {
    for (int j = 0; j < kChunk; j += 4) {
      __m128 a = _mm_castsi128_ps(four_words(rows[j] + i * E::kPerWord));
      __m128 b = _mm_castsi128_ps(four_words(rows[j + 1] + i * E::kPerWord));
      __m128 c = _mm_castsi128_ps(four_words(rows[j + 2] + i * E::kPerWord));
      __m128 d = _mm_castsi128_ps(four_words(rows[j + 3] + i * E::kPerWord));
      _MM_TRANSPOSE4_PS(a, b, c, d);
      float* column = reinterpret_cast<float*>(to) + i * kChunk + j;
      _mm_storeu_ps(column, a);
      _mm_storeu_ps(column + kChunk, b);
      _mm_storeu_ps(column + 2 * kChunk, c);
      _mm_storeu_ps(column + 3 * kChunk, d);
    }
  }
#endif
}

// Sixteen rows of V as words [16/w][Dv]; Dv is a multiple of 8.
FASTLLM_INLINE void pack_values(F32, float* to, const float* const* rows, int64_t dim) {
  for (int r = 0; r < kChunk; ++r)
    for (int64_t d = 0; d < dim; d += 8) __builtin_memcpy(to + r * dim + d, rows[r] + d, 32);
}
FASTLLM_INLINE void pack_values(F16, float* to, const Half* const* rows, int64_t dim) {
  for (int r = 0; r < kChunk; ++r)
    for (int64_t d = 0; d < dim; d += 4) {
      const __m128i four = four_words(rows[r] + d);
      __builtin_memcpy(to + r * dim + d, &four, sizeof four);
    }
}
FASTLLM_INLINE void pack_values(Bf16, uint32_t* to, const uint16_t* const* rows, int64_t dim) {
  for (int r = 0; r < kChunk; r += 2, to += dim) {
    const uint16_t *even = rows[r], *odd = rows[r + 1];
    int64_t d = 0;
#if defined(__AVX512F__)
    for (; d + 16 <= dim; d += 16) {
      const vi word = vload_u16(even + d) | vload_u16(odd + d) << 16;
      __builtin_memcpy(to + d, &word, sizeof word);
    }
#endif
    for (; d < dim; d += 8) {
      const __m128i a = _mm_loadu_si128((const __m128i*)(even + d)),
                    b = _mm_loadu_si128((const __m128i*)(odd + d));
      _mm_storeu_si128((__m128i*)(to + d), _mm_unpacklo_epi16(a, b));
      _mm_storeu_si128((__m128i*)(to + d + 4), _mm_unpackhi_epi16(a, b));
    }
  }
}

// Natural rows of K and V: position p at k + p * k_stride, v + p * v_stride (in elements).
template <class Elem>
struct NaturalRows {
  const Elem *k, *v;
  int64_t k_stride, v_stride;
};

// Bits 0 to n - 1.
FASTLLM_INLINE uint64_t first_bits(int64_t n) {
  return n >= kTile ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
}

// Asks for 16 rows of a later tile while 16 rows of this one are packed: strides of a fused
// projection are beyond what the hardware's prefetcher follows.
template <class Elem>
FASTLLM_INLINE void prefetch_rows(const Elem* rows, int64_t stride, int64_t dim) {
  for (int r = 0; r < kChunk; ++r)
    for (int64_t line = 0; line < dim; line += 64 / static_cast<int64_t>(sizeof(Elem)))
      _mm_prefetch(reinterpret_cast<const char*>(rows + r * stride + line), _MM_HINT_T0);
}

// The words of the first `positions` of one tile, rounded up to chunks. A position whose bit of
// `visible` is 0 becomes zeros: what lies there is not read. No words of V are made if v_words is
// null. `next` are the rows wanted after these.
template <class E>
static void pack_tile(typename E::Word* k_words, typename E::Word* v_words,
                      const NaturalRows<typename E::Elem>& from,
                      const NaturalRows<typename E::Elem>& next, uint64_t visible,
                      int64_t positions, int64_t dim, int64_t value_dim) {
  using Elem = typename E::Elem;
  const Elem* zeros = reinterpret_cast<const Elem*>(kZeroRow);
  const Elem *k[kTile], *v[kTile];
  const int end = static_cast<int>(divide_up(positions, kChunk) * kChunk);
  for (int r = 0; r < end; ++r) {
    const bool seen = visible >> r & 1;
    k[r] = seen ? from.k + r * from.k_stride : zeros;
    v[r] = seen ? from.v + r * from.v_stride : zeros;
  }
  const int64_t steps = dim / E::kPerWord;
  for (int r = 0; r < end; r += kChunk) {
    prefetch_rows(next.k + r * next.k_stride, next.k_stride, dim);
    pack_chunk<E>(k_words + r * steps, k + r, steps);
  }
  for (int r = 0; r < end; r += kChunk) {
    if (next.v != next.k) prefetch_rows(next.v + r * next.v_stride, next.v_stride, value_dim);
    if (v_words) pack_values(E{}, v_words + r / E::kPerWord * value_dim, v + r, value_dim);
  }
}

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
