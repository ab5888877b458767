"""Scores of text: every token once, the context that was asked for, numbers that torch confirms."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastllm import LLM
from fastllm.engine.perplexity import Score, score, text_ids, windows
from fastllm.errors import NumericalError
from fastllm.models.tokenizer import Tokenizer


@pytest.mark.parametrize("length", [1, 3, 8, 50])
def test_windows_predict_every_token_once_with_the_promised_context(length: int) -> None:
    for count in (1, 2, 7, 8, 9, 31):
        for stride in {1, min(2, length), length}:
            predicted = []
            for first, end, scored in windows(count, length, stride):
                assert 0 <= first < end <= count and end - first <= length
                predicted += range(end - scored, end)
                if first:  # a full window: none of its predictions sees less
                    assert end - scored - first >= length - stride
            assert predicted == list(range(count))


@pytest.mark.parametrize("stride", [16, 5])
def test_nll_is_that_of_the_models_logits(random_model: Callable[[str], Path], stride: int) -> None:
    llm = LLM(random_model("f32"), enforce_eager=True, max_model_len=64)
    g = torch.Generator().manual_seed(3)
    documents = [torch.randint(0, 400, (n,), generator=g).tolist() for n in (40, 2, 17)]
    seen: list[int] = []
    found = score(llm.model, documents, 100, length=16, stride=stride, progress=seen.append)
    expected = []
    for ids in documents:
        for first, end, scored in windows(len(ids) - 1, 16, stride):
            logits = llm.logits(ids[first:end])[-scored:]
            targets = torch.tensor(ids[end - scored + 1 : end + 1])
            expected.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    torch.testing.assert_close(found.nll, torch.cat(expected), rtol=1e-4, atol=1e-4)
    assert found.tokens == seen[-1] == 39 + 1 + 16
    mean = float(torch.cat(expected).mean())
    assert found.perplexity == pytest.approx(math.exp(mean), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(mean * 56 / math.log(2) / 100, rel=1e-4)


def test_scores_of_the_same_tokens_are_compared_pair_by_pair() -> None:
    a, b = Score(torch.tensor([1.0, 2.0, 4.0]), 3), Score(torch.tensor([0.5, 1.0, 3.0]), 3)
    excess, error = a.excess(b)
    assert excess == pytest.approx(2.5 / 3)
    assert error == pytest.approx(torch.tensor([0.5, 1.0, 1.0]).std().item() / math.sqrt(3))
    with pytest.raises(ValueError, match="3 and 2 tokens are not paired"):
        a.excess(Score(torch.ones(2), 3))
    assert Score(torch.full((2,), 1e4), 1).perplexity == math.inf


def test_text_is_cut_at_the_limit_and_counted_in_bytes(chain_model: Path) -> None:
    tokenizer = Tokenizer.from_hf(chain_model)
    documents, nbytes = text_ids(["héllo", "  \n", "abc"], tokenizer)
    assert [len(ids) for ids in documents] == [6, 3] and nbytes == 5 + 2
    documents, nbytes = text_ids(["héllo", "abc"], tokenizer, limit=6)
    assert [len(ids) for ids in documents] == [6, 2] and nbytes == 6
    for texts in ([], [" "], ["a"]):
        with pytest.raises(ValueError, match="nothing to predict"):
            text_ids(texts, tokenizer)
    with pytest.raises(ValueError, match="limit must be positive"):
        text_ids(["abc"], tokenizer, limit=0)


def test_what_cannot_be_scored_is_refused(random_model: Callable[[str], Path]) -> None:
    llm = LLM(random_model("f32"), enforce_eager=True, max_model_len=32)
    for length, stride, message in (
        (33, None, "length must be from 1 to 32, got 33"),
        (0, None, "length must be from 1"),
        (8, 9, "stride must be from 1 to the length 8, got 9"),
    ):
        with pytest.raises(ValueError, match=message):
            score(llm.model, [[1, 2, 3]], 3, length=length, stride=stride)
    with torch.no_grad():
        llm.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NumericalError, match="2 of 2 log-probabilities are NaN"):
        score(llm.model, [[1, 2, 3]], 3, length=8)
