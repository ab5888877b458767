"""The router on a GPU: Triton's rows and, where built, the CUDA C++ rows, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastllm.ops.moe_gate import _moe_gate
from fastllm.ops.moe_route import _moe_route
from fastllm.ops.registry import Op
from fastllm.testing.check import case_arguments, case_judge
from fastllm.testing.opinfo import all_infos, outputs

pytestmark = pytest.mark.gpu

INFOS = all_infos()


def _cases() -> list[Any]:
    found = []
    for op in (_moe_gate, _moe_route):
        cases = [c for c in INFOS[op.name].cases(torch.float32) if not c.full]
        for case in cases[::3]:
            for row in ("triton", "cuda"):
                found.append(pytest.param(op, case, row, id=f"{op.name}-{row}-{case.label}"))
    return found


def _row(op: Op, name: str, args: tuple[Any, ...]) -> Any:
    for row in op.tables["cuda"]:
        if row.name == name and (row.when is None or row.when(*args)):
            return row.fn
    pytest.skip("the extension was built without CUDA kernels, or the row refuses")


@pytest.mark.parametrize(("op", "case", "name"), _cases())
def test_the_router_is_right_on_the_gpu(op: Op, case: Any, name: str) -> None:
    info = INFOS[op.name]
    args = [a.cuda() if isinstance(a, torch.Tensor) else a for a in case_arguments(info, case)]
    fn = _row(op, name, tuple(args))
    first, again = outputs(fn(*args)), outputs(fn(*args))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b), "two runs differ"
    case_judge(op, info, case).check([t.cpu() for t in first], name)


@pytest.mark.parametrize("tokens", [1, 64, 1000, 4096])
def test_one_launch_replays_in_a_graph(tokens: int) -> None:
    logits = torch.randn(tokens, 128, device="cuda")
    args = (logits, None, 8, "softmax", 1, 1, "max", True, 1.0, 0, 128)
    fn = _row(_moe_route, "cuda", args)
    fn(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fn(*args)
    logits.copy_(torch.randn(tokens, 128, device="cuda"))
    graph.replay()
    for a, b in zip(out, fn(*args), strict=True):
        assert torch.equal(a, b)
