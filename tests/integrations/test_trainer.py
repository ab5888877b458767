"""transformers' Trainer on patched models: the same losses, the same weights, saved and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCAB, tiny
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import fastllm

# accelerate uses names that transformers has renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
]


def rows(count: int = 64, length: int = 24) -> list[dict[str, Any]]:
    """Sequences that count up from somewhere, of two lengths: something to learn, and padding."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(3, VOCAB - length, (count,), generator=generator).tolist()
    made = []
    for i, start in enumerate(starts):
        kept = length - 7 * (i % 2)
        ids = list(range(start, start + kept)) + [0] * (length - kept)
        mask = [1] * kept + [0] * (length - kept)
        labels = [t if m else -100 for t, m in zip(ids, mask, strict=True)]
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def trainer(model: nn.Module, out: Path, steps: int, **options: Any) -> Trainer:
    settings = {
        "per_device_train_batch_size": 4, "learning_rate": 3e-3, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "seed": 3, **options,
    }  # fmt: skip
    args = TrainingArguments(str(out), max_steps=steps, **settings)
    return Trainer(model, args, train_dataset=rows())


def losses(made: Trainer) -> torch.Tensor:
    made.train()
    return torch.tensor([e["loss"] for e in made.state.log_history if "loss" in e])


def patched(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = tiny(family, dtype)
    report = fastllm.patch(model)
    for part in ("attention", "norm", "rope", "loss"):
        assert report.replaced(part), report
    assert report.replaced("mlp") or report.replaced("experts"), report
    return model


def last(values: torch.Tensor, count: int = 5) -> float:
    return float(values[-count:].mean())


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
def test_twenty_steps_have_the_losses_of_the_unpatched(family: str, tmp_path: Path) -> None:
    plain = losses(trainer(tiny(family), tmp_path, 20))
    found = losses(trainer(patched(family), tmp_path, 20))
    torch.testing.assert_close(found, plain, rtol=2e-3, atol=1e-4)
    assert last(plain) < 0.8 * float(plain[0])


def test_bfloat16_steps_end_within_a_hundredth(tmp_path: Path) -> None:
    plain = losses(trainer(tiny("llama", torch.bfloat16), tmp_path, 20))
    found = losses(trainer(patched("llama", torch.bfloat16), tmp_path, 20))
    assert last(found) == pytest.approx(last(plain), rel=1e-2)


@pytest.mark.full
@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_hundred_steps_end_within_a_hundredth(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    # Between steps 150 and 200 the loss is far below its start and still falling.
    plain = losses(trainer(tiny(family, dtype), tmp_path, 200, learning_rate=1e-3))
    found = losses(trainer(patched(family, dtype), tmp_path, 200, learning_rate=1e-3))
    assert last(found, 20) == pytest.approx(last(plain, 20), rel=1e-2)
    assert last(plain, 20) < 0.5 * float(plain[0])


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5},
        {"bf16": True},
        {"label_smoothing_factor": 0.1},
    ],
)
def test_options_of_the_trainer_give_the_losses_of_the_unpatched(
    options: dict[str, Any], tmp_path: Path
) -> None:
    plain = losses(trainer(tiny("llama"), tmp_path, 4, **options))
    found = losses(trainer(patched("llama"), tmp_path, 4, **options))
    tolerance = 2e-2 if "bf16" in options else 1e-3
    torch.testing.assert_close(found, plain, rtol=tolerance, atol=1e-3)


def test_evaluation_and_predictions_are_those_of_the_unpatched(tmp_path: Path) -> None:
    results = []
    for model in (tiny("llama"), patched("llama")):
        made = trainer(model, tmp_path, 1)
        found = made.predict(rows(6))
        results.append((torch.tensor(found.predictions), found.metrics["test_loss"]))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-4)
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-5)


def test_a_run_goes_on_from_its_checkpoint_patched_or_not(tmp_path: Path) -> None:
    whole = losses(trainer(patched("llama"), tmp_path / "whole", 6))
    options = {"save_strategy": "steps", "save_steps": 3}
    first = trainer(patched("llama"), tmp_path / "part", 6, **options)
    first.train()
    checkpoint = tmp_path / "part" / "checkpoint-3"
    plain = AutoModelForCausalLM.from_pretrained(checkpoint)  # files of an unpatched model
    assert type(plain).__name__ == "LlamaForCausalLM"
    for model in (patched("llama"), tiny("llama")):
        again = trainer(model, tmp_path / "again", 6)
        again.train(resume_from_checkpoint=str(checkpoint))
        found = torch.tensor([e["loss"] for e in again.state.log_history if "loss" in e])
        torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-4)
