"""Cases of moe: a float64 loop over experts is right; gradients are those autograd finds in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...ops.expert_layout import split_pairs
from ...ops.gated_activation import ACTIVATIONS, gated_activation
from ...ops.grouped_matmul import expert_ranges
from ...ops.moe import moe_ref
from ...ops.moe_dispatch import moe_dispatch_ref
from ..moe_problem import MoeProblem
from ..opinfo import Args, Case, OpInfo

# Sizes that fit no tile and whole ones; no token, one, few an expert, more than a block of rows.
SHAPES: tuple[dict[str, Any], ...] = (
    {"tokens": 0, "hidden": 16, "inner": 8, "experts": 4, "k": 2},
    {"tokens": 1, "hidden": 33, "inner": 17, "experts": 3, "k": 1, "biases": "both"},
    {"tokens": 5, "hidden": 64, "inner": 32, "experts": 8, "k": 2, "base": "float32"},
    {"tokens": 37, "hidden": 70, "inner": 33, "experts": 6, "k": 3, "biases": "gate_up"},
    {"tokens": 19, "hidden": 48, "inner": 40, "experts": 16, "k": 16, "base": "same"},
    {"tokens": 90, "hidden": 96, "inner": 64, "experts": 12, "k": 4, "load": "zipf"},
    {"tokens": 700, "hidden": 24, "inner": 20, "experts": 3, "k": 2, "biases": "down"},
)
BENCH_SHAPES: tuple[dict[str, Any], ...] = tuple(
    {"tokens": tokens, "hidden": 512, "inner": inner, "experts": experts, "k": k}
    for inner, experts, k in ((256, 64, 8), (1024, 8, 2))
    for tokens in (1, 8, 64, 2048)
)


def arguments(problem: MoeProblem, g: torch.Generator, *, keep: bool = True) -> Args:
    """The op's arguments up to `out_dtype`; the generator's seed chooses the draw."""
    layer = problem.layer(g.initial_seed())
    offsets, slots = moe_dispatch_ref(
        layer.topk_ids, layer.gate_up.shape[0], layer.first_expert or 0
    )
    return (
        layer.x, layer.gate_up, layer.down, layer.topk_weights, offsets, slots,
        layer.gate_up_bias, layer.down_bias, layer.base, layer.activation, keep, layer.out_dtype,
    )  # fmt: skip


def _case(problem: MoeProblem, *, keep: bool = True, full: bool = False) -> Case:
    return Case(
        label=problem.label.replace(" ", "-"),
        make=lambda g: (*arguments(problem, g, keep=keep), False),
        full=full,
        gradients=keep and problem.tokens > 0,
    )


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    for i, shape in enumerate(SHAPES):
        for j, activation in enumerate(ACTIVATIONS):
            # Two activations of a shape in every run, all of them in the full one.
            problem = MoeProblem(**shape, dtype=dtype, activation=activation)
            yield _case(problem, full=(i + j) % 2 == 1)
    sizes: dict[str, Any] = {"hidden": 40, "inner": 24, "dtype": dtype}
    one = MoeProblem(tokens=130, experts=5, k=1, load="one", biases="both", **sizes)
    yield _case(one)
    # Rows of no expert have no pre: it is not compared.
    held = MoeProblem(tokens=23, experts=9, k=4, held=(4, 3), base="float32", **sizes)
    yield _case(held, keep=False)
    holes = MoeProblem(tokens=31, experts=7, k=3, load="holes", **sizes)
    yield _case(holes, keep=False)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    yield _case(MoeProblem(tokens=9, experts=4, k=2, out_dtype=other, **sizes))

    def strided(g: torch.Generator) -> Args:
        problem = MoeProblem(tokens=9, experts=4, k=2, strided=True, base="same", **sizes)
        args = list(arguments(problem, g))
        args[3] = args[3].contiguous()
        return *args, False

    yield Case(label="strided", make=strided)

    def in_turns(g: torch.Generator) -> Args:
        """Experts as GPT-OSS stores them: transposed, columns of gate and value in turns."""
        problem = MoeProblem(tokens=9, experts=4, k=2, biases="both", **sizes)
        args = list(arguments(problem, g))
        args[1:3] = (w.mT.contiguous().mT for w in args[1:3])
        return *args, True

    yield Case(label="in-turns", make=in_turns)


def exact(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_weights: Tensor,
    offsets: Tensor,
    slots: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    base: Tensor | None,
    activation: str,
    keep: bool,
    out_dtype: Any = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """`moe` in float64, without a rounding in between."""
    x64, k = x.double(), topk_weights.shape[1]
    y = torch.zeros_like(x64) if base is None else base.double()
    pre = x64.new_zeros(slots.shape[0], gate_up.shape[1])
    for e, rows in expert_ranges(offsets, slots.shape[0]):
        slot = slots[rows].long()
        h = x64[slot // k] @ gate_up[e].double().T
        if gate_up_bias is not None:
            h = h + gate_up_bias[e].double()
        h = split_pairs(h) if interleaved else h
        pre[rows] = h.detach()
        gate, up = h.chunk(2, -1)
        o = gated_activation(gate, up, activation) @ down[e].double().T
        if down_bias is not None:
            o = o + down_bias[e].double()
        y = y.index_add(0, slot // k, o * topk_weights.double().reshape(-1)[slot].unsqueeze(1))
    return y, pre if keep else pre[:0]


def _peer(*args: Any) -> tuple[Tensor, Tensor]:
    y, pre = moe_ref(*args)
    return y, pre.detach()


def flops(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, offsets: Tensor, *_: Any
) -> int:
    """Of both products."""
    return 2 * int(offsets[-1]) * (gate_up[0].numel() + down[0].numel())


def active(offsets: Tensor) -> int:
    """Experts that have rows."""
    return int((offsets.diff() > 0).sum())


def _bytes(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, offsets: Tensor, *_: Any
) -> int:
    return 2 * x.nbytes + active(offsets) * (gate_up[0].nbytes + down[0].nbytes)


INFOS = [
    OpInfo(
        name="moe",
        cases=_cases,
        exact=exact,
        peer=_peer,
        grad_args=(0, 1, 2, 3, 6, 7, 8),
        bench_cases=lambda dtype: (
            _case(MoeProblem(**shape, dtype=dtype), keep=False) for shape in BENCH_SHAPES
        ),
        bytes_moved=_bytes,
        flops=flops,
        variants=ACTIVATIONS,
    ),
]
