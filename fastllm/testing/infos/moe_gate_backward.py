"""Cases of moe_gate_backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...ops.moe_gate import moe_gate_ref
from ..opinfo import Args, Case, OpInfo
from .moe_gate import (
    BENCH_SHAPES,
    FULL_SHAPES,
    ROUTINGS,
    SHAPES,
    Routing,
    draw_logits,
    exact_scores,
    exact_weights,
)

# The selection plays no part: one routing for each pair of scoring and renormalization.
KINDS = (
    ROUTINGS[0],
    ROUTINGS[1],
    Routing("sigmoid", "sigmoid", scale=0.5),
    Routing("deepseek_v3", "sigmoid", True, renormalize=True, scale=2.5),
)


def _arguments(g: torch.Generator, logits: Tensor, ids: Tensor, routing: Routing) -> Args:
    d_weights = torch.randn(ids.shape, generator=g)
    d_score_sum, d_z_sum = torch.randn(logits.shape[1], generator=g), torch.randn((), generator=g)
    options = routing.scoring, routing.renormalize, routing.scale
    return logits, ids, d_weights, d_score_sum, d_z_sum, *options


def _case(shape: tuple[int, int, int], routing: Routing, full: bool = False) -> Case:
    tokens, experts, k = shape

    def make(g: torch.Generator) -> Args:
        logits, bias = draw_logits(g, routing, tokens, experts)
        return _arguments(g, logits, moe_gate_ref(logits, bias, k, *routing.options)[1], routing)

    return Case(label=f"{routing.name}-{tokens}x{experts}-k{k}", make=make, full=full)


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    for i, shape in enumerate(SHAPES):
        for j, routing in enumerate(KINDS):
            yield _case(shape, routing, full=i > 0 and (i + j) % 2 == 0)
    for shape in FULL_SHAPES:
        for routing in KINDS:
            yield _case(shape, routing, full=True)
    for routing in KINDS:
        yield Case(label=f"{routing.name}-slots-without-expert", make=_missing(routing))


def _missing(routing: Routing) -> Callable[[torch.Generator], Args]:
    def make(g: torch.Generator) -> Args:
        logits, _ = draw_logits(g, routing, 21, 40)
        ids = torch.rand(21, 40, generator=g).argsort(1)[:, :4].int()
        ids[:, 2] = -1
        ids[5] = -1
        logits[5] = math.nan
        logits[6, ids[6, 0].item()] = -math.inf
        return _arguments(g, logits, ids, routing)

    return make


def _exact(
    logits: Tensor,
    ids: Tensor,
    d_weights: Tensor,
    d_score_sum: Tensor,
    d_z_sum: Tensor,
    scoring: str,
    renormalize: bool,
    scale: float,
) -> Tensor:
    valid = ids[:, :1] >= 0
    x = torch.where(valid, logits, 0.0).double().requires_grad_()
    with torch.enable_grad():
        scores, p, lse = exact_scores(x, scoring)
        weights = exact_weights(scores, ids, renormalize, scale)
        sums = (p * valid * d_score_sum).sum() + (lse.square() * valid[:, 0] * d_z_sum).sum()
        loss = (weights * d_weights).sum() + sums
    return torch.autograd.grad(loss, x)[0]


def _torch_graph(logits: Tensor, ids: Tensor, d_weights: Tensor, *_: object) -> Args:
    leaf = logits.detach().requires_grad_()
    with torch.enable_grad():
        weights = torch.softmax(leaf, 1).gather(1, ids.long())
        weights = weights / weights.sum(1, keepdim=True)
    return weights, leaf, d_weights


def _torch_gradient(weights: Tensor, leaf: Tensor, d_weights: Tensor) -> Tensor:
    return torch.autograd.grad(weights, leaf, d_weights, retain_graph=True)[0]


INFOS = [
    OpInfo(
        name="moe_gate_backward",
        cases=_cases,
        exact=_exact,
        dtypes=(torch.float32,),
        bench_cases=lambda dtype: (
            _case(shape, routing) for shape in BENCH_SHAPES[2:] for routing in KINDS[1::2]
        ),
        bench_peer=(_torch_graph, _torch_gradient),
        bytes_moved=lambda logits, ids, *_: 2 * logits.nbytes + 2 * ids.nbytes,
    ),
]
