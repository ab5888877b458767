"""Tiny models of every family: patched equals unpatched, forward, backward, decoding, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import FAMILIES, inputs, tiny
from torch import Tensor

from fastllm.integrations.transformers import (
    attention,
    linear,
    mlp,
    patch,
    patched,
    unpatch,
    verify,
)

EVERYTHING = {  # family -> what its report must show as replaced everywhere
    "llama": {"attention", "norm", "rope", "mlp", "linear", "loss"},
    "qwen3": {"attention", "norm", "rope", "mlp", "linear", "loss"},
    "mixtral": {"attention", "norm", "rope", "experts", "linear", "loss"},
}
TIGHT = 1e-4  # of the largest value, in float32


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def kernels_at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our kernels also serve what is so small that torch would be faster, at every level."""
    torch.set_num_threads(1)
    monkeypatch.setattr(mlp, "_FROM", dict.fromkeys(mlp._FROM, (0, 0)))
    monkeypatch.setattr(linear, "_FROM", 0)
    monkeypatch.setattr(linear, "reads_in_place", lambda weight: True)
    monkeypatch.setattr(attention, "_faster_there", lambda *arguments: False)


def close(got: Tensor, want: Tensor, what: str) -> None:
    scale = want.abs().max().item()
    assert (got - want).abs().max().item() <= TIGHT * scale, what


def step(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradient of every parameter that has one.

    No token is predicted from padding: eager attention gives a row without keys their mean, others
    zeros.
    """
    mask = batch["attention_mask"]
    labels = batch["labels"].masked_fill(torch.roll(mask, 1, 1) == 0, -100)
    batch = {**batch, "labels": labels}
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()
                           if p.grad is not None}  # fmt: skip


@pytest.mark.parametrize("padding", ["left", "right"])
def test_logits_of_padded_batches_are_equal(family: str, padding: str) -> None:
    model, batch = tiny(family), inputs(padding=padding)
    del batch["labels"]
    valid = batch["attention_mask"].bool()
    with torch.no_grad():
        want = model(**batch).logits[valid]
        with patched(model):
            got = model(**batch).logits[valid]
    close(got, want, padding)


def test_loss_and_every_gradient_of_a_training_step_are_equal(family: str) -> None:
    model, batch = tiny(family).train(), inputs()
    loss, gradients = step(model, batch)
    with patched(model):
        our_loss, ours = step(model, batch)
    close(our_loss, loss, "loss")
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        close(ours[name], gradient, name)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_tokens_are_equal(family: str, cache: str) -> None:
    model, batch = tiny(family), inputs()
    del batch["labels"]
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    options["cache_implementation"] = cache
    if cache == "static":
        options["disable_compile"] = True
    want = model.generate(**batch, **options)
    with patched(model):
        assert torch.equal(model.generate(**batch, **options), want)


def test_bfloat16_is_within_the_bound(family: str) -> None:
    found = verify(tiny(family, torch.bfloat16), inputs(), tokens=8, speed=False, shape=(2, 24))
    assert found.ok, f"{found.report}\n{found}"


def test_taking_the_patch_back_gives_identical_bits(family: str) -> None:
    model, batch = tiny(family), inputs()
    loss, gradients = step(model, batch)
    keys = list(model.state_dict())
    report = patch(model)
    assert list(model.state_dict()) == keys
    assert any(row.replaced for row in report.rows)
    step(model, batch)
    unpatch(model)
    again, same = step(model, batch)
    assert torch.equal(again, loss)
    assert all(torch.equal(same[name], gradient) for name, gradient in gradients.items())


def test_files_of_a_patched_model_are_those_of_the_model(family: str, tmp_path: Path) -> None:
    model, batch = tiny(family), inputs()
    patch(model)
    model.save_pretrained(tmp_path)
    unpatch(model)
    with torch.no_grad():
        want = model(**batch)
    chosen = model.config._attn_implementation
    again = type(model).from_pretrained(tmp_path, attn_implementation=chosen)
    assert type(again) is type(model)
    assert list(again.state_dict()) == list(model.state_dict())
    assert "fastllm" not in (tmp_path / "config.json").read_text()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, want.logits)


@pytest.mark.parametrize("name", sorted(EVERYTHING))
def test_the_report_shows_every_part_replaced(name: str) -> None:
    model = tiny(name)
    report = patch(model)
    assert {part for part in report.counts() if report.replaced(part)} == EVERYTHING[name]
    assert set(report.counts()) == EVERYTHING[name], str(report)


def test_every_family_has_its_attention_and_norms_replaced(family: str) -> None:
    report = patch(tiny(family))
    assert report.replaced("attention") and report.replaced("norm"), str(report)
    for row in report.rows:
        assert row.replaced or row.reason, row


def test_families_are_those_that_transformers_has() -> None:
    assert len(FAMILIES) >= 13
    for stem, _ in FAMILIES.values():
        assert hasattr(transformers, f"{stem}ForCausalLM")
