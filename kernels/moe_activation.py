"""The gated activations of feed-forwards and experts, and their derivatives, in fp32.

"silu" is SwiGLU, "gelu" GEGLU with erf, "gelu_tanh" GEGLU with tanh, "swiglu_oai" GPT-OSS's clamped
SwiGLU: min(gate, 7) * sigmoid(1.702 * min(gate, 7)) * (clamp(up, -7, 7) + 1). NaN stays NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_compat import tanh

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swiglu_oai")


@triton.jit
def gate_function(gate, ACTIVATION: tl.constexpr):
    """(f, f') of fp32 gate: an activation is f(gate) * up, or f(gate) * (up + 1) for swiglu_oai."""
    if ACTIVATION == "gelu":
        below = 0.5 * (1.0 + tl.math.erf(gate * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
        return gate * below, below + gate * density
    elif ACTIVATION == "gelu_tanh":
        square = gate * gate
        t = tanh(0.7978845608028654 * gate * (1.0 + 0.044715 * square))
        slope = 0.7978845608028654 * (1.0 + 0.134145 * square)
        return 0.5 * gate * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * gate * (1.0 - t * t) * slope
    elif ACTIVATION == "swiglu_oai":
        s = 1.0 / (1.0 + tl.exp(-1.702 * gate))
        return gate * s, s * (1.0 + 1.702 * gate * (1.0 - s))
    else:
        s = 1.0 / (1.0 + tl.exp(-gate))
        return gate / (1.0 + tl.exp(-gate)), s * (1.0 + gate * (1.0 - s))


@triton.jit
def activate(gate, up, ACTIVATION: tl.constexpr):
    """The activation of fp32 gate and up, fp32."""
    if ACTIVATION == "swiglu_oai":
        f, _ = gate_function(tl.where(gate > 7.0, 7.0, gate), ACTIVATION)
        up = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up))
        return f * (up + 1.0)
    else:
        f, _ = gate_function(gate, ACTIVATION)
        return f * up


@triton.jit
def activation_gradients(gate, up, ACTIVATION: tl.constexpr):
    """(activation, its derivative by gate, its derivative by up) of fp32 gate and up, fp32.

    A clamped value passes its gradient on at the clamp itself and none beyond.
    """
    if ACTIVATION == "swiglu_oai":
        f, df = gate_function(tl.where(gate > 7.0, 7.0, gate), ACTIVATION)
        factor = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up)) + 1.0
        dup = tl.where((up > 7.0) | (up < -7.0), 0.0, f)
        return f * factor, tl.where(gate > 7.0, 0.0, df * factor), dup
    else:
        f, df = gate_function(gate, ACTIVATION)
        return f * up, df * up, f
