"""Cases of adamw_step_."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..opinfo import Args, Case, OpInfo

SHAPES = ((3, 100), (1,), (0, 4), (5000,))
NUMBERS = (1e-2, 0.9, 0.95, 1e-8, 0.1)


def _case(
    shape: tuple[int, ...], dtype: torch.dtype, grad: torch.dtype, scaled: bool, step: int
) -> Case:
    def make(g: torch.Generator) -> Args:
        weight, gradient, mean, square = torch.randn(4, *shape, generator=g)
        master = None if dtype == torch.float32 else weight.clone()
        if step == 1:
            mean, square = torch.zeros_like(mean), torch.zeros_like(square)
        scale = torch.tensor(0.3) if scaled else None
        state = (master, 0.1 * mean, square.square())
        return weight.to(dtype), *state, gradient.to(grad), scale, *NUMBERS, step

    label = "x".join(map(str, shape)) + f"-{grad}-step{step}".replace("torch.", "")
    return Case(label=label + ("-scaled" if scaled else ""), make=make)


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    for i, shape in enumerate(SHAPES):
        for grad in (torch.float32, torch.bfloat16):
            yield _case(shape, dtype, grad, i % 2 == 0, 1 if grad == dtype else 7)


def _exact(
    param: Tensor,
    master: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    grad_scale: Tensor | None,
    *numbers: float,
) -> None:
    lr, beta1, beta2, eps, weight_decay, step = numbers
    g = grad.double() * (1.0 if grad_scale is None else grad_scale.double())
    weight = param if master is None else master
    mean = beta1 * exp_avg.double() + (1 - beta1) * g
    square = beta2 * exp_avg_sq.double() + (1 - beta2) * g * g
    root = (square / (1 - beta2**step)).sqrt() + eps
    new = weight.double() * (1 - lr * weight_decay) - lr * mean / (1 - beta1**step) / root
    for tensor, value in ((exp_avg, mean), (exp_avg_sq, square), (weight, new)):
        tensor.copy_(value)
    if master is not None:
        param.copy_(master)


def _torch_prepare(
    param: Tensor,
    master: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    grad_scale: Tensor | None,
    *numbers: float,
) -> Args:
    weight = param if master is None else master
    return weight, exp_avg, exp_avg_sq, grad, param, torch.tensor(float(numbers[-1])), numbers


def _torch_step(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    param: Tensor,
    step: Tensor,
    numbers: tuple[float, ...],
) -> None:
    lr, beta1, beta2, eps, weight_decay, _ = numbers
    torch._fused_adamw_(
        [weight],
        [grad.float()],
        [exp_avg],
        [exp_avg_sq],
        [],
        [step],
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
    if param is not weight:
        param.copy_(weight)


def _bytes(param: Tensor, master: Tensor | None, *rest: Tensor) -> int:
    # Moments and weight are read and written.
    return param.numel() * (24 + (0 if master is None else param.itemsize)) + rest[2].nbytes


INFOS = [
    OpInfo(
        name="adamw_step_",
        cases=_cases,
        exact=_exact,
        bench_cases=lambda dtype: iter(
            [_case((4096, 4096), dtype, torch.float32, scaled=False, step=7)]
        ),
        bench_peer=(_torch_prepare, _torch_step),
        bytes_moved=_bytes,
    ),
]
