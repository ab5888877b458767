// K-quants: 256 columns share fp16 scales, their sub-blocks hold integers (see quantize_fits.h and
// fastllm/ops/quantize_search.py).
#pragma once
#include "cpu/quantize_fits.h"

namespace fastllm::FASTLLM_ISA {
namespace {

// Values (d sc) u - (dmin mn) in 8 sub-blocks of 32 columns, u from 0 to levels.
struct SuperMin {
  static constexpr int subs = 8, columns = 32;
  vf d, dmin, sc[subs], mn[subs];

  vf code(const Columns& sub, int i, int c, float levels) const {
    return vclamp(vround((sub.value(c) + dmin * mn[i]) * inverse(d * sc[i])), vset(0.f),
                  vset(levels));
  }
};

struct SubMin {
  vf error, sc, mn, drift;  // drift: sum of w ((d sc) u - x)
};
static inline SubMin sub_min_error(const Columns& sub, vf d, vf dmin, vf sc, vf mn, float levels) {
  const vf step = d * sc, low = dmin * mn, factor = inverse(step);
  vf error{}, drift{};
  for (int c = 0; c < sub.count; ++c) {
    const vf x = sub.value(c), w = sub.weight(c);
    const vf v = step * vclamp(vround((x + low) * factor), vset(0.f), vset(levels));
    const vf away = (v - low) - x;
    error = error + (w * away) * away;
    drift = drift + w * (v - x);
  }
  return {error, sc, mn, drift};
}

// The best integers of a sub-block next to (sc, mn).
static inline SubMin near_sub_min(const Columns& sub, const SuperMin& p, int i, vf sw,
                                  float levels) {
  const auto keep = [](SubMin& best, const SubMin& f) __attribute__((always_inline)) {
    const vi take = f.error < best.error;
    best.error = take ? f.error : best.error;
    best.sc = take ? f.sc : best.sc;
    best.mn = take ? f.mn : best.mn;
  };
  const vf to_integer = inverse(p.dmin), top = vset(63.f);
  SubMin best = {vset(__builtin_inff()), p.sc[i], p.mn[i], vf{}};
  for (const float shift : kShifts) {
    const vf sc = vclamp(p.sc[i] + shift, vset(0.f), top);
    const SubMin f = sub_min_error(sub, p.d, p.dmin, sc, p.mn[i], levels);
    keep(best, f);
    const vf moved = vclamp(vround(ratio(f.drift, sw) * to_integer), vset(0.f), top);
    keep(best, sub_min_error(sub, p.d, p.dmin, sc, moved, levels));
  }
  return best;
}

// The least-squares d and dmin of given codes and integers, as halves.
static inline void refit_super_min(const Columns& g, SuperMin& p, const vf* sw, const vf* sx,
                                   float levels) {
  vf aa{}, ab{}, bb{}, xa{}, xb{};
  for (int i = 0; i < SuperMin::subs; ++i) {
    const Columns sub = g.at(i * SuperMin::columns, SuperMin::columns);
    const vf low = p.dmin * p.mn[i], factor = inverse(p.d * p.sc[i]);
    vf su{}, suu{}, sxu{};
    for (int c = 0; c < sub.count; ++c) {
      const vf x = sub.value(c), u = vclamp(vround((x + low) * factor), vset(0.f), vset(levels));
      const vf wu = sub.weight(c) * u;
      su = su + wu;
      suu = suu + wu * u;
      sxu = sxu + wu * x;
    }
    const vf sc = p.sc[i], mn = p.mn[i];
    aa = aa + (sc * sc) * suu;
    ab = ab + (sc * mn) * su;
    bb = bb + (mn * mn) * sw[i];
    xa = xa + sc * sxu;
    xb = xb + mn * sx[i];
  }
  const vf det = aa * bb - ab * ab, zero{};
  const vi both = det > 1e-6f * (aa * bb);
  const vf alone = aa > 0.f ? ratio(xa + p.dmin * ab, aa) : p.d;
  const vf d = both ? ratio(xa * bb - xb * ab, det) : alone;
  const vf dmin = both ? ratio(xa * ab - xb * aa, det) : p.dmin;
  p.d = vround_f16(vmax(d, zero));
  p.dmin = vround_f16(vmax(dmin, zero));
}

FASTLLM_INLINE vf sub_integer(vf x, vf step) {
  return vclamp(vround(x * inverse(step)), vset(0.f), vset(63.f));
}

// The scales of the sub-blocks' ranges, than which no fit may be worse: weights take no part.
static inline SuperMin plain_super_min(const Columns& g, float levels) {
  vf s[SuperMin::subs], minus[SuperMin::subs], most{}, deepest{};
  for (int i = 0; i < SuperMin::subs; ++i) {
    const auto [low, high] = bounds<false>(g.at(i * SuperMin::columns, SuperMin::columns));
    s[i] = (high - low) / levels;
    minus[i] = vabs(low);
    most = vmax(s[i], most);
    deepest = vmax(minus[i], deepest);
  }
  SuperMin p;
  p.d = vround_f16(most / 63.f);
  p.dmin = vround_f16(deepest / 63.f);
  for (int i = 0; i < SuperMin::subs; ++i) {
    p.sc[i] = sub_integer(s[i], p.d);
    p.mn[i] = sub_integer(minus[i], p.dmin);
  }
  return p;
}

static inline SuperMin fit_super_min(const Columns& g, float levels) {
  constexpr int subs = SuperMin::subs, columns = SuperMin::columns;
  vf s[subs], minus[subs], suu[subs], sw[subs], sx[subs];
  for (int i = 0; i < subs; ++i) {
    const Columns sub = g.at(i * columns, columns);
    const AffineFit f = fit_affine<false>(sub, levels);
    s[i] = f.d;
    minus[i] = -f.c;
    suu[i] = f.squares;
    sw[i] = sx[i] = vf{};
    for (int c = 0; c < columns; ++c) {
      sw[i] = sw[i] + sub.weight(c);
      sx[i] = sx[i] + sub.weight(c) * sub.value(c);
    }
  }
  SuperMin p;
  p.d = fit_step(s, suu, subs, 63.f, 32.f);
  p.dmin = fit_step(minus, sw, subs, 63.f, 32.f);
  for (int i = 0; i < subs; ++i) {
    p.sc[i] = sub_integer(s[i], p.d);
    p.mn[i] = sub_integer(minus[i], p.dmin);
  }
  SuperMin best = p;
  vf least = vset(__builtin_inff());
  const auto keep = [&](const SuperMin& tried, vf error) __attribute__((always_inline)) {
    const vi take = error < least;
    least = take ? error : least;
    best.d = take ? tried.d : best.d;
    best.dmin = take ? tried.dmin : best.dmin;
    for (int i = 0; i < subs; ++i) {
      best.sc[i] = take ? tried.sc[i] : best.sc[i];
      best.mn[i] = take ? tried.mn[i] : best.mn[i];
    }
  };
  const SuperMin plain = plain_super_min(g, levels);
  vf of_plain{};
  for (int i = 0; i < subs; ++i)
    of_plain = of_plain + sub_min_error(g.at(i * columns, columns), plain.d, plain.dmin,
                                        plain.sc[i], plain.mn[i], levels)
                              .error;
  keep(plain, of_plain);
  for (int round = 0; round < kRounds; ++round) {
    if (round > 0) refit_super_min(g, p, sw, sx, levels);
    vf error{};
    for (int i = 0; i < subs; ++i) {
      const SubMin f = near_sub_min(g.at(i * columns, columns), p, i, sw[i], levels);
      error = error + f.error;
      p.sc[i] = f.sc;
      p.mn[i] = f.mn;
    }
    keep(p, error);
  }
  return best;
}

// Values (d sc) v in 16 sub-blocks of 16 columns, v from -32 to 31.
struct Super {
  static constexpr int subs = 16, columns = 16;
  vf d, sc[subs];

  vf code(const Columns& sub, int i, int c) const {
    return vclamp(vround(sub.value(c) * inverse(d * sc[i])), vset(-32.f), vset(31.f));
  }
};

static inline vf sub_error(const Columns& sub, vf step) {
  const vf factor = inverse(step);
  vf error{};
  for (int c = 0; c < sub.count; ++c) {
    const vf x = sub.value(c);
    const vf away = step * vclamp(vround(x * factor), vset(-32.f), vset(31.f)) - x;
    error = error + (sub.weight(c) * away) * away;
  }
  return error;
}

static inline void refit_super(const Columns& g, Super& p) {
  vf aa{}, xa{};
  for (int i = 0; i < Super::subs; ++i) {
    const Columns sub = g.at(i * Super::columns, Super::columns);
    const vf factor = inverse(p.d * p.sc[i]);
    vf svv{}, sxv{};
    for (int c = 0; c < sub.count; ++c) {
      const vf x = sub.value(c), v = vclamp(vround(x * factor), vset(-32.f), vset(31.f));
      const vf wv = sub.weight(c) * v;
      svv = svv + wv * v;
      sxv = sxv + wv * x;
    }
    aa = aa + (p.sc[i] * p.sc[i]) * svv;
    xa = xa + p.sc[i] * sxv;
  }
  p.d = vround_f16(aa > 0.f ? ratio(xa, aa) : p.d);  // an infinite d stays
}

// The scales of the sub-blocks' largest magnitudes: no weights take part.
static inline Super plain_super(const Columns& g) {
  vf s[Super::subs], most{};
  for (int i = 0; i < Super::subs; ++i) {
    s[i] = peak_of(g.at(i * Super::columns, Super::columns)) / -32.f;
    most = vmax(vabs(s[i]), most);
  }
  Super p;
  p.d = vround_f16(most / 127.f);
  for (int i = 0; i < Super::subs; ++i)
    p.sc[i] = vclamp(vround(s[i] * inverse(p.d)), vset(-128.f), vset(127.f));
  return p;
}

static inline Super fit_super(const Columns& g) {
  vf s[Super::subs], svv[Super::subs];
  for (int i = 0; i < Super::subs; ++i) {
    const Columns sub = g.at(i * Super::columns, Super::columns);
    const SignedFit f = fit_signed(sub, -32.f, 31.f, kSigned32);
    s[i] = f.d;
    svv[i] = f.squares;
  }
  Super p;
  p.d = fit_step(s, svv, Super::subs, 127.f, 64.f);
  for (int i = 0; i < Super::subs; ++i)
    p.sc[i] = vclamp(vround(s[i] * inverse(p.d)), vset(-128.f), vset(127.f));
  Super best = p;
  vf least = vset(__builtin_inff());
  const auto keep = [&](const Super& tried, vf error) __attribute__((always_inline)) {
    const vi take = error < least;
    least = take ? error : least;
    best.d = take ? tried.d : best.d;
    for (int i = 0; i < Super::subs; ++i) best.sc[i] = take ? tried.sc[i] : best.sc[i];
  };
  const Super plain = plain_super(g);
  vf of_plain{};
  for (int i = 0; i < Super::subs; ++i)
    of_plain =
        of_plain + sub_error(g.at(i * Super::columns, Super::columns), plain.d * plain.sc[i]);
  keep(plain, of_plain);
  for (int round = 0; round < kRounds; ++round) {
    if (round > 0) refit_super(g, p);
    vf error{};
    for (int i = 0; i < Super::subs; ++i) {
      const Columns sub = g.at(i * Super::columns, Super::columns);
      vf smallest = vset(__builtin_inff()), sc = p.sc[i];
      for (const float shift : kShifts) {
        const vf near = vclamp(p.sc[i] + shift, vset(-128.f), vset(127.f));
        const vf tried = sub_error(sub, p.d * near);
        sc = tried < smallest ? near : sc;
        smallest = tried < smallest ? tried : smallest;
      }
      error = error + smallest;
      p.sc[i] = sc;
    }
    keep(p, error);
  }
  return best;
}

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
