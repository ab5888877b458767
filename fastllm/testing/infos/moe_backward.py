"""Cases of moe_backward: the exact gradients are those that autograd finds in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...ops.gated_activation import ACTIVATIONS, gated_activation
from ..opinfo import Args, Case, OpInfo

# (tokens, hidden, inner, experts, k): sizes that fit no tile, tokens 0 and 1, more rows than a
# block of sums has
SHAPES = (
    (0, 16, 8, 4, 2),
    (1, 33, 17, 3, 1),
    (5, 64, 32, 8, 2),
    (37, 70, 33, 6, 3),
    (19, 48, 40, 16, 16),
    (1100, 20, 18, 3, 2),
)
BENCH_SHAPES = ((2048, 512, 256, 64, 8), (2048, 512, 1024, 8, 2))


def sorted_by_expert(ids: Tensor, experts: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """(offsets, slots) of a slice of experts, from int `[T, k]`: what `moe_dispatch` gives."""
    flat = ids.reshape(-1).long() - first
    flat = torch.where((flat < 0) | (flat >= experts), experts, flat)
    counts = torch.bincount(flat, minlength=experts + 1)[:experts]
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    slots = torch.argsort(flat, stable=True).int()
    slots[int(offsets[-1]) :] = -1
    return offsets, slots


def random_ids(g: torch.Generator, tokens: int, experts: int, k: int) -> Tensor:
    """int32 `[T, k]`: k different experts for each token."""
    return torch.rand(tokens, experts, generator=g).argsort(-1)[:, :k].int()


def backward_args(
    g: torch.Generator,
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    activation: str,
    bias: bool,
    ids: Tensor | None = None,
    first: int = 0,
    wanted: tuple[bool, ...] | None = None,
    gradients: torch.dtype | None = None,
) -> Args:
    """Arguments of moe_backward, with `pre` of about unit size."""
    t, hidden, inner, experts, k = shape
    ids = random_ids(g, t, experts, k) if ids is None else ids
    offsets, slots = sorted_by_expert(ids, experts, first)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=g) * scale).to(dtype)

    return (
        normal(t, hidden),
        normal(t, hidden),
        normal(experts, 2 * inner, hidden, scale=hidden**-0.5),
        normal(experts, hidden, inner, scale=hidden**-0.5),
        torch.rand(t, k, generator=g),
        offsets,
        slots,
        normal(t * k, 2 * inner, scale=2.0),
        normal(experts, 2 * inner) if bias else None,
        normal(experts, hidden) if bias else None,
        activation,
        list(wanted or (True, True, True, True, bias, bias)),
        gradients or dtype,
        gradients or dtype,
    )


def _case(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, activation: str, bias: bool
) -> Case:
    def make(g: torch.Generator) -> Args:
        return backward_args(g, shape, dtype, activation, bias)

    label = f"{activation}-" + "x".join(map(str, shape)) + ("-bias" if bias else "")
    return Case(label=label, make=make)


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    for i, shape in enumerate(SHAPES):
        for j in range(2):
            yield _case(shape, dtype, ACTIVATIONS[(i + 2 * j) % 4], bias=(i + j) % 2 == 0)

    def on_one_expert(g: torch.Generator) -> Args:
        ids = torch.full((130, 1), 2, dtype=torch.int32)
        return backward_args(g, (130, 40, 24, 5, 1), dtype, "silu", True, ids)

    def slice_of_experts(g: torch.Generator) -> Args:
        ids = random_ids(g, 23, 9, 4)
        ids[3] = -1
        return backward_args(
            g, (23, 32, 16, 3, 4), dtype, "gelu", True, ids, first=4, gradients=torch.float32
        )

    def frozen_experts(g: torch.Generator) -> Args:
        wanted = (True, False, False, True, False, False)
        return backward_args(g, (11, 32, 16, 4, 2), dtype, "silu", True, wanted=wanted)

    def weights_alone(g: torch.Generator) -> Args:
        wanted = (False, True, True, False, False, False)
        return backward_args(g, (11, 32, 16, 4, 2), dtype, "swiglu_oai", False, wanted=wanted)

    def clamped(g: torch.Generator) -> Args:
        args = list(backward_args(g, (11, 32, 16, 4, 2), dtype, "swiglu_oai", True))
        args[7] = (args[7].float() * 5).to(dtype)
        return tuple(args)

    def strided(g: torch.Generator) -> Args:
        args = list(backward_args(g, (9, 20, 12, 4, 2), dtype, "gelu_tanh", False))
        args[0] = torch.randn(9, 33, generator=g).to(dtype)[:, 7:27]
        args[1] = torch.randn(9, 33, generator=g).to(dtype)[:, 2:22]
        args[2] = torch.randn(8, 30, 25, generator=g).to(dtype)[1::2, 3:27, 1:21]
        args[3] = torch.randn(8, 22, 16, generator=g).to(dtype)[::2, 1:21, 3:15]
        return tuple(args)

    yield Case(label="one-expert", make=on_one_expert)
    yield Case(label="slice", make=slice_of_experts)
    yield Case(label="frozen-experts", make=frozen_experts)
    yield Case(label="weights-alone", make=weights_alone)
    yield Case(label="clamped", make=clamped)
    yield Case(label="strided", make=strided)


def exact_gradients(
    dy: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_weights: Tensor,
    offsets: Tensor,
    slots: Tensor,
    pre: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    wanted: list[bool],
    *_: Any,
) -> tuple[Tensor, ...]:
    """A loop over experts in float64, differentiated by autograd at the given `pre`."""
    biases = [
        torch.zeros(w.shape[:2]) if b is None else b
        for b, w in ((gate_up_bias, gate_up), (down_bias, down))
    ]
    leaves = [t.double().requires_grad_() for t in (x, gate_up, down, topk_weights, *biases)]
    x, gate_up, down, weights, b1, b2 = leaves
    ends, k = offsets.tolist(), topk_weights.shape[1]
    with torch.enable_grad():
        total = (leaves[0] * 0).sum() + sum((leaf * 0).sum() for leaf in leaves)
        for e in range(len(ends) - 1):
            rows = slots[ends[e] : ends[e + 1]].long()
            linear = x[rows // k] @ gate_up[e].T + b1[e]
            kept = pre[ends[e] : ends[e + 1]].double() + (linear - linear.detach())
            gate, up = kept.chunk(2, -1)
            out = gated_activation(gate, up, activation) @ down[e].T + b2[e]
            weighted = weights.reshape(-1)[rows].unsqueeze(1) * out
            total = total + (weighted * dy.double()[rows // k]).sum()
    found = torch.autograd.grad(total, leaves)
    return tuple(g if want else g.new_empty(0) for g, want in zip(found, wanted, strict=True))


INFOS = [
    OpInfo(
        name="moe_backward",
        cases=_cases,
        exact=exact_gradients,
        bench_cases=lambda dtype: (_case(shape, dtype, "silu", False) for shape in BENCH_SHAPES),
        flops=lambda dy, x, gate_up, down, weights, *_: (
            4 * weights.numel() * (gate_up[0].numel() + down[0].numel())
        ),
        variants=ACTIVATIONS,
    ),
]
