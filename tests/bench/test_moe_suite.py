"""Suite moe: peers compute what we compute, and what is told of the rows follows from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastllm.bench import bench_moe, moe_layers
from fastllm.testing.suite import Row

SMALL = moe_layers.Shape("small", 40, 64, 32, 6, 2)


@pytest.mark.parametrize("load", ["uniform", "zipf"])
def test_peers_give_our_outputs_and_gradients(load: str) -> None:
    inputs = moe_layers.draw(replace(SMALL, load=load), "cpu")
    functions = (moe_layers.ours, moe_layers.composed, moe_layers.expert_loop)
    outs = [moe_layers.forward(f, *inputs.leaves, inputs.ids)() for f in functions]
    steps = [moe_layers.step(f, inputs.leaves, inputs.ids)() for f in functions]
    for got in zip(
        *[(y, *gradients) for y, gradients in zip(outs, steps, strict=True)], strict=True
    ):
        scale = got[0].abs().max().item()
        for other in got[1:]:
            torch.testing.assert_close(other, got[0], atol=0.02 * scale, rtol=0.02)


def test_a_dense_layer_of_equal_active_size_has_the_same_operations() -> None:
    x, gate_up, down = moe_layers.dense_inputs(SMALL, "cpu")
    assert 2 * len(x) * (gate_up.numel() + down.numel()) == SMALL.flops


def row(label: str, value: float, **peers: float) -> Row:
    return Row(suite="moe", case=label, device="d", dtype="t", unit="ms", value=value, peers=peers)


def test_our_time_is_told_as_a_multiple_of_the_dense_layer_s() -> None:
    rows = [row("a", 3.0, dense=2.0, grouped_mm=9.0), row("b", 1.0), row("c", 2.2, balanced=2.0)]
    assert bench_moe.summary(rows) == ["a: 1.50 x dense", "c: 1.10 x balanced"]


def test_the_cost_by_experts_is_drawn_where_it_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "new" / "experts.png"
    assert not bench_moe.plot([row("forward fine E=8 K=8", 1.0)], path) and not path.exists()
    shape = replace(bench_moe.FINE, name="count")
    rows = [
        row(f"forward+backward {replace(shape, experts=n).label}", 1.0, grouped_mm=2.0, dense=1.0)
        for n in (8, 64)
    ]
    assert bench_moe.plot(rows, path)
    assert path.read_bytes().startswith(b"\x89PNG")
