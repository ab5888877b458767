// What the losses over a vocabulary do to a row of logits: scaling in place, its log-sum-exp by the
// shared tiles, and loops over vectors of it.
#pragma once
#include "cpu/integers.h"
#include "cpu/lse.h"
#include "ops_core.h"

namespace fastllm::FASTLLM_ISA {
namespace {

constexpr float kInf = __builtin_inff();

FASTLLM_INLINE vf squash(vf x) { return tanh_of(x, vexp(vabs(x) * vset(-2.f))); }

// The first n floats at p, the others `fill`.
FASTLLM_INLINE vf vload_part(const float* p, int64_t n, float fill) {
  return n >= VL ? vload(p) : load_n(p, n, fill);
}
template <class T>
FASTLLM_INLINE void store_part(T* p, vf v, int64_t n) {
  if (n >= VL)
    store(p, v);
  else
    store_n(p, v, n);
}

// Logits become z = cap(logit) * inverse temperature, in place: what the sampler multiplies by.
static void scale_row(float* row, int64_t n, const LogitScale& s) {
  if (!s.changes()) return;
  const vf cap = vset(s.softcap), to_cap = vset(s.softcap != 0.f ? 1.f / s.softcap : 0.f);
  for (int64_t c = 0; c < n; c += VL) {
    vf x = vload_part(row + c, n - c, 0.f);
    if (s.softcap != 0.f) x = cap * squash(x * to_cap);
    store_part(row + c, x * s.inverse_temperature, n - c);
  }
}

// d z / d logit of a scaled logit z.
struct Slope {
  bool capped;
  float inverse_temperature, back;
  explicit Slope(const LogitScale& s)
      : capped(s.softcap != 0.f),
        inverse_temperature(s.inverse_temperature),
        back(capped ? 1.f / (s.softcap * s.inverse_temperature) : 0.f) {}
  inline __attribute__((always_inline)) vf at(vf z) const {
    const vf t = z * back;
    return capped ? inverse_temperature * (vset(1.f) - t * t) : vset(inverse_temperature);
  }
};

// Statistics of a row of scaled logits; `stats` holds two floats a tile.
static RowLse row_lse(const float* row, int64_t n, float* stats) {
  alignas(64) float copy[kLseTile];
  const int64_t tiles = divide_up(n, kLseTile);
  for (int64_t t = 0; t < tiles; ++t) {
    int64_t width;
    const float* x = padded_tile(row, n, t, copy, &width);
    const TileLse lse = tile_lse(x, width);
    stats[2 * t] = lse.max;
    stats[2 * t + 1] = lse.sum;
  }
  return merge_tiles(stats, tiles, 2);
}
FASTLLM_INLINE float lse_of(const RowLse& r) {
  return is_valid(r) ? r.max + r.log_sum : __builtin_nanf("");
}

// The sum over columns of f(column, live lanes), tiles of 512 added up in double: f gives 0 in dead
// lanes.
template <class F>
static double sum_columns(int64_t n, F f) {
  double total = 0.0;
  for (int64_t begin = 0; begin < n; begin += kLseTile) {
    const int64_t end = smaller(begin + kLseTile, n);
    vf sum = vset(0.f);
    for (int64_t c = begin; c < end; c += VL) sum += f(c, end - c);
    total += vsum(sum);
  }
  return total;
}

// p * x with 0 * infinity = 0.
FASTLLM_INLINE vf weighted(vf p, vf x) { return p > vset(0.f) ? p * x : (p != p ? p : vset(0.f)); }

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
