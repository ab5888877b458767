"""Layers of suite `moe`: what is drawn, ours, and the peers as well as they can be written."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastllm import ops
from fastllm.testing.moe_problem import draw_ids
from fastllm.testing.opinfo import generator

Function = Callable[..., Tensor]
grouped_mm: Function = getattr(F, "grouped_mm", None) or torch._grouped_mm


@dataclass(frozen=True, slots=True)
class Shape:
    """Tokens that each take k of `experts` gated feed-forwards of inner width `inner`."""

    name: str
    tokens: int
    hidden: int
    inner: int
    experts: int
    k: int
    load: str = "uniform"

    @property
    def label(self) -> str:
        """How tables name it."""
        zipf = " Zipf" if self.load == "zipf" else ""
        sizes = f"d={self.hidden} n={self.inner} E={self.experts} K={self.k}"
        return f"{self.name} T={self.tokens} {sizes}{zipf}"

    @property
    def flops(self) -> float:
        """Of the forward's products; a step has three times as many."""
        return 6.0 * self.tokens * self.k * self.hidden * self.inner

    @property
    def expert_bytes(self) -> int:
        """Of one expert in bfloat16."""
        return 6 * self.hidden * self.inner


@dataclass(frozen=True, slots=True)
class Inputs:
    """Tensors of one layer in bfloat16; `ids` and `weights` as a router gives them."""

    x: Tensor
    gate_up: Tensor
    down: Tensor
    ids: Tensor
    weights: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        """What a training step has gradients of."""
        return [self.x, self.gate_up, self.down, self.weights]

    @property
    def active(self) -> int:
        """Experts that have a token."""
        return int(self.ids.unique().numel())


def draw(shape: Shape, device: str, seed: int = 0) -> Inputs:
    """A layer and its tokens."""
    g = generator(seed)

    def random(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=g).mul_(scale).to(device, torch.bfloat16)

    weights = torch.rand(shape.tokens, shape.k, generator=g)
    return Inputs(
        random(shape.tokens, shape.hidden),
        random(shape.experts, 2 * shape.inner, shape.hidden, scale=shape.hidden**-0.5),
        random(shape.experts, shape.hidden, shape.inner, scale=shape.inner**-0.5),
        draw_ids(g, shape.tokens, shape.experts, shape.k, shape.load).to(device),
        (weights / weights.sum(1, keepdim=True)).to(device),
    )


def ours(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Sorting included."""
    return ops.moe(x, gate_up, down, ids, weights)


def expert_loop(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """One expert after the other, as transformers' eager experts do it.

    Experts are unbound once: indexing one after the other, as those do, makes a gradient of the
    size of all experts for each of them, and a step takes several times as long.
    """
    y = torch.zeros_like(x)
    ups, downs = gate_up.unbind(), down.unbind()
    tokens_of = F.one_hot(ids.long(), len(gate_up)).permute(2, 1, 0)
    for e in tokens_of.sum((1, 2)).nonzero().flatten().tolist():
        slot, token = torch.where(tokens_of[e])
        gate, up = F.linear(x[token], ups[e]).chunk(2, dim=-1)
        out = F.linear(F.silu(gate) * up, downs[e])
        y = y.index_add(0, token, out * weights[token, slot, None].to(out.dtype))
    return y


def composed(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Sort, gather, two grouped products, weigh, add up.

    Putting rows back in order and weighing them by `bmm` takes 1.4 times as long, weights stored
    the other way round 1.2 to 1.8 times (fine shape, one thread).
    """
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    ends = torch.bincount(flat, minlength=len(gate_up)).cumsum(0, dtype=torch.int32)
    tokens = order // ids.shape[1]
    gate, up = grouped_mm(x[tokens], gate_up.mT, offs=ends).chunk(2, dim=-1)
    out = grouped_mm(F.silu(gate) * up, down.mT, offs=ends)
    weighed = out * weights.flatten()[order, None].to(out.dtype)
    return torch.zeros_like(x).index_add(0, tokens, weighed)


@functools.cache
def compiled() -> Function:
    """`composed` through torch.compile: gathers, activation and weighing are fused loops then."""
    return torch.compile(composed, dynamic=False)


def dense(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """A gated feed-forward of equal active size, all in torch."""
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def dense_inputs(shape: Shape, device: str) -> list[Tensor]:
    """x and the weights of `dense` with K times the inner width."""
    one = Shape(shape.name, shape.tokens, shape.hidden, shape.inner * shape.k, 1, 1)
    inputs = draw(one, device)
    return [inputs.x, inputs.gate_up[0], inputs.down[0]]


def step(function: Function, leaves: list[Tensor], *rest: Tensor) -> Callable[[], Any]:
    """Forward and backward with gradients of all `leaves`."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    dy = torch.ones_like(leaves[0])
    return lambda: torch.autograd.grad(function(*leaves, *rest), leaves, dy)


def forward(function: Function, *args: Tensor) -> Callable[[], Tensor]:
    """The forward alone, no gradient recorded."""

    def run() -> Tensor:
        with torch.no_grad():
            return function(*args)

    return run
