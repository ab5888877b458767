"""The self-test of `fastllm doctor`: every op's first cases against float64, on this machine."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

import torch

from ..ops.registry import OPS
from .check import case_arguments, case_judge, results
from .opinfo import OpInfo, all_infos


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How one op fared: `problem` is empty when every case was within the bound."""

    op: str
    backends: tuple[str, ...]  # those that served a case, in the order of first use
    cases: int
    seconds: float
    problem: str


def self_test(cases_per_dtype: int = 3) -> list[Outcome]:
    """Run the first cases of every op at the active instruction-set level."""
    infos = all_infos()
    found = []
    for name in OPS:
        if name in infos:
            found.append(_outcome(infos[name], cases_per_dtype))
        else:
            found.append(Outcome(op=name, backends=(), cases=0, seconds=0.0, problem="no cases"))
    return found


def _outcome(info: OpInfo, cases_per_dtype: int) -> Outcome:
    op = OPS[info.name]
    backends: dict[str, None] = {}
    count, problem, start = 0, "", time.perf_counter()
    for dtype in info.dtypes:
        short = (case for case in info.cases(dtype) if not case.full)
        for case in itertools.islice(short, cases_per_dtype):
            args = case_arguments(info, case)
            row = op.select(args)
            backends[next((r.name for r in op.tables["cpu"] if r.fn is row), "reference")] = None
            label = f"{case.label} {str(dtype).removeprefix('torch.')}"
            count += 1
            try:
                with torch.no_grad():
                    case_judge(op, info, case).check(results(op, op, args), label)
            except AssertionError as error:
                problem = problem or str(error)
    seconds = time.perf_counter() - start
    return Outcome(
        op=info.name, backends=tuple(backends), cases=count, seconds=seconds, problem=problem
    )
