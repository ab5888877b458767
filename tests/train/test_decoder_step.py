"""A training step of the whole decoder: whose code runs in it, and the curve of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastllm.models.config import ModelConfig
from fastllm.models.decoder import Decoder
from fastllm.models.trainable import initialize
from fastllm.nn.batch import Documents
from fastllm.nn.lora import LoraConfig, add_lora
from fastllm.ops.registry import OPS
from fastllm.testing.small_models import batch_of, model_of, random_documents
from fastllm.train.memory import keep_freed_memory
from fastllm.train.optim import AdamW

FOREIGN = ("mm", "bmm", "addmm", "linear", "matmul", "attention", "softmax", "cross_entropy",
           "nll_loss", "embedding", "index_select", "silu", "rms_norm", "einsum")  # fmt: skip


class _Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["llama", "qwen3 tied", "deepseek v3"])
def test_no_step_is_served_by_torch_or_a_reference(
    case: str, dtype: torch.dtype, adapters: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (documents, targets) = model_of(case, dtype), batch_of(random_documents((20, 9)))
    if adapters:
        add_lora(model, LoraConfig(r=4, target_modules=("o_proj", "up_proj")))
    called: list[str] = []
    for op in OPS.values():

        def reference(*args: Any, name: str = op.name, ref: Any = op.ref) -> Any:
            called.append(name)
            return ref(*args)

        monkeypatch.setattr(op, "ref", reference)
    model.loss(documents, targets).backward()  # as it trains: without a mode
    with _Names() as seen:
        loss = model.loss(documents, targets)
    loss.backward()
    assert called == []
    assert {"fastllm::linear", "fastllm::attention", "fastllm::linear_cross_entropy"} <= {
        *seen.names
    }
    foreign = [
        name
        for name in seen.names
        if name.startswith("aten::") and any(word in name.split("::")[1] for word in FOREIGN)
    ]
    assert foreign == []


def _twins(tied: bool) -> tuple[Decoder, Any]:
    transformers = pytest.importorskip("transformers")
    config = ModelConfig(
        model_type="llama", vocab_size=64, hidden_size=48, intermediate_size=96,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        rms_norm_eps=1e-5, max_position_embeddings=128, tie_word_embeddings=tied,
    )  # fmt: skip
    model = initialize(config, dtype=torch.float32)
    fields = dict(config.to_hf())
    kind = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    other = transformers.AutoModelForCausalLM.from_config(
        kind, dtype=torch.float32, attn_implementation="sdpa"
    )
    other.load_state_dict(dict(model.state_dict()))
    return model, other.train()


def _rows(step: int) -> Tensor:
    """Four rows of 24 tokens, each counting on from a random token by a step of 1, 5 or 11."""
    g = torch.Generator().manual_seed(step)
    first = torch.randint(0, 64, (4, 1), generator=g)
    stride = torch.tensor((1, 5, 11))[torch.randint(0, 3, (4, 1), generator=g)]
    return (first + stride * torch.arange(24)) % 64


def _compare(steps: int, tied: bool) -> list[float]:
    model, other = _twins(tied)
    ours = AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    theirs = torch.optim.AdamW(other.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    losses = []
    for step in range(steps):
        rows = _rows(step)
        targets = torch.nn.functional.pad(rows[:, 1:], (0, 1), value=-100).flatten()
        loss = model.loss(Documents.pack(list(rows)), targets, "mean")
        expected = other(input_ids=rows, labels=rows, use_cache=False).loss
        for value, optimizer in ((loss, ours), (expected, theirs)):
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert loss.item() == pytest.approx(expected.item(), rel=0.01), step
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("tied", [False, True])
def test_thirty_steps_have_the_losses_of_transformers(tied: bool) -> None:
    losses = _compare(30, tied)
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.full
@pytest.mark.parametrize("tied", [False, True])
def test_three_hundred_steps_have_the_losses_of_transformers(tied: bool) -> None:
    losses = _compare(300, tied)
    assert losses[-1] < 0.5 * losses[0]


def test_freed_memory_is_kept_where_the_c_library_can() -> None:
    assert isinstance(keep_freed_memory(), bool)
    model, batch = model_of("llama", torch.float32), batch_of(random_documents((20,)))
    model.loss(*batch).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
