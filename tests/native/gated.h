// The gated activations and their derivatives by their published formulas, in double.
#pragma once
#include <cmath>
#include <initializer_list>

#include "ops_core.h"

namespace fastllm::test {

constexpr Gating kGatings[] = {Gating::silu, Gating::gelu, Gating::gelu_tanh, Gating::swiglu_oai};

struct Gated {
  double value, by_gate, by_up;
};

// act(gate) * up; that of swiglu_oai is of min(gate, 7) and of clamp(up, -7, 7) + 1.
inline Gated gated(Gating gating, double gate, double up) {
  const double pi = std::acos(-1.0);
  double share = 0, density = 0;  // act(g) = g share(g), act'(g) = share(g) + g share'(g)
  bool gate_passes = true, up_passes = true;
  if (gating == Gating::gelu) {
    share = 0.5 * std::erfc(-gate / std::sqrt(2.0));
    density = std::exp(-gate * gate / 2) / std::sqrt(2 * pi);
  } else if (gating == Gating::gelu_tanh) {
    const double t = std::tanh(std::sqrt(2 / pi) * (gate + 0.044715 * gate * gate * gate));
    share = 0.5 * (1 + t);
    density = 0.5 * (1 - t * t) * std::sqrt(2 / pi) * (1 + 3 * 0.044715 * gate * gate);
  } else {
    const bool clamped = gating == Gating::swiglu_oai;
    const double slope = clamped ? 1.702 : 1;
    if (clamped) {
      gate_passes = gate <= 7, up_passes = std::fabs(up) <= 7;
      gate = gate_passes ? gate : 7;
      up = (up > 7 ? 7 : up < -7 ? -7 : up) + 1;
    }
    share = 1 / (1 + std::exp(-slope * gate));
    density = slope * share * (1 - share);
  }
  return {gate * share * up, gate_passes ? up * (share + gate * density) : 0,
          up_passes ? gate * share : 0};
}

}  // namespace fastllm::test
