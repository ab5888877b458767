"""What a module of somebody else computes, found out by running its own forward on small inputs.

Names say little: classes called RMSNorm differ in where they round and in whether 1 is added to the
weight. So a part replaces a module only after the class's own forward, on random numbers, has given
what the part would give.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# What code that expects other arguments, attributes or shapes raises.
_MISFITS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def stand_in(module: nn.Module, **attributes: Any) -> nn.Module:
    """A copy of `module` that has `attributes` in place of all parameters, buffers and children.

    Its forward fails on whatever else it would use. Nothing of `module` changes when it runs.
    """
    copy = type(module).__new__(type(module))
    copy.__dict__.update(module.__dict__)
    copy.__dict__.update({"_parameters": {}, "_buffers": {}, "_modules": {}, **attributes})
    return copy


def answer(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` without gradients and autocast; None if it does not take them."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of dtypes that do not go together, say
        try:
            return function(*args)
        except _MISFITS:
            return None


def takes_one_argument(module: nn.Module) -> bool:
    """Whether the forward of `module` takes a tensor and nothing else."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return len(parameters) == 1 and parameters[0].kind in (
        parameters[0].POSITIONAL_ONLY,
        parameters[0].POSITIONAL_OR_KEYWORD,
    )


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same normal numbers on the CPU every time; the global generator is not touched."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)


def coarsest(*dtypes: torch.dtype) -> torch.dtype:
    """The one whose values lie the farthest apart."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def agrees(found: Any, exact: Tensor, dtype: torch.dtype) -> bool:
    """Whether `found` is the float64 tensor `exact` but for a few roundings to `dtype`."""
    if not isinstance(found, Tensor) or found.shape != exact.shape:
        return False
    tolerance = 16 * torch.finfo(dtype).eps if dtype == torch.float32 else torch.finfo(dtype).eps
    bound = tolerance * (exact.abs() + exact.abs().mean())
    return bool(((found.double() - exact).abs() <= 2 * bound).all())
