"""RMSNorm layers on our kernel: one pass over the rows, one rounding, gradients in one more.

What a class computes is found by running its own forward, see `probe`: the Llama kind (weight times
the normalized row), the Gemma kind (1 + weight), and in which dtype the result comes back for each
pair of dtypes of input and weight. A pair that does not fit keeps the class's own forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ...ops import rms_norm
from ...ops.registry import is_transformed
from .parts import Offer
from .probe import agrees, answer, coarsest, normal, stand_in, takes_one_argument
from .swap import swap

NAME = "norm"
_OTHER_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
_EPS = ("variance_epsilon", "eps")
_DTYPES = (torch.float32, torch.bfloat16)
_PLAIN = frozenset({Tensor, Parameter})  # not DTensor and its like, which our ops cannot split
_SINGLE = (torch.float32, torch.float32)
# (dtype of x, of the weight) -> of the result; what is not in it runs the class's own forward
_Results = tuple[tuple[tuple[torch.dtype, torch.dtype], torch.dtype], ...]


def offer(name: str, module: nn.Module, model: nn.Module) -> Offer | None:
    """Whether `module` is an RMSNorm with a weight that `ops.rms_norm` computes."""
    eps = next((a for a in _EPS if isinstance(getattr(module, a, None), float)), None)
    if isinstance(module, _OTHER_NORMS) or not (eps or "RMSNorm" in type(module).__name__):
        return None
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 1:
        if "RMSNorm" not in type(module).__name__:
            return None
        return Offer(reason="it has no weight of one dimension")
    others = [k for k, v in (module._parameters | module._buffers).items() if v is not None]
    if others != ["weight"] or eps is None:
        return Offer(reason="it has other parameters than a weight and an epsilon")
    if not takes_one_argument(module):
        return Offer(reason="its forward takes more than one tensor")
    found = kind_of(module, eps)
    if found is None:
        return Offer(reason="its forward gives neither weight * norm(x) nor (1 + weight) * norm(x)")
    forward = _forward(type(module).forward, eps, *found)
    return Offer(replaced=True, install=functools.partial(swap, module, NAME, forward))


def kind_of(module: nn.Module, eps: str) -> tuple[float, _Results] | None:
    """What `module` adds to its weight (0 or 1) and the dtypes of its results; None: no RMSNorm."""
    found: dict[float, list[Any]] = {0.0: [], 1.0: []}
    for pair in [(x, w) for x in _DTYPES for w in _DTYPES]:
        x, weight, exact = _problem(module, eps, *pair)
        y = answer(type(module).forward, stand_in(module, weight=weight), x)
        for offset, results in found.items():
            if y is not None and agrees(y, exact(offset), coarsest(*pair, y.dtype)):
                results.append((pair, y.dtype))
    # Only float32 shows a small difference; what fits there and in no other pair is an RMSNorm too.
    fits = [offset for offset, results in found.items() if results[:1] == [(_SINGLE, _DTYPES[0])]]
    return (fits[0], tuple(found[fits[0]])) if len(fits) == 1 else None


def _problem(
    module: nn.Module, eps: str, x_dtype: torch.dtype, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Callable[[float], Tensor]]:
    """Rows with a mean, one of them so small that the epsilon counts, a weight, the exact norm."""
    width, epsilon = module.get_parameter("weight").shape[0], getattr(module, eps)
    scale = torch.tensor([1.0, max(epsilon, 1e-12) ** 0.5, 30.0], device="cpu")[:, None]
    x = ((normal(2, 3, width, seed=1) + 0.5) * scale).to(x_dtype)
    weight = normal(width, seed=2, dtype=weight_dtype)
    x64 = x.double()
    normed = x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + epsilon)
    return x, weight, lambda offset: normed * (weight.double() + offset)


@functools.cache
def _forward(
    theirs: Callable[..., Tensor], eps: str, offset: float, results: _Results
) -> Callable[..., Tensor]:
    """The forward of a class of norms; `theirs` serves what our kernel does not."""
    known = dict(results)

    def forward(self: Any, x: Any = None, **named: Any) -> Tensor:
        weight = self.weight
        out = None
        if type(x) in _PLAIN and type(weight) in _PLAIN and x.ndim and not is_transformed():
            out = known.get((x.dtype, weight.dtype))
        if out is None:
            return theirs(self, **named) if x is None else theirs(self, x, **named)
        if offset:
            weight = weight.float() + offset
        if x.ndim <= 3:
            return rms_norm(x, weight, getattr(self, eps), out)
        rows = x.flatten(0, -3)  # the kernel takes the strides of three dimensions
        return rms_norm(rows, weight, getattr(self, eps), out).view(x.shape)

    return forward
