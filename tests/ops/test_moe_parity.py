"""moe: a token's bits depend on nothing but the token, its experts and their weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllm import _C
from fastllm.ops import moe, moe_dispatch
from fastllm.testing.moe_problem import LOADS, Layer, MoeProblem, draw_ids
from fastllm.testing.opinfo import generator

DTYPES = (torch.float32, torch.bfloat16)
ISAS = _C.isas()
PROBLEMS = [
    MoeProblem(
        tokens=90, hidden=hidden, inner=inner, experts=experts, k=k, dtype=dtype, biases=biases,
        base=base, load=load,
    )
    for dtype in DTYPES
    for hidden, inner, experts, k, biases, base, load in (
        (64, 32, 16, 4, "", "", "zipf"),
        (70, 33, 5, 2, "both", "float32", "uniform"),
        (300, 280, 4, 1, "", "same", "holes"),
    )
]  # fmt: skip


def run(layer: Layer, threads: int = 1) -> Tensor:
    torch.set_num_threads(threads)
    return moe(**layer.arguments)


def of_tokens(layer: Layer, dy: Tensor) -> list[Tensor]:
    """Gradients that belong to single tokens: of x, weights and base."""
    layer, leaves = layer.leaves(["x", "topk_weights", "base"])
    return list(torch.autograd.grad(moe(**layer.arguments), leaves, dy))


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.label)
def test_a_token_has_the_same_bits_alone_and_in_any_batch(problem: MoeProblem) -> None:
    layer = problem.layer()
    for isa in ISAS:
        _C.set_isa(isa)
        whole = run(layer)
        for rows in ([0], [89], [7, 3], range(5, 12), range(8), range(1, 90), range(20, 57)):
            for threads in (1, 2):
                part = run(layer.tokens(list(rows)), threads)
                assert torch.equal(part, whole[list(rows)]), f"{isa}: rows {rows}"


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.label)
def test_a_token_s_gradients_have_the_same_bits_alone_and_in_any_batch(problem: MoeProblem) -> None:
    layer = problem.layer()
    dy = torch.randn(90, problem.hidden, generator=generator()).to(problem.dtype)
    for isa in ISAS:
        _C.set_isa(isa)
        whole = of_tokens(layer, dy)
        for rows in ([0], [88, 2, 41], list(range(30, 47)), list(range(89, -1, -1))):
            part = of_tokens(layer.tokens(rows), dy[rows])
            for a, b in zip(part, whole, strict=True):
                assert torch.equal(a, b[rows]), f"{isa}: rows {rows}"


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.label)
def test_other_tokens_may_choose_anything(problem: MoeProblem) -> None:
    layer = problem.layer()
    for isa in ISAS:
        _C.set_isa(isa)
        whole = run(layer)
        for load in LOADS:
            ids = draw_ids(generator(1), 90, problem.experts, problem.k, load)
            ids[::3] = layer.topk_ids[::3]
            got = run(replace(layer, topk_ids=ids), 2)
            assert torch.equal(got[::3], whole[::3]), f"{isa}: {load}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_and_layouts_give_the_same_bits(dtype: torch.dtype) -> None:
    problem = MoeProblem(
        tokens=61, hidden=72, inner=40, experts=12, k=5, dtype=dtype, biases="both", base="same",
        load="zipf", strided=True,
    )  # fmt: skip
    layer = problem.layer()
    names = ("x", "gate_up", "down", "topk_weights", "gate_up_bias", "down_bias", "base")
    packed = replace(layer, **{name: getattr(layer, name).contiguous() for name in names})
    turned = replace(packed, x=packed.x.T.contiguous().T, gate_up=packed.gate_up.mT.contiguous().mT)
    for isa in ISAS:
        _C.set_isa(isa)
        y, d = run(layer, 2), gradients(layer)
        for other in (layer, packed, turned):
            assert torch.equal(run(other, 1), y), isa
            for a, b in zip(gradients(other), d, strict=True):
                assert torch.equal(a, b), isa


def gradients(layer: Layer) -> tuple[Tensor, ...]:
    layer, leaves = layer.leaves()
    return torch.autograd.grad(moe(**layer.arguments).float().square().sum(), leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_recording_a_gradient_changes_no_bit(dtype: torch.dtype) -> None:
    layer = MoeProblem(tokens=40, hidden=70, inner=33, experts=6, k=2, dtype=dtype).layer()
    for isa in ISAS:
        _C.set_isa(isa)
        recorded = moe(**layer.leaves()[0].arguments)
        assert recorded.requires_grad and torch.equal(recorded, run(layer)), isa


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_slice_gives_the_slots_that_the_whole_gives_its_experts(dtype: torch.dtype) -> None:
    """Where all experts of a token are in the slice, its output has the bits of the whole layer."""
    layer = MoeProblem(tokens=80, hidden=64, inner=32, experts=8, k=1, dtype=dtype).layer()
    for isa in ISAS:
        _C.set_isa(isa)
        whole = run(layer)
        for first, end in ((0, 3), (3, 8), (7, 8)):
            here = ((layer.topk_ids >= first) & (layer.topk_ids < end)).squeeze(1)
            cut = slice(first, end)
            part = run(
                replace(layer, gate_up=layer.gate_up[cut], down=layer.down[cut], first_expert=first)
            )
            assert torch.equal(part[here], whole[here]) and not part[~here].any(), isa


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_whose_experts_are_one_is_a_dense_layer(dtype: torch.dtype) -> None:
    """One expert and a weight of one: `linear`, `swiglu`, `linear`, to the bit."""
    from fastllm.ops import linear, swiglu

    for hidden, inner in ((64, 32), (70, 33), (576, 300)):
        layer = MoeProblem(
            tokens=37, hidden=hidden, inner=inner, experts=1, k=1, dtype=dtype
        ).layer()
        weights: dict[str, Any] = {"topk_weights": torch.ones(37, 1)}
        for isa in ISAS:
            _C.set_isa(isa)
            gate, up = linear(layer.x, layer.gate_up[0]).chunk(2, dim=1)
            want = linear(swiglu(gate, up), layer.down[0])
            assert torch.equal(run(replace(layer, **weights)), want), isa


def test_a_dispatch_made_for_others_is_not_needed_again() -> None:
    layer = MoeProblem(tokens=33, hidden=40, inner=24, experts=8, k=3).layer()
    dispatch = moe_dispatch(layer.topk_ids, 8)
    kept = [t.clone() for t in dispatch]
    for _ in range(2):
        assert torch.equal(moe(**layer.arguments, dispatch=dispatch), run(layer))
    assert all(torch.equal(a, b) for a, b in zip(kept, dispatch, strict=True))
