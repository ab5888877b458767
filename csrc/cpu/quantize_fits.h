// The scales of a group of columns that make the weighted squared error of its values small: the
// twins of fastllm/ops/quantize_search.py, a row of the weight in each lane. Sums ascend and nothing
// is fused, so that every level and the reference give the same bits.
#pragma once
#include "cpu/packed.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// A group of columns as kernels see it: column c of lane r at [c * kPanelRows + r].
struct Columns {
  const float *x, *w;
  int count;
  vf value(int c) const { return vload(x + c * kPanelRows); }
  vf weight(int c) const { return vload(w + c * kPanelRows); }
  Columns at(int c, int n) const { return {x + c * kPanelRows, w + c * kPanelRows, n}; }
};

// Where the largest value may land, counted from the first code, and other starts of the fits.
struct Starts {
  int count;
  float at[12];
};
constexpr Starts kSigned8 = {
    12, {-7.f, -7.5f, -8.f, -8.5f, -9.f, -9.5f, -10.f, -10.5f, 7.f, 7.5f, 8.f, 9.f}};
constexpr Starts kSigned16 = {
    12, {-15.f, -15.5f, -16.f, -16.5f, -17.f, -17.5f, -18.f, -18.5f, 15.f, 15.5f, 16.f, 17.f}};
constexpr Starts kSigned32 = {9, {-28.f, -29.f, -30.f, -31.f, -32.f, -33.f, 29.f, 30.f, 31.f}};
constexpr Starts kSigned127 = {6, {-126.f, -126.5f, -127.f, -127.5f, 126.f, 126.5f}};
constexpr Starts kZero = {4, {14.f, 15.f, 16.f, 17.5f}};
constexpr Starts kAffine = {8, {-3.f, -2.f, -1.f, -.5f, 0.f, .5f, 1.f, 2.f}};
constexpr float kShifts[3] = {0.f, -1.f, 1.f};
constexpr float kOneCode = 1e-5f;
constexpr int kRounds = 3;

FASTLLM_INLINE vf vround(vf x) { return (x + 12582912.f) - 12582912.f; }  // to even, |x| < 2^22
FASTLLM_INLINE vf vclamp(vf x, vf low, vf high) { return vmin(vmax(x, low), high); }
FASTLLM_INLINE vf inverse(vf x) {
  const vf y = vset(1.f) / x;
  return vabs(y) < vset(__builtin_inff()) ? y : vset(0.f);
}
// a / b where b is positive, else 0.
FASTLLM_INLINE vf ratio(vf a, vf b) {
  const vf y = a / (b > 0.f ? b : vset(1.f));
  return b > 0.f ? y : vset(0.f);
}

struct SignedFit {
  vf gain, d, squares;
  void keep(const SignedFit& f) {
    const vi take = f.gain > gain;
    gain = take ? f.gain : gain;
    d = take ? f.d : d;
    squares = take ? f.squares : squares;
  }
};

FASTLLM_INLINE vf peak_of(const Columns& g) {
  vf most = g.value(0), least = most;
  for (int c = 1; c < g.count; ++c) {
    const vf x = g.value(c);
    most = vmax(x, most);
    least = vmin(x, least);
  }
  return most > -least ? most : least;
}

static inline SignedFit fit_signed_once(const Columns& g, vf factor, vf low, vf high) {
  vf a{}, b{};
  for (int c = 0; c < g.count; ++c) {
    const vf x = g.value(c), v = vclamp(vround(x * factor), low, high), wv = g.weight(c) * v;
    a = a + wv * x;
    b = b + wv * v;
  }
  const vf d = ratio(a, b);
  return {a * d, d, b};
}

// d of values d v, v from low to high.
static inline SignedFit fit_signed(const Columns& g, float low, float high, const Starts& starts) {
  const vf to_peak = inverse(peak_of(g));
  SignedFit best = {vset(-1.f), vf{}, vf{}};
  for (int i = 0; i < starts.count; ++i) {
    const SignedFit f = fit_signed_once(g, starts.at[i] * to_peak, vset(low), vset(high));
    best.keep(f);
    best.keep(fit_signed_once(g, inverse(f.d), vset(low), vset(high)));
  }
  return best;
}

// (d, z) of values d (u - z), u and z from 0 to levels; `squares` holds z.
static inline SignedFit fit_zero_once(const Columns& g, vf low, vf factor, float shift,
                                      float levels) {
  const vf z = vclamp(vround(-low * factor) + shift, vset(0.f), vset(levels)), top = levels - z;
  SignedFit f = fit_signed_once(g, factor, -z, top);
  f.squares = z;
  return f;
}
static inline SignedFit fit_zero(const Columns& g, float levels) {
  vf low{}, high{};
  for (int c = 0; c < g.count; ++c) {
    low = vmin(g.value(c), low);
    high = vmax(g.value(c), high);
  }
  const vf to_span = inverse(high - low);
  SignedFit best = {vset(-1.f), vf{}, vf{}};
  for (const float shift : kShifts)
    for (int i = 0; i < kZero.count; ++i) {
      const SignedFit f = fit_zero_once(g, low, kZero.at[i] * to_span, shift, levels);
      best.keep(f);
      best.keep(fit_zero_once(g, low, inverse(f.d), shift, levels));
    }
  return best;
}

// Values d u + m, u from 0 to levels: m is c + low.
struct AffineFit {
  vf gain, d, c, squares;
  void keep(const AffineFit& f) {
    const vi take = f.gain > gain;
    gain = take ? f.gain : gain;
    d = take ? f.d : d;
    c = take ? f.c : c;
    squares = take ? f.squares : squares;
  }
};

// The range of values d u + m: of the smallest, which is at most 0 unless FREE.
struct Bounds {
  vf low, high;
};
template <bool FREE>
FASTLLM_INLINE Bounds bounds(const Columns& g) {
  vf low = FREE ? g.value(0) : vset(0.f), high = g.value(0);
  for (int c = 0; c < g.count; ++c) {
    low = vmin(g.value(c), low);
    high = vmax(g.value(c), high);
  }
  return {low, high};
}

template <bool FREE>
static inline AffineFit fit_affine_once(const Columns& g, vf low, vf start, vf factor, float levels,
                                        vf sw, vf sy) {
  vf su{}, suu{}, syu{};
  for (int k = 0; k < g.count; ++k) {
    const vf y = g.value(k) - low;
    const vf u = vclamp(vround((y - start) * factor), vset(0.f), vset(levels)),
             wu = g.weight(k) * u;
    su = su + wu;
    suu = suu + wu * u;
    syu = syu + wu * y;
  }
  const vf det = sw * suu - su * su;
  // Codes that (almost) all weight has in common determine one number: d, of their minimum.
  vf c = det > kOneCode * (sw * suu) ? ratio(suu * sy - su * syu, det) : start;
  c = suu > 0.f ? c : ratio(sy, sw);
  if constexpr (!FREE) c = vmin(c, -low);
  const vf rest = syu - c * su;
  const vf d = vmax(ratio(rest, suu), vset(0.f));
  return {c * (2.f * sy - c * sw) + d * (2.f * rest - d * suu), d, c, suu};
}

// d >= 0 and m, which is at most 0 unless FREE; `c` of the result is m.
template <bool FREE>
static inline AffineFit fit_affine(const Columns& g, float levels) {
  const auto [low, high] = bounds<FREE>(g);
  vf sw{}, sy{};
  for (int c = 0; c < g.count; ++c) {
    sw = sw + g.weight(c);
    sy = sy + g.weight(c) * (g.value(c) - low);
  }
  const vf to_span = inverse(high - low);
  AffineFit best = {vset(-1.f), vf{}, vf{}, vf{}};
  for (int i = 0; i < kAffine.count; ++i) {
    const vf factor = (levels + kAffine.at[i]) * to_span;
    const AffineFit f = fit_affine_once<FREE>(g, low, vf{}, factor, levels, sw, sy);
    best.keep(f);
    best.keep(fit_affine_once<FREE>(g, low, f.c, inverse(f.d), levels, sw, sy));
  }
  best.c = best.c + low;
  return best;
}

// The half for which `count` values are closest to integers -most - 1 .. most of it.
static inline vf fit_step(const vf* values, const vf* weights, int count, float most, float least) {
  vf peak = vabs(values[0]);
  for (int i = 1; i < count; ++i) peak = vmax(vabs(values[i]), peak);
  vf best{}, step{};
  for (float integer = most; integer >= least; integer -= 1.f) {
    const vf tried = vround_f16(peak / integer), factor = inverse(tried);
    vf error{};
    for (int i = 0; i < count; ++i) {
      const vf q = vclamp(vround(values[i] * factor), vset(-most - 1.f), vset(most));
      const vf away = values[i] - tried * q;
      error = error + weights[i] * away * away;
    }
    const vi take = integer == most ? vseti(-1) : error < best;
    best = take ? error : best;
    step = take ? tried : step;
  }
  return step;
}

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
