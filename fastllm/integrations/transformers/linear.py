"""Linear layers of a few rows, outside of autograd: a token's products.

They are bound by reading the weights. Ours read each once, where it lies; torch's products of one
row take 1.6 to 2.9 times as long from memory (NOTES.md, linear layers of few rows). Everything else
runs the layer's own forward: what records gradients, many rows, small weights, other dtypes,
autocast, compilation, sharded or subclassed tensors.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ...ops.linear import FEW_ROWS, native_linear, reads_in_place
from ...ops.registry import is_eager
from .parts import Offer
from .swap import original, swap

NAME = "linear"
# Elements of a weight from which that is faster. torch / ours in us, one row, two Zen 4 cores:
# bfloat16 64 x 64 13 / 24, 128 x 128 54 / 30, 256 x 256 47 / 31; float32 8 / 15, 19 / 18, 50 / 31.
_FROM = 1 << 16


def offer(name: str, module: nn.Module, model: nn.Module) -> Offer | None:
    """The answer of this part (see `parts`): every plain `nn.Linear` that the kernel can serve."""
    if original(module) is not nn.Linear:
        return None
    weight = module._parameters.get("weight")
    if weight is None or weight.layout is not torch.strided or weight.numel() < _FROM:
        return None
    if not reads_in_place(weight):
        return None
    return Offer(replaced=True, install=functools.partial(swap, module, NAME, forward))


def forward(self: nn.Linear, input: Tensor) -> Tensor:
    """`nn.Linear.forward`, with our product for what the module's docstring says."""
    if not torch.is_grad_enabled() and is_eager(input):
        own = self._parameters  # an attribute of a module costs half a microsecond
        weight = own.get("weight")  # what is pruned or parametrized is not among them
        if weight is not None and "bias" in own and _ours(input, weight, own["bias"]):
            return native_linear(input, weight, own["bias"])
    return nn.Linear.forward(self, input)


def _ours(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel takes them as they are: the few checks that a call can afford."""
    dtype, k = x.dtype, weight.shape[-1]
    return (
        x.numel() <= FEW_ROWS * k
        and type(weight) is Parameter
        and weight.dtype is dtype
        and dtype in (torch.bfloat16, torch.float32)
        and x.is_cpu
        and weight.is_cpu
        and x.shape[-1:] == weight.shape[1:]
        and x.layout is weight.layout is torch.strided
        and x.stride(-1) == 1
        and weight.stride(-1) == 1
        and (bias is None or _usual(bias, weight))
        and not torch.is_autocast_enabled("cpu")
    )


def _usual(bias: Tensor, weight: Tensor) -> bool:
    """Whether the kernel adds it as it is: torch takes views, and shapes that it expands."""
    return (
        type(bias) is Parameter
        and bias.dtype is weight.dtype
        and bias.is_cpu
        and bias.shape == weight.shape[:1]
        and bias.is_contiguous()
    )
