// The gated activations of feed-forwards and experts, act(gate) * up, and their derivatives; the
// formulas are those of fastllm/ops/gated_activation.py. Forward and backward share them, so that an
// activation computed again has the bits of the first one.
#pragma once
#include "cpu/sigmoid.h"
#include "ops_core.h"

namespace fastllm::FASTLLM_ISA {
namespace {

struct GatedSlopes {
  vf value, by_gate, by_up;  // act(gate) * up and its derivatives
};

// The share of the normal distribution below x, and its density, from one exponential: the share
// below -|x| is e^(-x^2 / 2) h(|x|), h a polynomial (minimax in the relative error, 2e-8) of
// (t - 4) / (t + 4). Relative error 3e-7 where the product of the two is not tiny.
struct NormalShare {
  vf share, density;
};
FASTLLM_INLINE NormalShare normal_share(vf x) {
  const vf t = vmin(vabs(x), vset(15.f));  // beyond, the exponential is 0
  const vf u = (t - 4.f) / (t + 4.f);
  vf h = vset(-6.42882296e-5f);
  h = vfma(h, u, vset(-1.66146667e-4f));
  h = vfma(h, u, vset(6.5770431e-4f));
  h = vfma(h, u, vset(5.01427392e-4f));
  h = vfma(h, u, vset(-8.4981015e-3f));
  h = vfma(h, u, vset(3.08657512e-2f));
  h = vfma(h, u, vset(-7.17067048e-2f));
  h = vfma(h, u, vset(1.2437918e-1f));
  h = vfma(h, u, vset(-1.70397744e-1f));
  h = vfma(h, u, vset(9.4410643e-2f));
  const vf e = exp_minus(t * t * 0.5f);
  const vf tail = e * h;
  return {x < vset(0.f) ? tail : 1.f - tail, e * 0.398942280401432678f};
}

// The sigmoid whose product with x is the tanh approximation of GELU, and the derivative of its
// argument 2 sqrt(2 / pi) (x + 0.044715 x^3).
FASTLLM_INLINE vf tanh_argument(vf x) {
  return 1.59576912160573071f * (x + 0.044715f * (x * x * x));
}
FASTLLM_INLINE vf tanh_argument_slope(vf x) {
  return 1.59576912160573071f * (1.f + 0.134145f * (x * x));
}

constexpr float kClampLimit = 7.f, kClampSlope = 1.702f;  // of swiglu_oai

template <Gating gating>
FASTLLM_INLINE vf gated(vf gate, vf up) {
  if constexpr (gating == Gating::silu) {
    return gate / (1.f + exp_minus(gate)) * up;
  } else if constexpr (gating == Gating::gelu) {
    return gate * normal_share(gate).share * up;
  } else if constexpr (gating == Gating::gelu_tanh) {
    return gate / (1.f + exp_minus(tanh_argument(gate))) * up;
  } else {
    // Comparisons keep a NaN.
    const vf g = gate > vset(kClampLimit) ? vset(kClampLimit) : gate;
    const vf low = up < vset(-kClampLimit) ? vset(-kClampLimit) : up;
    const vf u = low > vset(kClampLimit) ? vset(kClampLimit) : low;
    return g / (1.f + exp_minus(kClampSlope * g)) * (u + 1.f);
  }
}

template <Gating gating>
FASTLLM_INLINE GatedSlopes gated_slopes(vf gate, vf up) {
  if constexpr (gating == Gating::silu) {
    const vf d = 1.f + exp_minus(gate), s = 1.f / d, value = gate / d;
    return {value * up, up * (s * (1.f + gate * (1.f - s))), value};
  } else if constexpr (gating == Gating::gelu) {
    const NormalShare n = normal_share(gate);
    const vf value = gate * n.share;
    return {value * up, up * (n.share + gate * n.density), value};
  } else if constexpr (gating == Gating::gelu_tanh) {
    const vf argument = tanh_argument(gate), e = exp_minus(argument);
    const vf d = 1.f + e, s = 1.f / d, value = gate / d;
    // 1 - s is e s: a difference would have an error of 6e-8, ten times that of the slope itself.
    const vf rest = argument < vset(-80.f) ? vset(1.f) : e * s;  // there e may be infinite
    return {value * up, up * (s + value * rest * tanh_argument_slope(gate)), value};
  } else {
    const vf limit = vset(kClampLimit), zero = vf{};
    const vf g = gate > limit ? limit : gate;
    const vf low = up < -limit ? -limit : up;
    const vf u = low > limit ? limit : low;
    const vf d = 1.f + exp_minus(kClampSlope * g), s = 1.f / d, value = g / d;
    const vf slope = (u + 1.f) * (s * (1.f + kClampSlope * g * (1.f - s)));
    return {value * (u + 1.f), gate > limit ? zero : slope, vabs(up) > limit ? zero : value};
  }
}

// What a gradient dy of act(gate) * up is for gate and for up.
struct GatedGradients {
  vf gate, up;
};
template <Gating gating>
FASTLLM_INLINE GatedGradients gated_gradients(vf dy, vf gate, vf up) {
  if constexpr (gating == Gating::silu) {
    // Without the value, one division less than gated_slopes.
    const vf s = 1.f / (1.f + exp_minus(gate));
    return {dy * up * (s * (1.f + gate * (1.f - s))), dy * (gate * s)};
  } else {
    const GatedSlopes slopes = gated_slopes<gating>(gate, up);
    return {dy * slopes.by_gate, dy * slopes.by_up};
  }
}

// Calls body with the gating as a compile-time constant: dispatch_gating(g, [&](auto c) {
// gated<c.value>(...) }).
template <Gating gating>
struct GatingConstant {
  static constexpr Gating value = gating;
};
template <class Body>
FASTLLM_INLINE void dispatch_gating(Gating gating, Body body) {
  switch (gating) {
    case Gating::silu: return body(GatingConstant<Gating::silu>{});
    case Gating::gelu: return body(GatingConstant<Gating::gelu>{});
    case Gating::gelu_tanh: return body(GatingConstant<Gating::gelu_tanh>{});
    case Gating::swiglu_oai: return body(GatingConstant<Gating::swiglu_oai>{});
  }
}

}  // namespace
}  // namespace fastllm::FASTLLM_ISA
