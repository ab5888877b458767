"""A mixture-of-experts layer in torch.compile, under FakeTensor and with memory that is tight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fastllm.ops import linear, moe, moe_gate
from fastllm.testing.moe_problem import MoeProblem
from fastllm.testing.opinfo import ulp

DTYPES = (torch.float32, torch.bfloat16)


def leaves(dtype: torch.dtype, biases: str = "both") -> list[Tensor]:
    """x, router, gate_up, down and biases, in which gradients are wanted."""
    problem = MoeProblem(tokens=20, hidden=40, inner=24, experts=8, k=2, dtype=dtype, biases=biases)
    layer = problem.layer()
    router = torch.randn(8, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    given = [layer.x, router, layer.gate_up, layer.down, layer.gate_up_bias, layer.down_bias]
    return [t.requires_grad_() for t in given if t is not None]


def step(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, *biases: Tensor) -> Tensor:
    """A layer with everything that has a gradient, balancing sums too."""
    gate = moe_gate(linear(x, router, None, torch.float32), 2, renormalize=True)
    up_bias, down_bias = biases or (None, None)
    y = moe(
        x, gate_up, down, gate.topk_ids, gate.topk_weights,
        gate_up_bias=up_bias, down_bias=down_bias, base=x,
    )  # fmt: skip
    share = gate.counts.float() * gate.score_sum
    return y.float().square().sum() + 0.01 * share.sum() + 0.001 * gate.z_sum


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
@pytest.mark.parametrize("biases", ["", "both"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_compiled_step_gives_the_eager_bits(
    dtype: torch.dtype, biases: str, backend: str
) -> None:
    args = leaves(dtype, biases)
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    eager = torch.autograd.grad(step(*args), args)
    found = torch.autograd.grad(compiled(*args), args)
    if backend == "inductor":  # adds up the three gradients of x without rounding between them
        largest = eager[0].abs().max().item()
        assert (eager[0] - found[0]).abs().max().item() <= 2 * ulp(dtype, largest)
        eager, found = eager[1:], found[1:]
    for a, b in zip(eager, found, strict=True):
        assert torch.equal(a, b)


def test_a_compiled_step_takes_any_number_of_tokens_without_compiling_again() -> None:
    args = leaves(torch.float32)
    torch.compiler.reset()
    count = 0

    def counting(graph: Any, inputs: Any) -> Any:
        nonlocal count
        count += 1
        return graph

    compiled = torch.compile(step, fullgraph=True, backend=counting, dynamic=True)
    with torch.no_grad():
        for tokens in (20, 7, 13):
            part = [args[0][:tokens].clone(), *args[1:]]
            assert torch.equal(compiled(*part), step(*part))
    assert count == 1


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_a_trace_of_a_step_reads_no_values(mode: str) -> None:
    args = leaves(torch.bfloat16)

    def whole(*args: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(step(*args), args)

    graph = make_fx(whole, tracing_mode=mode)(*args).graph
    called = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    for name in ("moe_gate", "moe_gate_backward", "moe_dispatch", "moe", "moe_backward"):
        assert f"fastllm.{name}.default" in called
    depend_on_data = {"item", "_local_scalar_dense", "nonzero", "unique", "masked_select", "tolist"}
    assert not {part for name in called for part in name.split(".")} & depend_on_data


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_checkpointing_gives_the_same_gradients(dtype: torch.dtype) -> None:
    from torch.utils.checkpoint import checkpoint

    args = leaves(dtype)
    want = torch.autograd.grad(step(*args), args)
    got = torch.autograd.grad(checkpoint(step, *args, use_reentrant=False), args)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
