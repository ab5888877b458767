// tanh of a vector.
#pragma once
#include "cpu/simd.h"

namespace fastllm::FASTLLM_ISA {

// tanh within 2 ulp. Up to 0.55 an odd polynomial (least squares on Chebyshev points, weighted
// towards the relative minimax: 1e-9), above it 1 - 2 / (e^2x + 1), which loses no digits there.
FASTLLM_INLINE vf vtanh(vf x) {
  const vf a = vabs(x), z = x * x;
  vf p = vset(-6.2742401710e-3f);
  p = vfma(p, z, vset(2.1071679518e-2f));
  p = vfma(p, z, vset(-5.3852310023e-2f));
  p = vfma(p, z, vset(1.3332586140e-1f));
  p = vfma(p, z, vset(-3.3333317560e-1f));
  const vf small = vfma(p * z, x, x);
  const vf large = 1.f - 2.f / (vexp(a + a) + 1.f);
  const vf signed_large = vbits(vbits(large) | (vbits(x) & vseti(INT32_MIN)));
  return a < vset(0.55f) ? small : signed_large;
}

}  // namespace fastllm::FASTLLM_ISA
