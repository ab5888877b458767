"""Every op of the registry, over dtypes x cases x ISA levels x thread counts, against float64.

A case builds its inputs and its float64 result once and loops over ISA levels and threads.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastllm import _C
from fastllm.ops.registry import OPS, Impl, Op
from fastllm.testing.check import Judge, case_arguments, case_judge, copies, results
from fastllm.testing.opinfo import (
    Case,
    OpInfo,
    all_infos,
    generator,
    outputs,
)

INFOS = all_infos()


def _cases() -> list[Any]:
    found = []
    for info in INFOS.values():
        for dtype in info.dtypes:
            for case in info.cases(dtype):
                name = f"{info.name}-{str(dtype).removeprefix('torch.')}-{case.label}"
                marks = [pytest.mark.full] if case.full else []
                found.append(pytest.param(info, dtype, case, id=name, marks=marks))
    return found


CASES = _cases()


def _bits(t: Tensor) -> Tensor:
    return t.reshape(-1).view(torch.uint8)


def _cpu_rows(op: Op, args: tuple[Any, ...]) -> list[Impl]:
    variant = op.variant(*args) if op.variant is not None else None
    first = next((a for a in args if isinstance(a, Tensor) and a.dtype.is_floating_point), None)
    return [
        row
        for row in op.tables["cpu"]
        if (first is None or first.dtype in row.dtypes)
        and (variant is None or variant in row.variants)
        and (row.when is None or row.when(*args))
    ]


@pytest.mark.parametrize(("info", "dtype", "case"), CASES)
def test_native_is_within_the_bound_on_every_isa_and_thread_count(
    info: OpInfo, dtype: torch.dtype, case: Case
) -> None:
    op = OPS[info.name]
    args = case_arguments(info, case)
    rows = _cpu_rows(op, args)
    assert rows, "no native CPU row serves this case"
    judge = case_judge(op, info, case)
    for isa in _C.isas():
        _C.set_isa(isa)
        for row in rows:
            torch.set_num_threads(1)
            alone = results(op, row.fn, args)
            judge.check(alone, f"{row.name} {isa}")
            torch.set_num_threads(2)
            for a, b in zip(alone, results(op, row.fn, args), strict=True):
                assert torch.equal(_bits(a), _bits(b)), f"{isa}: the thread count changes bits"


@pytest.mark.parametrize(("info", "dtype", "case"), CASES)
def test_reference_is_within_the_bound(info: OpInfo, dtype: torch.dtype, case: Case) -> None:
    op = OPS[info.name]
    got = results(op, op.ref, case_arguments(info, case))
    case_judge(op, info, case).check(got, "reference")


def _gradients(fn: Any, args: tuple[Any, ...], at: Any, upcast: bool) -> list[Tensor]:
    leaves = list(copies(args))
    for i in at:
        leaves[i] = (leaves[i].double() if upcast else leaves[i]).detach().requires_grad_()
    results = [r for r in outputs(fn(*leaves)) if r.dtype.is_floating_point]
    weights = [
        torch.randn(r.shape, generator=generator(i), dtype=torch.float64)
        for i, r in enumerate(results)
    ]
    # The same rounded weights in every precision: their rounding is not part of the op's error.
    loss = sum(
        (r * w.to(args[at[0]].dtype).to(r.dtype)).sum()
        for r, w in zip(results, weights, strict=True)
    )
    return list(torch.autograd.grad(loss, [leaves[i] for i in at]))


@pytest.mark.parametrize(
    ("info", "dtype", "case"),
    [c for c in CASES if c.values[0].grad_args and c.values[2].gradients],
)
def test_gradients_are_within_the_bound(info: OpInfo, dtype: torch.dtype, case: Case) -> None:
    op = OPS[info.name]
    args = case_arguments(info, case)
    at = tuple(i for i in info.grad_args if args[i] is not None)

    def draw(number: int) -> tuple[list[Tensor], list[Tensor]]:
        args = case_arguments(info, case, number)
        peer = _gradients(info.peer or op.ref, args, at, upcast=False)
        return _gradients(info.exact, args, at, upcast=True), peer

    got = _gradients(op, args, at, upcast=False)
    Judge(draw).check(got, f"gradients of arguments {at}")
    for i, gradient in zip(at, got, strict=True):
        assert gradient.dtype == args[i].dtype


def test_the_full_run_holds_two_thousand_tests_of_attention() -> None:
    family = {"attention", "attention_backward", "paged_attention", "mla_attention"}
    family |= {"append_kv", "rope_append_kv", "append_mla"}
    cases = [case for case in CASES if case.values[0].name in family]
    assert 2 * len(cases) >= 2000  # each is one of the kernels and one of the reference
    assert {case.values[0].name for case in cases} == family


def test_judge_allows_twice_the_largest_peer_error_of_all_draws_and_no_more() -> None:
    exact, peer_errors = torch.ones(4, dtype=torch.float64), [0.0, 1e-3, *[0.0] * 6]
    judge = Judge(lambda i: ((exact,), (exact + peer_errors[i],)))
    judge.check((exact.float() + 1.9e-3,), "inside")
    with pytest.raises(AssertionError, match="above the bound"):
        judge.check((exact.float() + 2.1e-3,), "outside")
    with pytest.raises(AssertionError, match="above the bound"):
        judge.check((exact.float() * float("nan"),), "NaN")
