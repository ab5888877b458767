"""moe_gate against a float64 router in plain Python, and a whole layer's gradient of its router."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastllm import _C
from fastllm.ops import linear, moe, moe_gate
from fastllm.testing.check import Judge
from fastllm.testing.moe_problem import MoeProblem, covering, expert_loop, problems
from fastllm.testing.opinfo import generator

ISAS = _C.isas()
AXES: dict[str, Any] = {
    "tokens": (0, 1, 2, 5, 17, 64, 129),
    "experts": (1, 2, 4, 8, 16, 31, 60, 64, 128, 256, 512),
    "k": (1, 2, 3, 4, 6, 8, 12, 16),
    "scoring": ("softmax", "sigmoid"),
    "bias": (False, False, True),
    "groups": (1, 1, 2, 4, 8),
    "group_score": ("max", "top2"),
    "renormalize": (False, True),
    "scale": (1.0, 2.5),
    "values": ("normal", "normal", "grid", "wide", "barred"),
}


def routers(count: int, seed: int) -> list[dict[str, Any]]:
    """Sets of arguments that are legal: groups divide, k experts are left."""
    rows = covering(count, seed, **AXES)
    for row in rows:
        while row["experts"] % row["groups"] or row["experts"] // row["groups"] < 2:
            if row["groups"] == 1:
                break
            row["groups"] //= 2
        size = row["experts"] // row["groups"]
        row["k"] = min(row["k"], row["experts"])
        least = -(-row["k"] // size)
        row["kept_groups"] = min(row["groups"], max(least, row["groups"] // 2))
        row["k"] = min(row["k"], row["kept_groups"] * size)
    return rows


def label(row: dict[str, Any]) -> str:
    return " ".join(f"{value}" for value in row.values())


def inputs(row: dict[str, Any], draw: int = 0) -> tuple[Tensor, Tensor | None]:
    """Logits and bias; "grid": with many ties; "wide": up to 80; "barred": some are -inf."""
    g = generator(1000 * draw + row["tokens"] + 7 * row["experts"])
    logits = torch.randn(row["tokens"], row["experts"], generator=g) * 2
    if row["values"] == "grid":
        logits = (logits * 2).round() / 2
    elif row["values"] == "wide":
        logits = logits * 13
    elif row["values"] == "barred":
        barred = torch.rand(logits.shape, generator=g) < 0.2
        barred[:, : row["k"]] = False
        if row["groups"] == 1:  # in a group enough must be left
            logits[barred] = float("-inf")
    bias = torch.randn(row["experts"], generator=g) * 0.1 if row["bias"] else None
    return logits, bias


def options(row: dict[str, Any]) -> dict[str, Any]:
    names = ("k", "scoring", "groups", "kept_groups", "group_score", "renormalize", "scale")
    return {name: row[name] for name in names}


def scores_of(logits: Tensor, scoring: str) -> Tensor:
    """In the dtype of logits."""
    return torch.softmax(logits, 1) if scoring == "softmax" else torch.sigmoid(logits)


def chosen(row: dict[str, Any], choice: list[float]) -> list[int]:
    """The experts of one token in descending order of choice, ties to the lower id."""
    size = len(choice) // row["groups"]
    ranked = []
    for group in range(row["groups"]):
        best = sorted(choice[group * size : (group + 1) * size], reverse=True)
        top2 = row["group_score"] == "top2" and row["groups"] > 1
        ranked.append((-sum(best[: 2 if top2 else 1]), group))
    kept = {group for _, group in sorted(ranked)[: row["kept_groups"]]}
    allowed = [e for e in range(len(choice)) if e // size in kept]
    return sorted(allowed, key=lambda e: (-choice[e], e))[: row["k"]]


def results(row: dict[str, Any], logits: Tensor, ids: Tensor) -> list[Tensor]:
    """Weights and sums for given ids, in the dtype of logits."""
    scores = scores_of(logits, row["scoring"])
    weights = scores.gather(1, ids.long())
    if row["renormalize"]:
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    shares = scores
    if row["scoring"] == "sigmoid":
        shares = scores / (scores.sum(1, keepdim=True) + 1e-20)
    z = torch.logsumexp(logits, 1).square().sum()
    return [weights * row["scale"], shares.sum(0), z]


def cases(quick: int, full: int) -> list[Any]:
    rows = [*routers(quick, seed=1), *routers(full, seed=2)]
    return [
        pytest.param(row, id=f"{i} {label(row)}", marks=[pytest.mark.full] if i >= quick else [])
        for i, row in enumerate(rows)
    ]


@pytest.mark.parametrize("row", cases(24, 260))
def test_choice_weights_and_sums_are_right_on_every_isa(row: dict[str, Any]) -> None:
    logits, bias = inputs(row)
    choice = logits.double()
    if bias is not None or (row["groups"] > 1 and row["group_score"] == "top2"):
        choice = scores_of(choice, row["scoring"]) + (0.0 if bias is None else bias.double())
    want = [chosen(row, values) for values in choice.tolist()]
    for isa in ISAS:
        _C.set_isa(isa)
        gate = moe_gate(logits, bias=bias, **options(row))
        by_logits = torch.equal(choice, logits.double())
        check_choice(gate.topk_ids, want, choice, by_logits, isa)
        flat = gate.topk_ids.flatten().long()
        assert torch.equal(gate.counts, torch.bincount(flat, minlength=row["experts"]).int())
        torch.set_num_threads(1)
        for a, b in zip(gate, moe_gate(logits, bias=bias, **options(row)), strict=True):
            assert torch.equal(a, b), f"{isa}: the thread count changes bits"
        torch.set_num_threads(2)

    def draw(number: int) -> tuple[list[Tensor], list[Tensor]]:
        logits, bias = inputs(row, number)
        ids = moe_gate(logits, bias=bias, **options(row)).topk_ids
        return results(row, logits.double(), ids), results(row, logits, ids)

    bound = Judge(draw)
    for isa in ISAS:
        _C.set_isa(isa)
        gate = moe_gate(logits, bias=bias, **options(row))
        bound.check([gate.topk_weights, gate.score_sum, gate.z_sum], isa)


def check_choice(
    ids: Tensor, want: list[list[int]], choice: Tensor, by_logits: bool, isa: str
) -> None:
    """Ids are the wanted ones, but where the choice is a sum that float32 rounds to ties."""
    if by_logits or not want or ids.tolist() == want:
        assert ids.tolist() == want, isa
        return
    assert all(len(set(row)) == len(row) for row in ids.tolist()), isa
    ours = choice.gather(1, ids.long())
    theirs = choice.gather(1, torch.tensor(want))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6, msg=isa)


@pytest.mark.parametrize("row", cases(8, 110))
def test_gradients_of_logits_are_within_the_bound(row: dict[str, Any]) -> None:
    def gradient(logits: Tensor, ids: Tensor | None, bias: Tensor | None, draw: int) -> Tensor:
        leaf = logits.clone().requires_grad_()
        if ids is None:
            gate = moe_gate(leaf, bias=bias, **options(row))
            got = [gate.topk_weights, gate.score_sum, gate.z_sum]
        else:
            got = results(row, leaf, ids)
        g = generator(draw)
        loss = sum((r * torch.randn(r.shape, generator=g).to(r.dtype)).sum() for r in got)
        return torch.autograd.grad(loss, leaf)[0].masked_fill(logits == -torch.inf, 0.0)

    def draw(number: int) -> tuple[list[Tensor], list[Tensor]]:
        logits, bias = inputs(row, number)
        ids = moe_gate(logits, bias=bias, **options(row)).topk_ids
        exact = gradient(logits.double(), ids, bias, number)
        return [exact], [gradient(logits, ids, bias, number)]

    # The numbers of one token depend on each other: more draws tell its peer's error.
    bound, (logits, bias) = Judge(draw, draws=40), inputs(row)
    for isa in ISAS:
        _C.set_isa(isa)
        bound.check([gradient(logits, None, bias, 0)], isa)


@pytest.mark.parametrize("problem", problems(5, seed=7, load=["uniform"], held=["all"]), ids=str)
def test_a_layer_s_gradient_reaches_its_router(problem: MoeProblem) -> None:
    """router -> gate -> experts, gradients of the router's weight and of x through both paths."""

    def run(number: int, exact: bool, ours: bool) -> list[Tensor]:
        layer, g = problem.layer(number), generator(number)
        router = torch.randn(problem.experts, problem.hidden, generator=g).to(problem.dtype)
        dy = torch.randn(problem.tokens, problem.hidden, generator=g)
        ids = moe_gate(linear(layer.x, router, None, torch.float32), problem.k).topk_ids
        layer = layer.double() if exact else layer
        x = layer.x.detach().requires_grad_()
        router = (router.double() if exact else router).requires_grad_()
        rest = {**layer.arguments, "x": x, "topk_ids": ids}
        if ours:
            gate = moe_gate(linear(x, router, None, torch.float32), problem.k, renormalize=True)
            y = moe(**{**rest, "topk_weights": gate.topk_weights})
        else:
            wide = torch.float64 if exact else torch.float32
            logits = x.to(wide) @ router.to(wide).T
            row = {"scoring": "softmax", "renormalize": True, "scale": 1.0}
            weights = results(row, logits, ids)[0]
            y = expert_loop(type(layer)(**{**rest, "topk_weights": weights}), exact=exact)
        loss = (y * dy.to(y.dtype)).sum()
        return list(torch.autograd.grad(loss, (x, router)))

    judge = Judge(lambda i: (run(i, True, False), run(i, False, False)))
    judge.check(run(0, False, True), problem.label)


BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "k beyond the experts": ("k", {"k": 9}),
    "no experts at all": ("k", {"k": 0}),
    "logits NaN": ("logits", {"logits": torch.full((3, 8), float("nan"))}),
    "a row of -inf": ("logits", {"logits": torch.full((3, 8), float("-inf"))}),
    "logits in bfloat16": ("logits", {"logits": torch.ones(3, 8).bfloat16()}),
    "logits in one dimension": ("logits", {"logits": torch.ones(8)}),
    "groups that do not divide": ("groups", {"groups": 3}),
    "too many groups kept": ("kept_groups", {"groups": 4, "kept_groups": 5}),
    "k beyond the kept groups": ("k", {"groups": 4, "kept_groups": 1, "k": 3}),
    "top2 of single experts": ("group_score", {"groups": 8, "group_score": "top2", "k": 1}),
    "group_score": ("group_score", {"group_score": "mean"}),
    "scoring": ("scoring", {"scoring": "relu"}),
    "bias of other experts": ("bias", {"bias": torch.zeros(7)}),
    "bias NaN": ("bias", {"bias": torch.full((8,), float("nan"))}),
    "bias in bfloat16": ("bias", {"bias": torch.zeros(8).bfloat16()}),
    "scale": ("scale", {"scale": float("nan")}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    argument, changed = BAD[name]
    good: dict[str, Any] = {"logits": torch.randn(3, 8, generator=generator()), "k": 2}
    moe_gate(**good)
    with pytest.raises(ValueError, match=rf"\b{argument}\b"):
        moe_gate(**{**good, **changed})
