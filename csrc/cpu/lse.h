// Log-sum-exp of a row of logits, over fixed tiles of 512 columns merged in ascending order. One
// routine for the sampler and the losses, so that a rollout's log-probabilities equal the
// training's bit for bit.
//   row: tiles t give (m_t, s_t) = (max, sum exp(x - m_t));
//        M = max m_t;  S = sum_t s_t * exp(m_t - M)
//   log p(x) = (x - M) - log(S): subtracting M first keeps the digits of small log-probabilities.
#pragma once
#include "cpu/simd.h"

namespace fastllm::FASTLLM_ISA {

constexpr int64_t kLseTile = 512;

struct TileLse {
  float max, sum;
};
struct RowLse {
  float max, sum, log_sum;
};

// log1p(f) = f - f^2/2 + f^3 P(f) for f in [sqrt(1/2) - 1, sqrt(2) - 1], relative error 8e-10
// before rounding (P: weighted least squares on Chebyshev points, of degree 8), plus exponent *
// ln2.
FASTLLM_INLINE vf log_of_parts(vf f, vf exponent) {
  vf p = vset(6.7527964711e-2f);
  p = vfma(p, f, vset(-1.1670621485e-1f));
  p = vfma(p, f, vset(1.1882229894e-1f));
  p = vfma(p, f, vset(-1.2406070530e-1f));
  p = vfma(p, f, vset(1.4220520854e-1f));
  p = vfma(p, f, vset(-1.6668002307e-1f));
  p = vfma(p, f, vset(2.0002064109e-1f));
  p = vfma(p, f, vset(-2.5000008941e-1f));
  p = vfma(p, f, vset(3.3333313465e-1f));
  const vf square = f * f;
  vf tail = p * (square * f);
  tail = vfma(exponent, vset(-2.12194440e-4f), tail);  // ln2 in two parts, the high one exact
  tail = vfma(square, vset(-0.5f), tail);
  return vfma(exponent, vset(0.693359375f), f + tail);
}

// Natural logarithm within 2 ulp of normal positive x; 0 gives -inf, negative x and NaN give NaN.
// Denormals count as zero.
FASTLLM_INLINE vf vlog(vf x) {
  // Taking sqrt(1/2) off the bits before the exponent is read puts the mantissa in [sqrt(1/2),
  // sqrt(2)).
  const vi shifted = vbits(x) - vseti(0x3f3504f3);
  const vi e = shifted >> 23;
  const vf m = vbits((shifted & vseti(0x007fffff)) + vseti(0x3f3504f3));
  vf y = log_of_parts(m - 1.f, __builtin_convertvector(e, vf));
  y = x < vset(1.17549435e-38f) ? vset(-__builtin_inff()) : y;
  y = x < vset(0.f) ? vset(__builtin_nanf("")) : y;
  y = x == vset(__builtin_inff()) ? x : y;
  return x != x ? x : y;
}
FASTLLM_INLINE float log1(float x) { return vlog(vset(x))[0]; }

// One tile; n is a multiple of VL (pad with -inf). NaN and +inf in x make the sum NaN.
static inline TileLse tile_lse(const float* x, int64_t n) {
  vf top = vset(-__builtin_inff());
  for (int64_t c = 0; c < n; c += VL) top = vmax(vload(x + c), top);
  const float max = vhmax(top);
  const vf base = vset(max == -__builtin_inff() ? 0.f : max);
  vf even = vset(0.f), odd = vset(0.f);
  int64_t c = 0;
  for (; c + 2 * VL <= n; c += 2 * VL) {
    even += vexp(vload(x + c) - base);
    odd += vexp(vload(x + c + VL) - base);
  }
  if (c < n) even += vexp(vload(x + c) - base);
  return {max, vsum(even + odd)};
}

// Tiles in ascending order; `stride` floats from one tile to the next, max and sum side by side.
static inline RowLse merge_tiles(const float* tiles, int64_t count, int64_t stride) {
  float max = -__builtin_inff();
  for (int64_t t = 0; t < count; ++t) max = tiles[t * stride] > max ? tiles[t * stride] : max;
  const float base = max == -__builtin_inff() ? 0.f : max;
  float sum = 0.f;
  for (int64_t t = 0; t < count; t += VL) {
    const int64_t n = count - t < VL ? count - t : VL;
    vf m = vset(base);
    for (int64_t i = 0; i < n; ++i) m[i] = tiles[(t + i) * stride];
    const vf scale = vexp(m - base);
    for (int64_t i = 0; i < n; ++i) sum = sum + tiles[(t + i) * stride + 1] * scale[i];
  }
  return {max, sum, log1(sum)};
}

// Whether the row has a distribution: no NaN, no +inf, not all -inf.
FASTLLM_INLINE bool is_valid(const RowLse& row) {
  return row.sum > 0.f && row.sum < __builtin_inff() && row.max < __builtin_inff();
}
FASTLLM_INLINE float log_prob(const RowLse& row, float x) { return (x - row.max) - row.log_sum; }

// Columns of tile t as kLseTile floats or fewer, a multiple of VL: the row itself, or its padded
// copy.
FASTLLM_INLINE const float* padded_tile(const float* row, int64_t columns, int64_t t, float* copy,
                                        int64_t* n) {
  const int64_t begin = t * kLseTile;
  *n = columns - begin < kLseTile ? columns - begin : kLseTile;
  if (*n % VL == 0) return row + begin;
  const int64_t padded = (*n + VL - 1) / VL * VL;
  for (int64_t i = 0; i < padded; ++i) copy[i] = i < *n ? row[begin + i] : -__builtin_inff();
  *n = padded;
  return copy;
}

}  // namespace fastllm::FASTLLM_ISA
