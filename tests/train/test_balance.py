"""Balance of experts: counts, the losses' gradients, the selection biases."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllm.models.trainable import initialize
from fastllm.nn.batch import Documents
from fastllm.ops.moe_gate import moe_gate
from fastllm.train import presets
from fastllm.train.balance import Balance, BalanceConfig, attach_balance, describe
from fastllm.train.metrics import Metrics, MetricsConfig
from fastllm.train.presets import ShapeConfig
from fastllm.train.report import write_report

EXPERTS, CHOSEN = 8, 2
VOCABULARY = 256


def logits(tokens: int, seed: int = 0) -> Tensor:
    skew = torch.linspace(1.5, -1.5, EXPERTS)
    made = torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(seed)) + skew
    return made.requires_grad_()


def stepped(balance: Balance, parts: list[Tensor], *, again: bool = False) -> list[Tensor]:
    """One step of one layer over micro batches of logits; the gradients that the losses give."""
    gradients = []
    for part in parts:
        balance.begin()
        weights = balance.hooks[0].record(moe_gate(part, CHOSEN, renormalize=True))
        if again:  # what activation checkpointing does
            balance.hooks[0].record(moe_gate(part, CHOSEN, renormalize=True))
        (gradient,) = torch.autograd.grad((0.0 * weights).sum(), part)
        gradients.append(gradient)
    balance.after_step()
    return gradients


def test_numbers_are_those_of_the_formulas() -> None:
    balance, x = Balance([3], EXPERTS, BalanceConfig()), logits(500).detach()
    with torch.no_grad():
        x[:, -1] = -9.0  # an expert that nobody takes
    stepped(balance, [x.requires_grad_()])
    found = balance.numbers(loads=True)
    x = x.detach()
    p = x.double().softmax(-1)
    counts = torch.bincount(x.topk(CHOSEN).indices.flatten(), minlength=EXPERTS).double()
    share = counts / counts.sum()
    assert found["expert_load"] == pytest.approx(float(share.max() * EXPERTS))
    assert found["expert_load_layer"] == 3 and found["experts"]["layer"] == [3]
    assert found["expert_unused"] == pytest.approx(1 / EXPERTS)
    entropy = -(share * share.clamp(min=1e-30).log()).sum() / math.log(EXPERTS)
    assert found["expert_entropy"] == pytest.approx(float(entropy))
    assert found["aux_loss"] == pytest.approx(float(EXPERTS * (share * p.mean(0)).sum()))
    assert found["z_loss"] == pytest.approx(float((x.double().logsumexp(-1) ** 2).mean()))
    assert found["experts"]["loads"][0] == pytest.approx((share * EXPERTS).tolist(), abs=1e-4)
    assert describe(found) == f"experts {found['expert_load']:.2f}x (layer 3)"
    assert balance.numbers() == {}  # the count has begun anew


def test_gradients_are_those_of_the_losses_over_the_tokens_that_are_counted() -> None:
    aux, z = 0.3, 0.05
    balance = Balance([0], EXPERTS, BalanceConfig(aux_loss=aux, z_loss=z))
    first, x = logits(200, 1), logits(300, 2)
    stepped(balance, [first])
    counts = torch.bincount(first.topk(CHOSEN).indices.flatten(), minlength=EXPERTS)
    load = counts * EXPERTS / (200 * CHOSEN)  # of the step before
    torch.testing.assert_close(balance.load[0], load)
    # The losses of the formulas are means over tokens; the loop divides its sums by their number.
    loss = 300 * (aux * (load * x.softmax(-1).mean(0)).sum() + z * (x.logsumexp(-1) ** 2).mean())
    (want,) = torch.autograd.grad(loss, x)
    (got,) = stepped(balance, [x])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert want.abs().max() > 1e-3


def test_even_loads_have_no_gradient_of_the_balancing_loss() -> None:
    balance = Balance([0], EXPERTS, BalanceConfig(aux_loss=1.0))
    (first,) = stepped(balance, [logits(100)])  # loads before the first step count as even
    assert first.abs().max() < 1e-6


def test_how_a_step_is_cut_changes_nothing() -> None:
    config = BalanceConfig(aux_loss=0.3, z_loss=0.05)
    whole, cut = Balance([0], EXPERTS, config), Balance([0], EXPERTS, config)
    for seed in range(2):
        x = logits(400, seed)
        (want,) = stepped(whole, [x])
        parts = [part.detach().requires_grad_() for part in x.split([7, 150, 243])]
        got = torch.cat(stepped(cut, parts, again=True))  # computed twice, counted once
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(whole.load, cut.load, rtol=0, atol=0)
    one, other = whole.numbers(), cut.numbers()
    by_layer = one.pop("experts"), other.pop("experts")
    assert other == pytest.approx(one)
    assert by_layer[0].keys() == by_layer[1].keys()


def test_the_bias_moves_by_the_sign_of_what_is_missing() -> None:
    bias = torch.zeros(EXPERTS)
    balance = Balance([0], EXPERTS, BalanceConfig(bias_update=0.25), biases=[bias])
    ids = [[0, 1]] * 3 + [[0, 2]] * 3 + [[3, 4]] + [[5, 6]]  # 16 slots: 2 each would be even
    x = torch.full((len(ids), EXPERTS), -5.0)
    for row, chosen in enumerate(ids):
        x[row, chosen] = 5.0
    for step in (1, 2):
        stepped(balance, [x.requires_grad_()])
        want = 0.25 * step * torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
        torch.testing.assert_close(bias, want)
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="bias_update must be a number from 0"):
            BalanceConfig(bias_update=value)
    with pytest.raises(ValueError, match="needs a selection bias in every router"):
        Balance([0], EXPERTS, BalanceConfig(bias_update=0.1))


def zipf_model(bias_update: float) -> tuple[Any, Balance]:
    shape = ShapeConfig(
        preset="deepseek", layers=2, width=32, head_dim=16, experts=8, experts_per_token=2,
        expert_inner=16, inner=64,
    )  # fmt: skip
    config = presets.model_config(shape, vocab_size=VOCABULARY, bos=None, eos=(), context=32)
    assert config.experts is not None
    config = replace(config, experts=replace(config.experts, dense_layers=()))
    model = initialize(config, dtype=torch.float32, seed=0)
    balance = attach_balance(model, BalanceConfig(bias_update=bias_update))
    assert balance is not None
    return model, balance


def zipf_loads(bias_update: float, steps: int) -> list[float]:
    """Most over mean of each layer over the last tenth of the steps, on tokens of Zipf's law."""
    model, balance = zipf_model(bias_update)
    law = 1.0 / torch.arange(1, VOCABULARY + 1)
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(steps):
        ids = torch.multinomial(law, 257, replacement=True, generator=draw)
        balance.begin()
        documents = Documents.pack(ids[:-1].view(8, 32).unbind())
        (model.loss(documents, ids[1:].long(), "sum") / 256).backward()
        optimizer.step()
        optimizer.zero_grad()
        balance.after_step()
        if step == steps - max(steps // 10, 1) - 1:
            balance.numbers()
    return list(balance.numbers()["experts"]["load"])


def test_300_steps_on_zipf_like_data_end_in_even_loads_with_the_bias_alone() -> None:
    assert max(zipf_loads(0.01, 300)) < 1.5
    assert max(zipf_loads(0.0, 300)) > 2.0


def test_the_report_shows_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    balance = Balance([1, 2], EXPERTS, BalanceConfig())
    metrics = Metrics(tmp_path, MetricsConfig(progress="plain"), {})
    metrics.open(step=0)
    for step in (1, 2):
        balance.begin()
        for hook in balance.hooks:
            hook.record(moe_gate(logits(50, step), CHOSEN))
        balance.after_step()
        record = {
            "step": step, "loss": 2.0, "lr": 1e-3, "norm": 1.0, "tokens": 50,
            "tokens_per_second": 100.0, "seconds": 1.0, **balance.numbers(loads=step == 2),
        }  # fmt: skip
        metrics.training(record, steps=2, remaining=0)
    metrics.report()
    metrics.close()
    assert "  experts " in capsys.readouterr().err
    page = (tmp_path / "report.html").read_text()
    assert "load of the busiest expert" in page
    assert page.count("<rect") == 2 * EXPERTS and "layer 2, expert 7:" in page
    assert (tmp_path / "loss.png").stat().st_size > 20_000
    write_report(tmp_path, [], {}, print)  # nothing measured: nothing to draw
