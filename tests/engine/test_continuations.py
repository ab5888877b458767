"""Continuations of a context: the bits of the training forward, whatever is shared or beside."""

from __future__ import annotations

import pytest
import torch

from fastllm.engine import continuations
from fastllm.engine.continuations import Continued, continuation_log_probs
from fastllm.errors import NumericalError
from fastllm.models.decoder import Decoder
from fastllm.nn.batch import Documents
from fastllm.testing.small_models import model_of, random_documents


def directly(model: Decoder, group: Continued) -> list[torch.Tensor]:
    """Each ending as a document of its own."""
    found = []
    for ending in group.endings:
        ids = [*group.context, *ending]
        with torch.no_grad():
            log_probs, _ = model.log_probs(Documents.pack([ids[:-1]]), torch.tensor(ids[1:]))
        found.append(log_probs[-len(ending) :])
    return found


def groups_of(lengths: list[tuple[int, list[int]]]) -> list[Continued]:
    return [
        Continued(random_documents([context], seed=i)[0], random_documents(endings, seed=90 + i))
        for i, (context, endings) in enumerate(lengths)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["llama tied, biases", "mistral window", "qwen3 moe"])
def test_log_probs_are_those_of_training_bit_for_bit(case: str, dtype: torch.dtype) -> None:
    model = model_of(case, dtype)
    lengths = [(1, [1, 3]), (64, [2, 2, 5]), (65, [1, 1, 1, 1]), (130, [7, 1]), (5, [70])]
    groups = groups_of(lengths)
    found = continuation_log_probs(model, groups)
    for group, endings in zip(groups, found, strict=True):
        for ours, expected in zip(endings, directly(model, group), strict=True):
            assert torch.equal(ours, expected)


def test_packs_change_nothing_and_progress_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama", torch.float32)
    groups = groups_of([(n, [1, 4]) for n in (3, 70, 20, 66, 9)])
    whole = continuation_log_probs(model, groups)
    monkeypatch.setattr(continuations, "TOKENS_AT_ONCE", 40)
    told: list[int] = []
    packed = continuation_log_probs(model, groups, told.append)
    assert told[-1] == 5 and len(told) > 2
    for a, b in zip(whole, packed, strict=True):
        assert all(map(torch.equal, a, b))


def test_shared_tokens_are_computed_once() -> None:
    letters = Continued(list(range(90)), [[1], [2], [3], [4]])
    assert letters.tokens == 90 and letters.pages == 2
    endings = Continued(list(range(90)), [[1, 2, 3], [4, 5]])
    assert endings.shared == 64 and endings.tokens == 64 + (26 + 2) + (26 + 1)
    assert Continued([1], [[2]]).shared == Continued(list(range(64)), [[2]]).shared == 0


def test_what_cannot_be_scored_is_named() -> None:
    model = model_of("llama", torch.float32)
    with pytest.raises(ValueError, match="group 1: a context and endings of one token"):
        continuation_log_probs(model, [Continued([1], [[2]]), Continued([], [[2]])])
    with pytest.raises(ValueError, match="group 0: context and ending have 257 tokens"):
        continuation_log_probs(model, [Continued([1] * 256, [[2, 3]])])
    assert continuation_log_probs(model, []) == []
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NumericalError, match="2 of 2 log-probabilities are NaN"):
        continuation_log_probs(model, [Continued([1, 2], [[2, 3]])])
