// Codes and scales of one group of columns in every quantized format: the twins of
// fastllm/ops/quantize_rules.py, a row of the weight in each lane.
#pragma once
#include "cpu/quant_codes.h"
#include "cpu/quantize_super.h"
#include "cpu/quantize_write.h"

namespace fastllm::FASTLLM_ISA {
namespace {

FASTLLM_INLINE vi vtruncate(vf x) { return __builtin_convertvector(x, vi); }
FASTLLM_INLINE vi vclampi(vi x, int low, int high) {
  x = x < low ? vseti(low) : x;
  return x > high ? vseti(high) : x;
}

// q4_0, q5_0: the value of largest magnitude, sign kept, becomes code 0.
FASTLLM_INLINE vf around_zero(const Columns& g, int zero, vi* codes) {
  vf peak = g.value(0), most = vabs(peak);
  for (int c = 1; c < g.count; ++c) {
    const vf x = g.value(c);
    const vi take = vabs(x) > most;
    peak = take ? x : peak;
    most = take ? vabs(x) : most;
  }
  const vf d = peak / static_cast<float>(-zero), factor = inverse(d);
  const vf middle = vset(static_cast<float>(zero) + 0.5f);
  for (int c = 0; c < g.count; ++c)
    codes[c] = vclampi(vtruncate(g.value(c) * factor + middle), 0, 2 * zero - 1);
  return d;
}

// q4_1, q5_1: the smallest value becomes code 0, the largest the last one.
struct Affine {
  vf d, m;
};
FASTLLM_INLINE Affine from_minimum(const Columns& g, int top, vi* codes) {
  vf low = g.value(0), high = low;
  for (int c = 1; c < g.count; ++c) {
    low = vmin(g.value(c), low);
    high = vmax(g.value(c), high);
  }
  const vf d = (high - low) / static_cast<float>(top), factor = inverse(d);
  for (int c = 0; c < g.count; ++c)
    codes[c] = vclampi(vtruncate((g.value(c) - low) * factor + 0.5f), 0, top);
  return {d, low};
}

FASTLLM_INLINE vf magnitude_peak(const Columns& g) {
  vf most{};
  for (int c = 0; c < g.count; ++c) most = vmax(vabs(g.value(c)), most);
  return most;
}

// q8_0: halves go away from zero.
FASTLLM_INLINE vf signed_bytes(const Columns& g, vi* codes) {
  const vf d = magnitude_peak(g) / 127.f, factor = inverse(d);
  for (int c = 0; c < g.count; ++c) {
    const vf scaled = g.value(c) * factor, size = vabs(scaled);
    vi whole = vtruncate(size);
    whole -= size - __builtin_convertvector(whole, vf) >= 0.5f;  // a mask is -1
    whole = vclampi(whole, 0, 127);  // of NaN it is the least integer, which has no negative
    codes[c] = scaled < 0.f ? -whole : whole;
  }
  return d;
}

// d rounded to 16 significant bits: a code times it is exact in fp32.
FASTLLM_INLINE vf short_scale(vf d) {
  const vi bits = vbits(d);
  return vbits((bits + 0x7f + ((bits >> 8) & 1)) & ~0xff);
}

FASTLLM_INLINE void nearest_bytes(const Columns& g, vf d, vi* codes) {
  const vf factor = inverse(d);
  for (int c = 0; c < g.count; ++c)
    codes[c] = vtruncate(vclamp(vround(g.value(c) * factor), vset(-127.f), vset(127.f)));
}

// The nearest e4m3 (4 exponent bits, bias 7, largest 448) of |x| <= 448, ties to even.
FASTLLM_INLINE vi e4m3_bits(vf x) {
  const vi bits = vbits(x), size = bits & 0x7fffffff;
  const vi normal = (size - (120 << 23) + 0x7ffff + ((size >> 20) & 1)) >> 20;
  // Below 2^-6 the distance of neighbours is 2^-9, which is that of floats from 2^14 on.
  const vi small = vbits(vbits(size) + 16384.f) - vbits(vset(16384.f));
  return (size < vseti(121 << 23) ? small : normal) | ((bits >> 24) & 0x80);
}
FASTLLM_INLINE void nearest_e4m3(const Columns& g, vf d, vi* codes) {
  const vf factor = inverse(d);
  for (int c = 0; c < g.count; ++c)
    codes[c] = e4m3_bits(vclamp(g.value(c) * factor, vset(-448.f), vset(448.f)));
}

// Between entries i and i + 1, exact: the sum of two bf16.
constexpr float nf4_middle(int i) {
  return (__builtin_bit_cast(float, static_cast<uint32_t>(kNormalFloat[i]) << 16) +
          __builtin_bit_cast(float, static_cast<uint32_t>(kNormalFloat[i + 1]) << 16)) /
         2;
}
// The nearest entry of the table; at equal distance the lower one.
FASTLLM_INLINE void nearest_nf4(const Columns& g, vf d, vi* codes) {
  const vf factor = inverse(d);
  for (int c = 0; c < g.count; ++c) {
    const vf x = g.value(c) * factor;
    vi code{};
#pragma GCC unroll 15
    for (int i = 0; i < 15; ++i) code -= x > nf4_middle(i);
    codes[c] = code;
  }
}

// The searched formats: codes u from the rounded scales.
FASTLLM_INLINE vf searched_signed(const Columns& g, int offset, vi* codes) {
  const float low = offset ? static_cast<float>(-offset) : -127.f;
  const float high = offset ? static_cast<float>(offset - 1) : 127.f;
  const Starts& starts = offset == 8 ? kSigned8 : offset == 16 ? kSigned16 : kSigned127;
  const vf d = vround_f16(fit_signed(g, low, high, starts).d), factor = inverse(d);
  for (int c = 0; c < g.count; ++c)
    codes[c] = vtruncate(vclamp(vround(g.value(c) * factor), vset(low), vset(high))) + offset;
  return d;
}
FASTLLM_INLINE Affine searched_zero(const Columns& g, vi* codes) {
  const SignedFit f = fit_zero(g, 15.f);
  const vf d = vround_f16(f.d), z = f.squares, factor = inverse(d);
  for (int c = 0; c < g.count; ++c)
    codes[c] = vtruncate(vclamp(vround(g.value(c) * factor) + z, vset(0.f), vset(15.f)));
  return {d, z};
}
FASTLLM_INLINE Affine searched_affine(const Columns& g, float levels, vi* codes) {
  const AffineFit f = fit_affine<true>(g, levels);
  const vf d = vround_f16(f.d), m = vround_f16(f.c), factor = inverse(d);
  for (int c = 0; c < g.count; ++c)
    codes[c] = vtruncate(vclamp(vround((g.value(c) - m) * factor), vset(0.f), vset(levels)));
  return {d, m};
}

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
