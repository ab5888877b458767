"""AdamW in one pass over a parameter and its state.

Loshchilov and Hutter, 2019 (arXiv 1711.05101): moments of the gradient, decay of the weight apart
from them. A bfloat16 parameter has a float32 master in the optimizer's state: the master is
updated and the parameter is its value rounded to nearest even, so that steps smaller than half a
bfloat16 spacing add up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from .registry import Op


def adamw_step_ref(
    param: Tensor,
    master: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    grad_scale: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """Plain PyTorch definition of `adamw_step_`: fp32 throughout, the parameter rounded once."""
    g = grad.float()
    if grad_scale is not None:
        g = g * grad_scale
    weight = param if master is None else master
    exp_avg.add_(g - exp_avg, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).add_(g * g * (1 - beta2))
    denominator = exp_avg_sq.sqrt() * (1 - beta2**step) ** -0.5 + eps
    rate = lr / (1 - beta1**step)
    weight.mul_(1 - lr * weight_decay).sub_(exp_avg * rate / denominator)
    if master is not None:
        param.copy_(master)


def _nothing(*_: Any) -> None:
    return None


_adamw_step = Op(
    "adamw_step_(Tensor(a!) param, Tensor(b!)? master, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq,"
    " Tensor grad, Tensor? grad_scale, float lr, float beta1, float beta2, float eps,"
    " float weight_decay, int step) -> ()",
    adamw_step_ref,
    fake=_nothing,
)


def _native(
    param: Tensor, master: Tensor | None, m: Tensor, v: Tensor, grad: Tensor, *_: Any
) -> bool:
    given = (param, m, v, grad) if master is None else (param, master, m, v, grad)
    return all(t.is_contiguous() for t in given)


@_adamw_step.impl("native", "cpu", when=_native)
def _adamw_step_cpu(*args: Any) -> None:
    _C.adamw_step(*args)


@_adamw_step.impl("triton", "cuda", when=_native)
def _adamw_step_triton(*args: Any) -> None:
    from ..kernels import adamw as kernel

    kernel.adamw_step(*args)


def adamw_step_(
    param: Tensor,
    master: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    step: int,
    grad_scale: Tensor | float | None = None,
) -> None:
    """One AdamW step of a parameter, in place.

    Args:
        param: float32, or bfloat16 with a master.
        master: float32, shaped like `param`; None where `param` is float32, its own master.
        exp_avg: float32 mean of gradients; zeros before the first step.
        exp_avg_sq: float32 mean of squared gradients; zeros before the first step.
        grad: float32 or bfloat16, shaped like `param`.
        lr: learning rate, of the decay too: the weight is first multiplied by
            `1 - lr * weight_decay`.
        betas: decay of the two means.
        eps: added to the root of the second mean.
        weight_decay: per unit of learning rate.
        step: this step's number, from 1: corrects the means for their start at zero.
        grad_scale: multiplies the gradient first; a 0-dim float32 tensor is not read on the host.

    Raises:
        ValueError: on a wrong shape or dtype, a bfloat16 parameter without master, a step below 1.
    """
    _check(param, master, (exp_avg, exp_avg_sq), grad, step)
    scale = as_scale(grad_scale, param.device)
    values = (lr, *betas, eps, weight_decay, step)
    _adamw_step(param, master, exp_avg, exp_avg_sq, grad, scale, *values)


def as_scale(scale: Tensor | float | None, device: torch.device) -> Tensor | None:
    """A gradient's multiplier as a 0-dim float32 tensor on `device`, or None for 1."""
    if scale is None:
        return None
    return torch.as_tensor(scale, dtype=torch.float32, device=device)


def _check(
    param: Tensor, master: Tensor | None, moments: tuple[Tensor, Tensor], grad: Tensor, step: int
) -> None:
    def problem(name: str, got: Tensor, dtypes: tuple[torch.dtype, ...]) -> str | None:
        if got.shape != param.shape or got.dtype not in dtypes:
            names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            return (
                f"{name} must be {names} of shape {tuple(param.shape)} like param, "
                f"got {got.dtype} of {tuple(got.shape)}"
            )
        return None

    both = (torch.float32, torch.bfloat16)
    checked: list[tuple[str, Tensor, Any]] = [("param", param, both), ("grad", grad, both)]
    checked += [("exp_avg", moments[0], both[:1]), ("exp_avg_sq", moments[1], both[:1])]
    if master is not None:
        checked.append(("master", master, both[:1]))
    for name, got, dtypes in checked:
        if (text := problem(name, got, dtypes)) is not None:
            raise ValueError(text)
    if (master is None) != (param.dtype == torch.float32):
        raise ValueError(
            "a bfloat16 param needs a float32 master, and a float32 param is its own: "
            f"param is {param.dtype}, master {'not given' if master is None else 'given'}"
        )
    if step < 1:
        raise ValueError(f"step must be at least 1, got {step}")
