"""Gated feed-forwards: act(gate) * up in one pass, forward and backward, between their products.

The projections stay the module's own and are called as modules, so that LoRA, quantized layers,
FSDP and hooks on them work as before. Shared experts of a mixture are feed-forwards too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...ops import swiglu
from ...ops.gated_activation import gated_activation
from ...ops.registry import is_transformed
from .parts import Offer, hooked
from .probe import agrees, answer, normal, stand_in, takes_one_argument
from .swap import swap

NAME = "mlp"
_APART, _FUSED = ("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj")
_ACTIVATION_ATTRIBUTES = ("act_fn", "activation_fn", "act")
_ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
_DTYPES = frozenset({torch.float32, torch.bfloat16})
# Elements from which one pass of ours is faster than two of torch, without gradients and with them;
# fewer take the module's own operations. torch / ours in us on one Zen 5 core, bfloat16: SiLU of
# 12,288 elements 7.0 / 7.5, of 24,576 12.5 / 11.3; with the backward of 49,152 71 / 72, of 98,304
# 122 / 113. GELU of 3,072 5.9 / 5.1; with the backward of 6,144 36 / 37, of 12,288 55 / 46.
_FROM = {"silu": (16_384, 49_152), "gelu": (3_072, 8_192), "gelu_tanh": (3_072, 8_192)}
_HIDDEN, _INNER = 8, 12  # of the small feed-forward that is tried


class _Layout(NamedTuple):
    fused: bool  # gate and up are the halves of one product
    attribute: str  # the module's activation
    activation: str  # our name for it


def offer(name: str, module: nn.Module, model: nn.Module) -> Offer | None:
    """Whether `module` is down(act(gate(x)) * up(x)) with an activation of `ops.swiglu`."""
    children = [isinstance(getattr(module, p, None), nn.Module) for p in (*_APART, *_FUSED)]
    if not (all(children[:3]) or all(children[3:])):
        return None
    attribute = next((a for a in _ACTIVATION_ATTRIBUTES if callable(getattr(module, a, None))), "")
    if not attribute:
        return Offer(reason="it has no activation function that its forward could apply")
    if hooked(getattr(module, attribute)):
        return Offer(reason="its activation has hooks, which a kernel would not run")
    activation = activation_of(getattr(module, attribute))
    if activation is None:
        return Offer(reason="its activation is neither SiLU nor GELU")
    if not takes_one_argument(module):
        return Offer(reason="its forward takes more than one tensor")
    layout = _Layout(not all(children[:3]), attribute, activation)
    if not _is_gated(module, layout):
        return Offer(reason="its forward is more than down(act(gate(x)) * up(x))")
    forward = _forward(type(module).forward, layout)
    return Offer(replaced=True, install=functools.partial(swap, module, NAME, forward))


def activation_of(function: Callable[..., Any]) -> str | None:
    """Which of "silu", "gelu" and "gelu_tanh" an element-wise function computes, or None."""
    x = torch.linspace(-8, 8, 257, device="cpu", dtype=torch.float32)
    found, one = answer(function, x), torch.ones(1, device="cpu", dtype=torch.float64)
    for activation in _ACTIVATIONS:
        exact = gated_activation(x.double(), one, activation)
        # GELU and its tanh form are 5e-4 apart.
        if isinstance(found, Tensor) and found.shape == x.shape:
            if (found.double() - exact).abs().max() < 1e-5:
                return activation
    return None


def _is_gated(module: nn.Module, layout: _Layout) -> bool:
    """Whether the forward is the formula, tried on a small feed-forward."""
    weights = [normal(_HIDDEN, _INNER, seed=s) * 0.3 for s in (1, 2)]
    gate, up, down = (*weights, normal(_INNER, _HIDDEN, seed=3))
    both = torch.cat((gate, up), dim=1)
    products = {"gate_up_proj": both} if layout.fused else {"gate_proj": gate, "up_proj": up}
    small = stand_in(
        module,
        **{name: functools.partial(torch.matmul, other=w) for name, w in products.items()},
        down_proj=functools.partial(torch.matmul, other=down),
        **{layout.attribute: getattr(module, layout.attribute)},
    )
    x = normal(2, 3, _HIDDEN, seed=4)
    x64 = x.double()
    inner = gated_activation(x64 @ gate.double(), x64 @ up.double(), layout.activation)
    found = answer(type(module).forward, small, x)
    return agrees(found, inner @ down.double(), torch.float32)


def _ours(gate: Tensor, up: Tensor, activation: str) -> bool:
    """Whether the kernel takes them and gains: many elements, one dtype, three dimensions."""
    return (
        type(gate) is Tensor
        and type(up) is Tensor
        and gate.numel() >= _FROM[activation][gate.requires_grad]
        and gate.dtype == up.dtype
        and gate.dtype in _DTYPES
        and gate.ndim <= 3
        and not is_transformed()
    )


@functools.cache
def _forward(theirs: Callable[..., Tensor], layout: _Layout) -> Callable[..., Tensor]:
    """The forward of a class of feed-forwards."""
    fused, attribute, activation = layout

    def forward(self: Any, x: Any = None, **named: Any) -> Tensor:
        if x is None:
            return theirs(self, **named)
        if fused:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        function = getattr(self, attribute)
        if _ours(gate, up, activation) and not hooked(function):
            return self.down_proj(swiglu(gate, up, activation))
        return self.down_proj(function(gate) * up)

    return forward
