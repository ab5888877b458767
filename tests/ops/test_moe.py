"""moe against a float64 loop over experts; sorting of slots; drawn shapes; hostile input."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastllm import _C
from fastllm.ops import moe, moe_dispatch
from fastllm.ops.registry import OPS, Op
from fastllm.testing.check import Judge
from fastllm.testing.moe_problem import (
    ACTIVATIONS,
    BIASES,
    LOADS,
    MoeProblem,
    draw_ids,
    expert_loop,
    problems,
)
from fastllm.testing.opinfo import generator

DTYPES = (torch.float32, torch.bfloat16)
ISAS = _C.isas()
WIDE = [
    MoeProblem(tokens=4096, hidden=48, inner=24, experts=64, k=8, dtype=dtype, load=load)
    for dtype in DTYPES
    for load in ("uniform", "zipf", "one")
] + [
    MoeProblem(tokens=4096, hidden=33, inner=17, experts=experts, k=k, activation="gelu")
    for experts, k in ((1, 1), (8, 2), (512, 16))
]


def cases(quick: list[MoeProblem], full: list[MoeProblem]) -> list[Any]:
    return [
        pytest.param(p, id=f"{i} {p.label}", marks=[pytest.mark.full] if i >= len(quick) else [])
        for i, p in enumerate([*quick, *full])
    ]


def judge(problem: MoeProblem, **how: Any) -> Judge:
    def draw(number: int) -> tuple[list[Tensor], list[Tensor]]:
        layer = problem.layer(number)
        return [expert_loop(layer.double(), exact=True)], [expert_loop(layer, exact=False)]

    return Judge(draw, **how)


@pytest.mark.parametrize("problem", cases(problems(32, seed=1), [*WIDE, *problems(600, seed=2)]))
def test_forward_is_within_the_bound_on_every_isa_and_thread_count(problem: MoeProblem) -> None:
    layer, bound = problem.layer(), judge(problem)
    for isa in ISAS:
        _C.set_isa(isa)
        torch.set_num_threads(1)
        y = moe(**layer.arguments)
        assert y.dtype == (problem.out_dtype or problem.dtype) and y.is_contiguous()
        bound.check([y], isa)
        torch.set_num_threads(2)
        assert torch.equal(moe(**layer.arguments), y), f"{isa}: the thread count changes bits"


@pytest.mark.parametrize("problem", cases(problems(6, seed=3), problems(60, seed=4)))
def test_the_definition_is_within_the_bound(
    problem: MoeProblem, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("moe", "moe_dispatch"):
        monkeypatch.setattr(OPS[name], "tables", {"cpu": [], "cuda": []})
        monkeypatch.setattr(OPS[name], "_rows", {})
    judge(problem).check([moe(**problem.layer().arguments)], "reference")


@st.composite
def drawn(draw: st.DrawFn) -> MoeProblem:
    experts = draw(st.integers(1, 40))
    first = draw(st.integers(0, experts - 1))
    held = (first, draw(st.integers(1, experts - first)))
    return MoeProblem(
        tokens=draw(st.integers(0, 70)), hidden=draw(st.integers(1, 80)),
        inner=draw(st.integers(1, 60)), experts=experts, k=draw(st.integers(1, min(experts, 16))),
        dtype=draw(st.sampled_from(DTYPES)), load=draw(st.sampled_from(LOADS)),
        activation=draw(st.sampled_from(ACTIVATIONS)), biases=draw(st.sampled_from(BIASES)),
        base=draw(st.sampled_from(("", "float32", "same"))), held=held,
        out_dtype=draw(st.sampled_from((None, *DTYPES))), strided=draw(st.booleans()),
    )  # fmt: skip


def check_drawn(problem: MoeProblem) -> None:
    # A drawn problem may have one number: its peer's error is chance for more than 8 draws.
    judge(problem, draws=100).check([moe(**problem.layer().arguments)], problem.label)


@given(drawn())
@settings(max_examples=20, deadline=None)
def test_drawn_shapes_and_strides(problem: MoeProblem) -> None:
    check_drawn(problem)


@pytest.mark.full
@given(drawn())
@settings(max_examples=600, deadline=None)
def test_many_drawn_shapes_and_strides(problem: MoeProblem) -> None:
    check_drawn(problem)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(
    ("tokens", "experts", "k"),
    [(0, 4, 2), (1, 1, 1), (1, 512, 16), (33, 5, 3), (257, 64, 8), (4096, 128, 8), (70, 512, 1)],
)
def test_dispatch_is_the_stable_sort_by_expert(
    tokens: int, experts: int, k: int, load: str
) -> None:
    ids = draw_ids(generator(tokens + experts), tokens, experts, k, load)
    flat = ids.flatten().tolist()
    for first, count in {(0, experts), (experts // 3, max(1, experts // 2))}:
        lists: list[list[int]] = [[] for _ in range(count)]
        for slot, e in enumerate(flat):
            if first <= e < first + count:
                lists[e - first].append(slot)
        for isa in ISAS:
            _C.set_isa(isa)
            for threads in (1, 2):
                torch.set_num_threads(threads)
                offsets, slots = moe_dispatch(ids, count, first)
                assert offsets.dtype == slots.dtype == torch.int32
                bounds = offsets.tolist()
                assert bounds[0] == 0 and len(bounds) == count + 1
                ends = pairwise(bounds)
                assert [slots[a:b].tolist() for a, b in ends] == lists
                assert slots.shape == (tokens * k,) and (slots[bounds[-1] :] == -1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sorted_slots_may_be_given(dtype: torch.dtype) -> None:
    layer = MoeProblem(tokens=33, hidden=40, inner=24, experts=8, k=3, dtype=dtype).layer()
    dispatch = moe_dispatch(layer.topk_ids, 8)
    assert torch.equal(moe(**layer.arguments, dispatch=dispatch), moe(**layer.arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", ["", "float32", "same"])
def test_tokens_without_experts_are_the_base(dtype: torch.dtype, base: str) -> None:
    problem = MoeProblem(
        tokens=20, hidden=40, inner=24, experts=8, k=3, dtype=dtype, base=base, biases="both"
    )
    layer = problem.layer()
    layer.topk_ids[::2] = -1
    want = torch.zeros(10, 40) if layer.base is None else layer.base[::2]
    for isa in ISAS:
        _C.set_isa(isa)
        assert torch.equal(moe(**layer.arguments)[::2], want.to(dtype)), isa


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_token_and_a_bad_expert_spoil_their_own_rows_alone(
    dtype: torch.dtype, bad: float
) -> None:
    layer = MoeProblem(tokens=70, hidden=40, inner=24, experts=16, k=3, dtype=dtype).layer()
    for isa in ISAS:
        _C.set_isa(isa)
        clean = moe(**layer.arguments)
        x, down = layer.x.clone(), layer.down.clone()
        x[30, 3], down[5] = bad, bad
        got = moe(**{**layer.arguments, "x": x, "down": down})
        hit = (layer.topk_ids == 5).any(1)
        hit[30] = True
        assert not got[hit].isfinite().all(1).any(), isa
        assert torch.equal(got[~hit], clean[~hit]), isa


def serving(op: Op, device: str, args: tuple[Any, ...], dtype: torch.dtype) -> str:
    """The name of the row that the table of `device` gives these arguments."""
    variant = op.variant(*args) if op.variant is not None else None
    for row in op.tables[device]:
        known = variant is None or variant in row.variants
        fits = row.when is None or row.when(*args)
        if not row.opt_in and dtype in row.dtypes and known and fits:
            return row.name
    return "reference"


TABLE = [
    MoeProblem(**{"tokens": 5, "hidden": 40, "inner": 24, "experts": 8, "k": 2, **changed})
    for changed in (
        {}, {"tokens": 0}, {"tokens": 1}, {"hidden": 17, "inner": 5}, {"k": 8}, {"load": "holes"},
        {"biases": "both"}, {"biases": "gate_up"}, {"biases": "down"}, {"base": "float32"},
        {"base": "same"}, {"held": (2, 3)}, {"out_dtype": torch.float32},
        {"out_dtype": torch.bfloat16}, *({"activation": a} for a in ACTIVATIONS[1:]),
    )
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", TABLE, ids=lambda p: p.label)
def test_every_variant_has_a_native_and_a_triton_row(
    problem: MoeProblem, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = MoeProblem(**{**problem.__dict__, "dtype": dtype}).layer()
    seen: dict[str, tuple[Any, ...]] = {}
    for name in ("moe", "moe_backward"):
        record(name, seen, monkeypatch)
    leaved, leaves = layer.leaves()
    torch.autograd.grad(moe(**leaved.arguments).float().sum(), leaves)
    assert set(seen) == {"moe", "moe_backward"}
    for name, args in seen.items():
        for device, row in (("cpu", "native"), ("cuda", "triton")):
            assert serving(OPS[name], device, args, dtype) == row, name


def record(name: str, seen: dict[str, tuple[Any, ...]], patch: pytest.MonkeyPatch) -> None:
    """Keep the arguments of an op's next call."""
    select = OPS[name].select
    choose = OPS[name]._choose

    def note_select(args: tuple[Any, ...]) -> Any:
        seen[name] = args
        return select(args)

    def note_choose(first: Tensor, args: tuple[Any, ...]) -> Any:
        seen[name] = args
        return choose(first, args)

    patch.setattr(OPS[name], "select", note_select)
    patch.setattr(OPS[name], "_choose", note_choose)


def good() -> dict[str, Any]:
    layer = MoeProblem(tokens=5, hidden=8, inner=4, experts=6, k=2, biases="both").layer()
    return {n: v for n, v in layer.arguments.items() if n != "base"}


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32).expand(5, len(values)).contiguous()


def nan_weights() -> Tensor:
    weights = torch.ones(5, 2)
    weights[3, 1] = float("nan")
    return weights


BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "x of three dimensions": ("x", {"x": torch.ones(1, 5, 8)}),
    "x of integers": ("x", {"x": torch.ones(5, 8).int()}),
    "x in half": ("x", {"x": torch.ones(5, 8).half()}),
    "gate_up of other columns": ("gate_up", {"gate_up": torch.ones(6, 8, 9)}),
    "gate_up of odd rows": ("gate_up", {"gate_up": torch.ones(6, 7, 8)}),
    "gate_up in two dimensions": ("gate_up", {"gate_up": torch.ones(8, 8)}),
    "gate_up in another dtype": ("gate_up", {"gate_up": torch.ones(6, 8, 8).bfloat16()}),
    "down of other experts": ("down", {"down": torch.ones(5, 8, 4)}),
    "down of other columns": ("down", {"down": torch.ones(6, 8, 5)}),
    "down of other rows": ("down", {"down": torch.ones(6, 7, 4)}),
    "down in another dtype": ("down", {"down": torch.ones(6, 8, 4).bfloat16()}),
    "down on another device": ("down", {"down": torch.ones(6, 8, 4, device="meta")}),
    "weights on another device": (
        "topk_weights",
        {"topk_weights": torch.ones(5, 2, device="meta")},
    ),
    "base on another device": ("base", {"base": torch.ones(5, 8, device="meta")}),
    "ids past the end": ("topk_ids", {"topk_ids": ids(0, 6)}),
    "ids below -1": ("topk_ids", {"topk_ids": ids(0, -2)}),
    "ids of other tokens": ("topk_ids", {"topk_ids": ids(0, 1)[:4]}),
    "ids int64": ("topk_ids", {"topk_ids": ids(0, 1).long()}),
    "ids in one dimension": ("topk_ids", {"topk_ids": ids(0, 1)[:, 0]}),
    "more ids than weights": ("topk_weights", {"topk_ids": ids(0, 1, 2)}),
    "more choices than experts": (
        "topk_ids",
        {"topk_ids": ids(*range(6), 0), "topk_weights": torch.ones(5, 7)},
    ),
    "weights NaN": ("topk_weights", {"topk_weights": nan_weights()}),
    "weights in bfloat16": ("topk_weights", {"topk_weights": torch.ones(5, 2).bfloat16()}),
    "gate_up_bias of other columns": ("gate_up_bias", {"gate_up_bias": torch.ones(6, 4)}),
    "down_bias of other experts": ("down_bias", {"down_bias": torch.ones(5, 8)}),
    "down_bias of integers": ("down_bias", {"down_bias": torch.ones(6, 8).int()}),
    "base of other tokens": ("base", {"base": torch.ones(4, 8)}),
    "base in another dtype": ("base", {"base": torch.ones(5, 8).double()}),
    "activation": ("activation", {"activation": "relu"}),
    "out_dtype": ("out_dtype", {"out_dtype": torch.float16}),
    "first_expert": ("first_expert", {"first_expert": -1}),
    "offsets descend": (
        "dispatch",
        {"dispatch": (torch.tensor([0, 5, 3, 5, 6, 8, 10]).int(), torch.arange(10).int())},
    ),
    "offsets of other experts": (
        "dispatch",
        {"dispatch": (torch.tensor([0, 5, 10]).int(), torch.arange(10).int())},
    ),
    "slots of other tokens": (
        "dispatch",
        {"dispatch": (torch.tensor([0, 1, 2, 3, 4, 5, 6]).int(), torch.arange(9).int())},
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    argument, changed = BAD[name]
    moe(**good())
    with pytest.raises(ValueError, match=rf"\b{argument}\b"):
        moe(**{**good(), **changed})
