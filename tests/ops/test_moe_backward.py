"""Gradients of moe against a float64 loop over experts; what is kept between the passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastllm import _C
from fastllm.ops import moe
from fastllm.ops.registry import OPS
from fastllm.testing.check import Judge
from fastllm.testing.moe_problem import (
    ACTIVATIONS,
    BIASES,
    Layer,
    MoeProblem,
    expert_loop,
    problems,
)
from fastllm.testing.opinfo import generator

DTYPES = (torch.float32, torch.bfloat16)
ISAS = _C.isas()
WIDE = [
    MoeProblem(tokens=4096, hidden=48, inner=24, experts=experts, k=k, dtype=dtype, load=load)
    for dtype in DTYPES
    for experts, k, load in ((64, 8, "zipf"), (8, 2, "one"), (512, 16, "uniform"))
]


def cases(quick: list[MoeProblem], full: list[MoeProblem]) -> list[Any]:
    return [
        pytest.param(p, id=f"{i} {p.label}", marks=[pytest.mark.full] if i >= len(quick) else [])
        for i, p in enumerate([*quick, *full])
    ]


def gradients(run: Any, layer: Layer, dy: Tensor) -> list[Tensor]:
    """Of all floating arguments that the layer has, in the order of LEAVES."""
    layer, leaves = layer.leaves()
    y = run(layer)
    return list(torch.autograd.grad(y, leaves, dy.to(y.dtype), materialize_grads=True))


def ours(layer: Layer) -> Tensor:
    return moe(**layer.arguments)


def incoming(problem: MoeProblem, draw: int) -> Tensor:
    """dy, rounded as the output is, and as the backward does first, to the dtype of x."""
    dy = torch.randn((problem.tokens, problem.hidden), generator=generator(draw + 1))
    out_dtype = problem.out_dtype or problem.dtype
    return dy.to(out_dtype).to(problem.dtype).to(out_dtype)


def judge(problem: MoeProblem) -> Judge:
    def draw(number: int) -> tuple[list[Tensor], list[Tensor]]:
        layer, dy = problem.layer(number), incoming(problem, number)
        exact = gradients(lambda a: expert_loop(a, exact=True), layer.double(), dy)
        return exact, gradients(lambda a: expert_loop(a, exact=False), layer, dy)

    # A few tokens decide all numbers of a gradient, and with one column or expert its peer's error
    # is chance: of 60 draws of such a problem ours erred by 5.8e-8 on average and 3.0e-7 at most,
    # the peer by 4.9e-8 and 2.6e-7, and by 6.8e-8 in the first 24.
    return Judge(draw, draws=100)


@pytest.mark.parametrize("problem", cases(problems(20, seed=11), [*WIDE, *problems(480, seed=12)]))
def test_gradients_are_within_the_bound_on_every_isa_and_thread_count(problem: MoeProblem) -> None:
    layer, dy, bound = problem.layer(), incoming(problem, 0), judge(problem)
    leaves = layer.leaves()[1]
    for isa in ISAS:
        _C.set_isa(isa)
        torch.set_num_threads(1)
        alone = gradients(ours, layer, dy)
        for gradient, leaf in zip(alone, leaves, strict=True):
            assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape
        bound.check(alone, f"{isa}: x, gate_up, down, weights, then biases and base")
        torch.set_num_threads(2)
        for a, b in zip(alone, gradients(ours, layer, dy), strict=True):
            assert torch.equal(a, b), f"{isa}: the thread count changes bits"


@pytest.mark.parametrize("problem", cases(problems(4, seed=13), problems(40, seed=14)))
def test_the_definition_is_within_the_bound(
    problem: MoeProblem, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("moe", "moe_backward", "moe_dispatch"):
        monkeypatch.setattr(OPS[name], "tables", {"cpu": [], "cuda": []})
        monkeypatch.setattr(OPS[name], "_rows", {})
    layer = problem.layer()
    judge(problem).check(gradients(ours, layer, incoming(problem, 0)), "reference")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biases", BIASES)
def test_gradcheck_of_the_judge_s_loop(activation: str, biases: str) -> None:
    problem = MoeProblem(
        tokens=5, hidden=4, inner=3, experts=6, k=2, activation=activation, biases=biases,
        base="float32", load="holes",
    )  # fmt: skip
    layer, leaves = problem.layer().double().leaves()

    def run(*args: Tensor) -> Tensor:
        return expert_loop(layer, exact=True)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_has_no_part_has_a_gradient_of_zero(dtype: torch.dtype) -> None:
    problem = MoeProblem(
        tokens=40, hidden=40, inner=24, experts=16, k=3, dtype=dtype, load="half", biases="both",
        base="same", held=(4, 8),
    )  # fmt: skip
    layer = problem.layer()
    layer.topk_ids[7] = -1
    here = (layer.topk_ids >= 4) & (layer.topk_ids < 12)
    for isa in ISAS:
        _C.set_isa(isa)
        dx, d_gate_up, d_down, d_weights, *d_biases, d_base = gradients(
            ours, layer, torch.ones(40, 40)
        )
        for gradient in (d_gate_up, d_down, *d_biases):  # experts 4 to 7 have nothing to do
            assert not gradient[:4].any() and gradient[4:].flatten(1).any(1).all(), isa
        assert not d_weights[~here].any() and d_weights[here].all(), isa
        assert not dx[~here.any(1)].any() and dx[here.any(1)].any(1).all(), isa
        assert (d_base == 1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wanted_gradients_have_the_bits_that_they_have_among_all(dtype: torch.dtype) -> None:
    problem = MoeProblem(
        tokens=33, hidden=40, inner=24, experts=8, k=3, dtype=dtype, biases="both", base="float32"
    )
    layer, dy = problem.layer(), incoming(problem, 0)
    names = ["x", "gate_up", "down", "topk_weights", "gate_up_bias", "down_bias", "base"]
    every = dict(zip(names, gradients(ours, layer, dy), strict=True))
    for wanted in (*([name] for name in names), ["x", "topk_weights"], ["gate_up", "down_bias"]):
        chosen, leaves = layer.leaves(wanted)
        got = torch.autograd.grad(ours(chosen), leaves, dy)
        for name, gradient in zip(wanted, got, strict=True):
            assert torch.equal(gradient, every[name]), (wanted, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_parameters_may_be_float32(dtype: torch.dtype) -> None:
    problem = MoeProblem(tokens=33, hidden=40, inner=24, experts=8, k=3, dtype=torch.bfloat16)
    layer, leaves = problem.layer().leaves(["gate_up", "down"])
    plain = torch.autograd.grad(ours(layer).float().square().sum(), leaves)
    for leaf in leaves:
        leaf.grad_dtype = dtype
    wide = torch.autograd.grad(ours(layer).float().square().sum(), leaves)
    for a, b in zip(plain, wide, strict=True):
        assert b.dtype == dtype and torch.equal(b.bfloat16(), a)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biases", ["", "both"])
def test_kept_bytes_are_those_of_the_docstring(dtype: torch.dtype, biases: str) -> None:
    tokens, hidden, inner, experts, k = 50, 40, 24, 8, 3
    layer = MoeProblem(
        tokens=tokens, hidden=hidden, inner=inner, experts=experts, k=k, dtype=dtype,
        biases=biases, base="same",
    ).layer()  # fmt: skip
    layer, leaves = layer.leaves()
    parameters = {p.data_ptr() for p in leaves if p is not layer.x and p is not layer.topk_weights}
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        moe(**layer.arguments)
    c = dtype.itemsize
    of_a_token = hidden * c + k * (2 * inner * c + 4 + 4)
    beside_parameters = {at: size for at, size in kept.items() if at not in parameters}
    assert sum(beside_parameters.values()) == tokens * of_a_token + 4 * (experts + 1)
    assert moe.__doc__ is not None and "bytes a token" in moe.__doc__
