// One vocabulary of float vectors for every ISA level: vf holds VL floats. Everything has internal
// linkage, so that no object compiled with high flags can lend a weak symbol to the rest of the
// program.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "common/tensor.h"

#define FASTLLM_INLINE static inline __attribute__((always_inline, unused))

namespace fastllm::FASTLLM_ISA {

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX2__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif

// GCC's own vector types: + - * / and comparisons are operators, and arrays of them stay in
// registers where arrays of __m512 have been seen to be kept on the stack.
typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));

FASTLLM_INLINE vf vset(float x) { return x - vf{}; }
FASTLLM_INLINE vi vseti(int32_t x) { return x - vi{}; }
FASTLLM_INLINE vf vbits(vi x) { return reinterpret_cast<vf>(x); }
FASTLLM_INLINE vi vbits(vf x) { return reinterpret_cast<vi>(x); }

FASTLLM_INLINE vf vload(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
FASTLLM_INLINE void vstore(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }

// a * b + c in one rounding; two roundings at the generic level, which has no FMA.
FASTLLM_INLINE vf vfma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
// The scalar twin of vfma, for tails that must equal the vector path bit for bit.
FASTLLM_INLINE float sfma(float a, float b, float c) {
#if defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

FASTLLM_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
FASTLLM_INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }
FASTLLM_INLINE vf vsqrt(vf a) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)a);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)a);
#else
  return (vf)_mm_sqrt_ps((__m128)a);
#endif
}
FASTLLM_INLINE vf vabs(vf a) { return vbits(vbits(a) & vseti(0x7fffffff)); }

// bf16 <-> f32. Rounding is to nearest even in integers at every level (vcvtneps2bf16 would flush
// denormals), NaN stays NaN.
FASTLLM_INLINE float bf16_to_f32(uint16_t x) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(x) << 16);
}
FASTLLM_INLINE uint16_t f32_to_bf16(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
FASTLLM_INLINE float round_bf16(float x) { return bf16_to_f32(f32_to_bf16(x)); }

// VL unsigned 16-bit values, one to a lane.
FASTLLM_INLINE vi vload_u16(const void* p) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (vi)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  return (vi)_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)p));
#endif
}
// The low half of each lane.
FASTLLM_INLINE void vstore_u16(void* p, vi bits) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)bits));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)bits, (__m256i)bits);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  _mm_storel_epi64((__m128i*)p, _mm_packus_epi32((__m128i)bits, (__m128i)bits));
#endif
}

FASTLLM_INLINE vf vload_bf16(const uint16_t* p) { return vbits(vload_u16(p) << 16); }
// The bf16 bits of each lane, rounded to nearest even: in its high half, whose low half then holds
// anything, or alone in its low half.
FASTLLM_INLINE vi vround_bf16_high(vf x) {
  const vi bits = vbits(x);
  return (x != x) ? (bits | 0x400000) : bits + (((bits >> 16) & 1) + 0x7fff);
}
FASTLLM_INLINE vi vround_bf16_bits(vf x) { return (vround_bf16_high(x) >> 16) & 0xffff; }
FASTLLM_INLINE vf vround_bf16(vf x) { return vbits(vround_bf16_bits(x) << 16); }
FASTLLM_INLINE void vstore_bf16(uint16_t* p, vf x) { vstore_u16(p, vround_bf16_bits(x)); }

// IEEE half precision, a type of its own: uint16_t is bf16.
struct Half {
  uint16_t bits;
};

// The value of the half in the low 16 bits of each lane (the rest is zero).
FASTLLM_INLINE vf vhalf_to_float(vi half) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)half));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)half, (__m256i)half);
  return (vf)_mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  // With the exponent field moved into place, 2^112 corrects the bias, denormals included.
  const vi magnitude = (half & 0x7fff) << 13;
  const vi special = magnitude | vseti(0x7f800000);  // inf and NaN
  const vf value =
      (half & 0x7c00) == 0x7c00 ? vbits(special) : vbits(magnitude) * vbits(vseti(0x77800000));
  return vbits(vbits(value) | ((half & 0x8000) << 16));
#endif
}
// The half of each lane in its low 16 bits, rounded to nearest even.
FASTLLM_INLINE vi vround_f16_bits(vf x) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepu16_epi32(_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  return (vi)_mm256_cvtepu16_epi32(_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  const vi bits = vbits(x), magnitude = bits & vseti(0x7fffffff);
  const vi normal = ((magnitude + 0xfff + ((magnitude >> 13) & 1)) >> 13) - (112 << 10);
  // Below 2^-14 the distance of halves is 2^-24, which is that of floats at 1/2: adding rounds.
  const vi small = vbits(vbits(magnitude) + vset(0.5f)) - vbits(vset(0.5f));
  vi half = magnitude < vseti(0x38800000) ? small : normal;
  half = magnitude >= vseti(0x477ff000) ? vseti(0x7c00) : half;
  half = magnitude > vseti(0x7f800000) ? ((magnitude >> 13) & 0x3ff) | 0x7e00 : half;
  return half | ((bits >> 16) & 0x8000);
#endif
}
FASTLLM_INLINE vf vload_f16(const void* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  return vhalf_to_float(vload_u16(p));
#endif
}
FASTLLM_INLINE void vstore_f16(void* p, vf x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  vstore_u16(p, vround_f16_bits(x));
#endif
}
FASTLLM_INLINE vf vround_f16(vf x) { return vhalf_to_float(vround_f16_bits(x)); }
FASTLLM_INLINE float f16_to_f32(uint16_t x) { return vhalf_to_float(vseti(x))[0]; }
FASTLLM_INLINE uint16_t f32_to_f16(float x) {
  return static_cast<uint16_t>(vround_f16_bits(vset(x))[0]);
}
// Typed access, so that one kernel body serves f32, bf16 and f16.
FASTLLM_INLINE vf load(const float* p) { return vload(p); }
FASTLLM_INLINE vf load(const uint16_t* p) { return vload_bf16(p); }
FASTLLM_INLINE void store(float* p, vf v) { vstore(p, v); }
FASTLLM_INLINE void store(uint16_t* p, vf v) { vstore_bf16(p, v); }
FASTLLM_INLINE vf load(const Half* p) { return vload_f16(p); }
FASTLLM_INLINE void store(Half* p, vf v) { vstore_f16(p, v); }
FASTLLM_INLINE float load1(const float* p) { return *p; }
FASTLLM_INLINE float load1(const uint16_t* p) { return bf16_to_f32(*p); }
FASTLLM_INLINE float load1(const Half* p) { return f16_to_f32(p->bits); }
FASTLLM_INLINE void store1(float* p, float v) { *p = v; }
FASTLLM_INLINE void store1(Half* p, float v) { p->bits = f32_to_f16(v); }
FASTLLM_INLINE void store1(uint16_t* p, float v) { *p = f32_to_bf16(v); }
// The first n < VL elements; the rest of the vector reads as `fill` and is not stored.
template <class T>
FASTLLM_INLINE vf load_n(const T* p, int64_t n, float fill = 0.f) {
  vf v = vset(fill);
  for (int64_t i = 0; i < n; ++i) v[i] = load1(p + i);
  return v;
}
template <class T>
FASTLLM_INLINE void store_n(T* p, vf v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store1(p + i, v[i]);
}

// Lane sums and maxima in one fixed order: halves are folded onto each other.
FASTLLM_INLINE float vsum(vf v) {
  float lane[VL];
  vstore(lane, v);
  for (int width = VL / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}
FASTLLM_INLINE float vhmax(vf v) {
  float lane[VL];
  vstore(lane, v);
  for (int width = VL / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
  return lane[0];
}

// e^r of the remainder r = x - k ln2, |r| <= ln2/2: two steps of ln2 (Cody-Waite), then a polynomial
// of degree 6.
FASTLLM_INLINE vf vexp_reduced(vf k, vf x) {
  vf r = vfma(k, vset(-0.693359375f), x);
  r = vfma(k, vset(2.12194440e-4f), r);
  vf p = vset(1.9875691500e-4f);
  p = vfma(p, r, vset(1.3981999507e-3f));
  p = vfma(p, r, vset(8.3334519073e-3f));
  p = vfma(p, r, vset(4.1665795894e-2f));
  p = vfma(p, r, vset(1.6666665459e-1f));
  p = vfma(p, r, vset(5.0000001201e-1f));
  return vfma(p, r * r, r) + 1.f;
}

// e^x within 2 ulp: x = k ln2 + r, |r| <= ln2/2, a degree-6 polynomial in r (Cody-Waite reduction).
// Below -87.33 the result is 0 (a softmax needs no denormals); above 88.72 it is inf; NaN stays
// NaN.
FASTLLM_INLINE vf vexp(vf x) {
  const vf clamped = vmin(vmax(x, vset(-87.33f)), vset(88.72f));
  // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
  const vf magic = vset(12582912.f);
  const vf shifted = vfma(clamped, vset(1.44269504088896341f), magic);
  const vf k = shifted - magic;
  const vf p = vexp_reduced(k, clamped);
  // k can be 128 at the top: scale in two steps so that the exponent field never overflows.
  const vi ki = vbits(shifted) - vbits(magic);
  const vi half = ki >> 1;
  vf y = p * vbits((half + 127) << 23) * vbits((ki - half + 127) << 23);
  y = x < vset(-87.33f) ? vset(0.f) : y;
  y = x > vset(88.72f) ? vset(__builtin_inff()) : y;
  return x != x ? x : y;
}

// tanh x within 2 ulp, given e = exp(-2|x|); NaN stays NaN. Up to 0.625 x + x^3 P(x^2) (P: minimax,
// relative error 3e-9), above (1 - e) / (1 + e).
FASTLLM_INLINE vf tanh_of(vf x, vf e) {
  const vf square = x * x;
  vf p = vset(2.1429588e-3f);
  p = vfma(p, square, vset(-8.1773950e-3f));
  p = vfma(p, square, vset(2.1700701e-2f));
  p = vfma(p, square, vset(-5.3946763e-2f));
  p = vfma(p, square, vset(1.3333206e-1f));
  p = vfma(p, square, vset(-3.3333331e-1f));
  const vf small = vfma(p * square, x, x);
  const vf large = (vset(1.f) - e) / (vset(1.f) + e);
  const vi sign = vbits(x) & vseti(static_cast<int32_t>(0x80000000u));
  return vabs(x) < vset(0.625f) ? small : vbits(vbits(large) | sign);
}

// Calls body with a value of the element type: dispatch_float(dtype, [&](auto t) { decltype(t) ...
// }).
template <class Body>
FASTLLM_INLINE void dispatch_float(DType dtype, Body body) {
  if (dtype == DType::bf16)
    body(uint16_t{});
  else
    body(float{});
}

// The same with halves.
template <class Body>
FASTLLM_INLINE void dispatch_stored_float(DType dtype, Body body) {
  if (dtype == DType::f16)
    body(Half{});
  else
    dispatch_float(dtype, body);
}

}  // namespace fastllm::FASTLLM_ISA
