"""Suite dropin: what is measured, against whom, and what is told of the bars."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastllm.bench import bench_dropin, dropin_steps
from fastllm.testing.suite import Row, Settings


def test_full_runs_have_a_row_for_every_bar_and_the_memory_of_every_point() -> None:
    labels = [f"{case.label} {case.dtype}" for case in bench_dropin.cases(Settings())]
    assert len(set(labels)) == len(labels)
    speeds = [label for label in labels if ", memory" not in label]
    assert len(labels) == 2 * len(speeds)
    measured = {point[:2] for point in bench_dropin.points(Settings())}
    assert set(bench_dropin.BARS) <= measured


@pytest.mark.parametrize("quick", [True, False])
def test_every_point_has_the_peers_of_its_bar(quick: bool) -> None:
    settings = Settings(quick=quick)
    for point in bench_dropin.points(settings):
        names = bench_dropin.sides(settings, point)
        assert next(iter(names)) == "fastllm" and "eager" in names
        assert set(bench_dropin.BARS.get(point[:2], {})) <= set(names)


def test_ratios_are_told_beside_their_bars() -> None:
    def row(case: str, **ratio: float) -> Row:
        return Row(suite="dropin", case=case, device="d", dtype="bf16", unit="tok/s", value=1.0,
                   ratio={name.replace("_", " "): x for name, x in ratio.items()})  # fmt: skip

    rows = [
        row("135M, prefill 512 tokens", eager=1.5, compiled=1.1),
        row("MoE E=64 K=8, forward+backward, 2 x 512 tokens", eager=1.1, experts_eager=3.0),
    ]
    assert bench_dropin.summary(rows) == [
        "135M, prefill 512 tokens: 1.50x eager (bar 1.3x)",
        "MoE E=64 K=8, forward+backward, 2 x 512 tokens: 3.00x experts eager (bar 2.0x)",
        "MoE E=64 K=8, forward+backward, 2 x 512 tokens: 1.10x eager (bar 1.2x, missed)",
    ]


SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 1024,
}  # fmt: skip


@pytest.mark.parametrize("work", [dropin_steps.PREFILL, dropin_steps.STEP, dropin_steps.GENERATE])
def test_every_side_of_a_mixture_is_the_same_model(
    work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {**SMALL, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    monkeypatch.setitem(dropin_steps.MIXTURES, "small", ("qwen3_moe", fields))
    monkeypatch.setattr(dropin_steps, "LENGTH", 32)
    monkeypatch.setattr(dropin_steps, "TOKENS", 4)
    sides = (dropin_steps.OURS, dropin_steps.EAGER, dropin_steps.LOOP)
    first, *others = [
        dropin_steps.make_call(side, "small", work, torch.float32, "cpu")() for side in sides
    ]
    for other in others:
        torch.testing.assert_close(other, first, atol=1e-4, rtol=1e-4)
