"""A tiny model learns one batch by heart, whatever computes it."""

from __future__ import annotations

import pytest
import torch

from fastllm import _C
from fastllm.models.trainable import initialize
from fastllm.ops.registry import OPS
from fastllm.testing.small_models import batch_of, config_of, random_documents
from fastllm.train.optim import OptimConfig, make_optimizer

DTYPES = [torch.float32, torch.bfloat16]


def loss_after_training(dtype: torch.dtype, device: str = "cpu", optimizer: str = "adamw") -> float:
    model = initialize(config_of("qwen3 tied"), dtype=dtype, device=device)
    documents, targets = batch_of(random_documents((20, 30)))
    documents, targets = documents.to(device), targets.to(device)
    config = OptimConfig(name=optimizer, lr=1e-2, weight_decay=0.0)  # type: ignore[arg-type]
    steps = make_optimizer(model, config)
    for _ in range(60):
        loss = model.loss(documents, targets, "mean")
        loss.backward()
        steps.step()
        steps.zero_grad()
        model.weights_changed()
    return loss.item()


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_learns_one_batch(dtype: torch.dtype, isa: str) -> None:
    _C.set_isa(isa)
    assert loss_after_training(dtype) < 0.05


@pytest.mark.parametrize("dtype", DTYPES)
def test_muon_learns_one_batch(dtype: torch.dtype) -> None:
    assert loss_after_training(dtype, optimizer="muon") < 0.05


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_definitions_learn_one_batch(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for op in OPS.values():
        monkeypatch.setitem(op.tables, "cpu", [])
        monkeypatch.setattr(op, "_rows", {})
    assert loss_after_training(dtype) < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_learns_one_batch(dtype: torch.dtype) -> None:
    assert loss_after_training(dtype, "cuda") < 0.05
