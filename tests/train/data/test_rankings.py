"""Rankings: every form is read, what is missing or wrong is named, pairs are those of the ranks."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from fastllm.errors import DataError
from fastllm.models.tokenizer import Tokenizer
from fastllm.models.tokenizer_training import train_tokenizer
from fastllm.train.data.examples import ExampleBatches
from fastllm.train.data.masks import ConversationEncoder
from fastllm.train.data.rankings import (
    encode_rankings,
    fingerprint,
    parse_ranking,
    ranked_pairs,
    ranking_batches,
    ranking_micro,
    read_rankings,
)

FOUR = {"prompt": "Q", "answers": ["a", "b", "c", "d"], "ranks": [2, 1, 4, 3]}
USER = {"role": "user", "content": "Q"}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["some words to learn"] * 4, 300, allow_smaller=True)


def test_pairs_are_all_two_answers_of_different_rank() -> None:
    assert ranked_pairs([2, 1, 4, 3]) == [(1, 0), (0, 2), (0, 3), (1, 2), (1, 3), (3, 2)]
    assert ranked_pairs([1, 1, 2]) == [(0, 2), (1, 2)]
    assert ranked_pairs([5, 5]) == []
    for ranks in product((1, 2, 3), repeat=4):
        pairs = ranked_pairs(ranks)
        assert all(ranks[i] < ranks[j] for i, j in pairs)
        assert len(set(pairs)) == sum(a < b for a in ranks for b in ranks)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Q", "chosen": "yes", "rejected": "no"},
        {"prompt": [USER], "chosen": [said("yes")], "rejected": [said("no")]},
        {"chosen": [USER, said("yes")], "rejected": [USER, said("no")]},
        {"messages": [USER], "answers": ["no", [said("yes")]], "ranks": [2, 1]},
        {"prompt": "Q", "answers": ["no", "yes"], "ranks": [0.5, -1.5]},
    ],
)
def test_every_form_of_a_pair_is_the_same_comparison(
    record: dict[str, Any], tokenizer: Tokenizer
) -> None:
    ranking = parse_ranking(record)
    ((best, worst),) = ranked_pairs(ranking.ranks)
    texts = [c.messages for c in ranking.conversations()]
    assert texts[best] == [USER, said("yes")] and texts[worst] == [USER, said("no")]


def test_a_pair_may_have_a_margin() -> None:
    record = {"prompt": "Q", "chosen": "yes", "rejected": "no"}
    assert parse_ranking(record).margin == 0 and parse_ranking(record | {"margin": 2}).margin == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": None}, r"line 7: answers: is missing"),
        ({"ranks": None}, r"line 7: ranks: is missing"),
        ({"prompt": None}, r"line 7: prompt: is missing"),
        ({"prompt": 3}, r"prompt: is a int"),
        ({"answers": ["a"], "ranks": [1]}, r"answers: has 1 items. Expected at least two"),
        ({"ranks": [1, 2, 3]}, r"ranks: has 3 ranks for 4 answers"),
        ({"ranks": [1, 2, None, 3]}, r"ranks\[2\]: is missing"),
        ({"ranks": [1, 2, "first", 3]}, r"ranks\[2\]: is 'first'"),
        ({"ranks": [1, 2, float("nan"), 3]}, r"ranks\[2\]: is nan"),
        ({"ranks": [1, True, 2, 3]}, r"ranks\[1\]: is True"),
        ({"answers": ["a", None, "c", "d"]}, r"answers\[1\]: is missing"),
        ({"answers": ["a", [USER], "c", "d"]}, r"answers\[1\]: does not end with the assistant"),
        ({"answers": ["a", [], "c", "d"]}, r"answers\[1\]: is empty"),
        ({"answers": ["a", ["b"], "c", "d"]}, r"answers\[1\]\[0\]: is no message"),
    ],
)
def test_what_is_wrong_is_named_by_record_and_field(change: dict[str, Any], message: str) -> None:
    record = {k: v for k, v in (FOUR | change).items() if v is not None}
    with pytest.raises(DataError, match=message):
        parse_ranking(record, "file.jsonl", "line 7")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "Q", "chosen": "yes"}, "rejected: is missing"),
        ({"chosen": "yes", "rejected": "no"}, "chosen: is no message list"),
        ({"prompt": "Q", "chosen": "a", "rejected": "b", "margin": "x"}, "margin: is 'x'"),
        ({"text": "hello"}, "has 'text'; that is no ranking"),
    ],
)
def test_wrong_pairs_are_named(record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_ranking(record, "file.jsonl", "line 7")


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(DataError, match="no records"):
        list(read_rankings([tmp_path / "none.jsonl"]))


def test_tied_and_overlong_rankings_are_left_out_and_counted(tokenizer: Tokenizer) -> None:
    encoder = ConversationEncoder(tokenizer)
    records = [FOUR, FOUR | {"ranks": [1, 1, 1, 1]}, FOUR | {"answers": ["a", "b" * 99, "c", "d"]}]
    examples, counts = encode_rankings(map(parse_ranking, records), encoder, 64)
    assert (counts.kept, counts.tied, counts.dropped, counts.pairs) == (1, 1, 1, 6)
    assert "all of their answers are tied" in " ".join(counts.lines(64))
    ends = {tokenizer.decode(d.tolist()[-1:], skip_special_tokens=False).strip()
            for d in examples[0].documents}  # fmt: skip
    assert ends == {tokenizer.decode([i], skip_special_tokens=False)
                    for i in encoder.end_ids if i == examples[0].documents[0][-1]}  # fmt: skip
    with pytest.raises(DataError, match="no ranking is left"):
        encode_rankings([parse_ranking(records[1])], encoder, 64)


def test_micro_batches_hold_whole_rankings_once(tokenizer: Tokenizer) -> None:
    encoder = ConversationEncoder(tokenizer)
    records = [
        {"prompt": f"Q{i}", "answers": ["x" * (j + 1) for j in range(k)], "ranks": list(range(k))}
        for i, k in enumerate((2, 3, 4, 2, 5))
    ]
    examples, counts = encode_rankings(map(parse_ranking, records), encoder, 64)
    most = max(e.tokens for e in examples)
    micros = list(ranking_batches(examples, range(5), most))
    assert sum(m.tokens for m in micros) == 5
    assert sum(len(m.better) for m in micros) == counts.pairs == 1 + 3 + 6 + 1 + 10
    assert all(len(m.documents.ids) <= most for m in micros)
    assert sum(float(m.weights.sum()) for m in micros) == pytest.approx(5)
    both = [list(ranking_batches(examples, range(5), most, rank, 2)) for rank in (0, 1)]
    assert len(both[0]) == len(both[1])
    assert sum(m.tokens for part in both for m in part) == 5
    whole = ranking_micro(examples)
    documents = [d for e in examples for d in e.documents]
    for row, ids in zip(whole.ends.tolist(), documents, strict=True):
        assert int(whole.documents.ids[row]) == ids[-1]
        assert int(whole.documents.positions[row]) == len(ids) - 1
    # each prompt is there once
    assert len(whole.documents.ids) == sum(e.tokens for e in examples)
    assert sum(e.tokens for e in examples) < sum(map(len, documents))
    assert torch.equal(whole.better[:4], torch.tensor([0, 2, 2, 3]))


def test_resuming_with_other_rankings_is_refused(tokenizer: Tokenizer) -> None:
    encoder = ConversationEncoder(tokenizer)

    def batches(*records: dict[str, Any]) -> ExampleBatches:
        examples, _ = encode_rankings(map(parse_ranking, records), encoder, 64)
        return ExampleBatches(
            examples, batch_size=1, micro_tokens=256, cut=ranking_batches, hash_of=fingerprint
        )

    first = batches(FOUR, FOUR | {"ranks": [1, 2, 3, 4]})
    next(first)
    again = batches(FOUR, FOUR | {"ranks": [1, 2, 3, 4]})
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert torch.equal(next(again)[0].better, next(first)[0].better)
    with pytest.raises(ValueError, match="data"):
        batches(FOUR, FOUR).load_state_dict(first.state_dict())
