"""Cases of moe_route: those of moe_gate, for all experts and for a slice of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..opinfo import Args, Case, OpInfo
from .moe_gate import INFOS as GATE_INFOS
from .moe_gate import bench_cases

GATE = GATE_INFOS[0]


def _of_slice(case: Case, which: int) -> Case:
    """A case of moe_gate with all experts served, the middle half, or none."""

    def make(g: torch.Generator) -> Args:
        args = case.make(g)
        n = args[0].shape[1]
        return *args, *((0, n), (n // 4, n // 2), (n, 0))[which]

    name = ("all", "half", "none")[which]
    return Case(label=f"{case.label}-{name}", make=make, full=case.full, gradients=case.gradients)


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    cases = list(GATE.cases(dtype))
    for i, case in enumerate(cases):
        if i % 3 == 0:
            yield _of_slice(case, (0, 1, 0, 1, 2)[i % 5])


def _exact(*args: Any) -> Args:
    *rule, first_expert, n_experts = args
    gate = GATE.exact(*rule)
    ids: np.ndarray = gate[1].numpy().reshape(-1)
    runs = [np.flatnonzero(ids == first_expert + e) for e in range(n_experts)]
    offsets = np.cumsum([0, *(len(run) for run in runs)])
    slots = np.full(ids.shape, -1)
    slots[: offsets[-1]] = np.concatenate([slots[:0], *runs])
    return *gate, torch.from_numpy(offsets), torch.from_numpy(slots)


def _torch_route(logits: Tensor, bias: Tensor | None, k: int, *_: object) -> Args:
    weights, ids = torch.softmax(logits, 1).topk(k, 1)
    slots = ids.flatten().argsort(stable=True)
    offsets = torch.bincount(ids.flatten(), minlength=logits.shape[1]).cumsum(0)
    return ids, weights / weights.sum(1, keepdim=True), offsets, slots


INFOS = [
    OpInfo(
        name="moe_route",
        cases=_cases,
        exact=_exact,
        dtypes=(torch.float32,),
        grad_args=(0,),
        bench_cases=lambda dtype: (_of_slice(case, 0) for case in bench_cases(dtype)),
        bench_peer=(lambda *args: args, _torch_route),
        bytes_moved=lambda logits, bias, k, *_: logits.nbytes + 12 * k * logits.shape[0],
    ),
]
