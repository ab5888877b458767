"""The router and its gradient under the interpreter: cases of their OpInfos, against float64.

Runs as interpreter_cases.py does.
"""

from __future__ import annotations

import importlib
import math

import torch
from interpreter_cases import Case, excess, main, same

from fastllm.testing import opinfo
from fastllm.testing.check import case_arguments
from fastllm.testing.infos import moe_gate, moe_gate_backward

INFOS = {info.name: info for info in (*moe_gate.INFOS, *moe_gate_backward.INFOS)}
TOKENS = 600  # at most: rows are interpreted one after the other


def info_case(name: str, case: opinfo.Case) -> float:
    """The kernel against float64: ids and counts equal, floats within the bound."""
    kernel = getattr(importlib.import_module(f"fastllm.kernels.{name}"), name)
    info = INFOS[name]
    args = case_arguments(info, case)
    errors = []
    for got, want in zip(
        opinfo.outputs(kernel(*args)), opinfo.outputs(info.exact(*args)), strict=True
    ):
        if got.dtype.is_floating_point:
            errors.append(excess(got, want, torch.float32))
        else:
            errors.append(same(got, want.to(got.dtype)))
    return max(errors)


def bad_bias() -> float:
    """NaN and +inf in the bias leave no choice in any row; -inf bars its expert."""
    from fastllm.kernels.moe_gate import moe_gate as gate

    logits = torch.randn(20, 12, generator=opinfo.generator())
    options = (3, "sigmoid", 1, 1, "max", True, 1.0)
    for value in (math.nan, math.inf):
        bias = torch.zeros(12)
        bias[5] = value
        weights, ids, counts, score_sum, z_sum = gate(logits, bias, *options)
        nothing = weights.any() or counts.any() or score_sum.any() or z_sum
        assert (ids == -1).all() and not nothing, f"{value} in the bias"
    bias[5] = -math.inf
    counts = gate(logits, bias, *options)[2]
    return 0.0 if counts.sum() == 60 and counts[5] == 0 else math.inf


def _named(full: bool) -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for name, info in INFOS.items():
        found = [
            c for c in info.cases(torch.float32) if case_arguments(info, c)[0].shape[0] <= TOKENS
        ]
        quick = [c for c in found if not c.full]
        quick = quick[:3] + quick[3::5]
        for case in found:
            if (case not in quick) == full:
                cases[f"{name} {case.label}"] = lambda n=name, c=case: info_case(n, c)
    return cases


def quick_cases() -> dict[str, Case]:
    """Cases of the normal run."""
    return _named(full=False) | {"moe_gate bad bias": bad_bias}


def full_cases() -> dict[str, Case]:
    """All other cases of the ops."""
    return _named(full=True)


if __name__ == "__main__":
    main(quick_cases, full_cases)
