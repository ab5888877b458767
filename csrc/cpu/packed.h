// Packed weights as kernels see them: panels of 16 rows, so that lane r of a 16-lane vector is row
// r. The layouts are described in fastllm/ops/packed_layout.py.
#pragma once
#include "cpu/simd.h"

namespace fastllm::FASTLLM_ISA {

constexpr int kPanelRows = 16;
constexpr int NV = kPanelRows / VL;  // vectors to a panel
constexpr int kBlock = 32;           // columns under one scale

// How far ahead of its reads a tile of few rows asks for weights: two panels, which hides the short
// streams of small panels from the hardware prefetcher (one thread reads 26 GB/s without, 36 with),
// and no more than stays in the L1 cache: 8 KB into it against 32 KB into L2 are a tenth to a fifth
// faster for 8-bit weights of 4096 columns.
FASTLLM_INLINE int64_t prefetch_distance(int64_t panel_bytes) {
  const int64_t most = 8 << 10;
  return 2 * panel_bytes < most ? 2 * panel_bytes : most;
}
template <int LINES>
FASTLLM_INLINE void stream_lines(const void* p) {
#pragma GCC unroll 16
  for (int i = 0; i < LINES; ++i) __builtin_prefetch(static_cast<const char*>(p) + 64 * i, 0, 3);
}
// Lines that are read later than that, into the L2 cache.
template <int LINES>
FASTLLM_INLINE void prefetch_lines(const void* p) {
#pragma GCC unroll 16
  for (int i = 0; i < LINES; ++i) __builtin_prefetch(static_cast<const char*>(p) + 64 * i, 0, 2);
}

// The first lines of a range of weights, asked for before anything else is done.
FASTLLM_INLINE void prefetch_range(const void* p, int64_t bytes) {
  const int64_t most = 8 << 10;
  for (int64_t i = 0; i < bytes && i < most; i += 64)
    __builtin_prefetch(static_cast<const char*>(p) + i, 0, 2);
}

FASTLLM_INLINE vi vloadi(const void* p) {
  vi v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
FASTLLM_INLINE vi splat_word(const void* p) {
  int32_t word;
  __builtin_memcpy(&word, p, sizeof word);
  return vseti(word);
}

// a * b + c in one rounding at every level: without FMA through fp64, where the product is exact.
FASTLLM_INLINE vf vfma_once(vf a, vf b, vf c) {
#if defined(__AVX2__)
  return vfma(a, b, c);
#else
  const __m128 x = (__m128)a, y = (__m128)b, z = (__m128)c;
  const __m128d low = _mm_add_pd(_mm_mul_pd(_mm_cvtps_pd(x), _mm_cvtps_pd(y)), _mm_cvtps_pd(z));
  const __m128d high =
      _mm_add_pd(_mm_mul_pd(_mm_cvtps_pd(_mm_movehl_ps(x, x)), _mm_cvtps_pd(_mm_movehl_ps(y, y))),
                 _mm_cvtps_pd(_mm_movehl_ps(z, z)));
  return (vf)_mm_movelh_ps(_mm_cvtpd_ps(low), _mm_cvtpd_ps(high));
#endif
}

FASTLLM_INLINE __m128i fold_128(vi x, __m128i (*op)(__m128i, __m128i)) {
#if defined(__AVX512F__)
  const __m256i half = _mm512_castsi512_si256((__m512i)x),
                top = _mm512_extracti64x4_epi64((__m512i)x, 1);
  const __m128i a = op(_mm256_castsi256_si128(half), _mm256_castsi256_si128(top));
  const __m128i b = op(_mm256_extracti128_si256(half, 1), _mm256_extracti128_si256(top, 1));
  __m128i v = op(a, b);
#elif defined(__AVX2__)
  __m128i v = op(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
#else
  __m128i v = (__m128i)x;
#endif
  v = op(v, _mm_shuffle_epi32(v, 0x4e));
  return op(v, _mm_shuffle_epi32(v, 0xb1));
}
FASTLLM_INLINE __m128i max_128(__m128i a, __m128i b) { return _mm_max_epi32(a, b); }
FASTLLM_INLINE __m128i add_128(__m128i a, __m128i b) { return _mm_add_epi32(a, b); }
FASTLLM_INLINE __m128i addf_128(__m128i a, __m128i b) {
  return _mm_castps_si128(_mm_add_ps(_mm_castsi128_ps(a), _mm_castsi128_ps(b)));
}
FASTLLM_INLINE int32_t reduce_max(vi x) { return _mm_cvtsi128_si32(fold_128(x, max_128)); }
FASTLLM_INLINE int32_t reduce_add(vi x) { return _mm_cvtsi128_si32(fold_128(x, add_128)); }
FASTLLM_INLINE float reduce_add(vf x) {
  return _mm_cvtss_f32(_mm_castsi128_ps(fold_128(vbits(x), addf_128)));
}

}  // namespace fastllm::FASTLLM_ISA
