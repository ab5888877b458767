"""Rankings of answers, what a reward model learns from: K answers of a prompt, or pairs.

    {"prompt": "...", "answers": ["...", ...], "ranks": [2, 1, 3, 1]}      1 is best, ties allowed
    {"messages": [...], "answers": [...], "ranks": [...]}                  the prompt as messages
    {"prompt": "...", "chosen": "...", "rejected": "..."}                  also as message lists
    {"chosen": [messages], "rejected": [messages]}                         the prompt is what both
                                                                           begin with

Any K from 2. Every pair of answers with different ranks is one comparison; answers of equal rank
are not compared. A ranking whose ranks are all equal says nothing: it is left out and counted. A
pair may have a `margin`, by how much the chosen answer is better. `truncated`, a list of booleans
beside answers, says which were cut at the longest length: they have no token that ends an answer,
since the model has not said it.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastllm.errors import DataError
from fastllm.nn.batch import Documents
from fastllm.train.data.conversations import Conversation, data_files
from fastllm.train.data.masks import ConversationEncoder, Example
from fastllm.train.data.packing import pack_rows
from fastllm.train.data.records import read_records

Message = dict[str, Any]
_FORMS = (
    "Expected 'prompt' or 'messages' with 'answers' and 'ranks', or 'chosen' and 'rejected' "
    "(with 'prompt', or message lists with a common beginning)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """Conversations that differ in their last message, and their ranks: 1 is best, ties allowed."""

    prompt: list[Message]
    answers: list[list[Message]]
    ranks: tuple[float, ...]
    truncated: tuple[bool, ...] = ()  # of each answer, whether it was cut; empty: none was
    margin: float = 0.0  # of a pair
    file: str = "ranking"
    record: str = ""

    def error(self, field: str, problem: str, remedy: str = "") -> DataError:
        """A DataError that names this record."""
        return DataError(self.file, self.record, field, problem, remedy)

    def examples(self, encoder: ConversationEncoder) -> list[Example]:
        """The prompt with each of its answers. Raises DataError if the template refuses one."""
        found = list(encoder.encode(self.conversations()))
        if len(found) != len(self.answers):
            raise self.error("answers", "the chat template makes several documents of one")
        cut = self.truncated or (False,) * len(found)
        return [without_end(each) if c else each for each, c in zip(found, cut, strict=True)]

    def conversations(self) -> list[Conversation]:
        """The prompt with each of its answers."""
        whole = [[*self.prompt, *answer] for answer in self.answers]
        return [
            Conversation(
                messages=messages, answers=(len(messages) - 1,), file=self.file, record=self.record
            )
            for messages in whole
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class RankedExample:
    """The documents of a ranking: int32 ids, the score is read on the last one, the end token
    unless the answer was cut."""

    documents: tuple[np.ndarray, ...]
    ranks: tuple[float, ...]
    margin: float
    place: str

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(better, worse) of every two answers with different ranks."""
        return ranked_pairs(self.ranks)

    @property
    def common(self) -> int:
        """Tokens that all documents begin with: the prompt, which goes through the model once."""
        shortest = min(map(len, self.documents))
        table = np.stack([ids[:shortest] for ids in self.documents])
        different = np.flatnonzero((table != table[0]).any(0))
        return int(different[0]) if len(different) else shortest

    @property
    def tokens(self) -> int:
        """That go through the model."""
        common = self.common
        return common + sum(len(ids) - common for ids in self.documents)


@dataclass(slots=True)
class RankingCounts:
    """What became of the rankings that were read."""

    kept: int = 0
    pairs: int = 0
    tokens: int = 0
    tied: int = 0  # left out: no answer is better than another
    dropped: int = 0  # left out: an answer is too long

    def lines(self, seq_len: int) -> list[str]:
        """Sentences about them."""
        said = [f"{self.kept} rankings, {self.pairs} pairs, {self.tokens} tokens"]
        if self.tied:
            said.append(f"{self.tied} rankings were left out: all of their answers are tied")
        if self.dropped:
            said.append(
                f"{self.dropped} rankings were left out: an answer is longer than {seq_len} tokens"
            )
        return said


@dataclass(frozen=True, kw_only=True, slots=True)
class RankingMicro:
    """S documents of whole rankings, and the P pairs that are compared."""

    documents: Documents
    ends: Tensor  # [S] int64: the row of each document's last token
    better: Tensor  # [P] int64: which document
    worse: Tensor  # [P] int64
    weights: Tensor  # [P] float32: one over the pairs of the ranking
    margins: Tensor  # [P] float32
    tokens: int  # rankings: what the loop divides by

    def to(self, device: torch.device | str) -> RankingMicro:
        """The batch with its tensors on `device`."""
        names = ("ends", "better", "worse", "weights", "margins")
        moved = {name: getattr(self, name).to(device) for name in names}
        return replace(self, documents=self.documents.to(device), **moved)


def ranked_pairs(ranks: Sequence[float]) -> list[tuple[int, int]]:
    """(better, worse) of every two places with different ranks; the lower rank is better."""
    pairs = []
    for i, j in combinations(range(len(ranks)), 2):
        if ranks[i] != ranks[j]:
            pairs.append((i, j) if ranks[i] < ranks[j] else (j, i))
    return pairs


def without_end(example: Example) -> Example:
    """An answer that was cut: the model has not said the token that ends it."""
    return replace(example, ids=example.ids[:-1], trained=example.trained[:-1])


def read_rankings(paths: Sequence[str | os.PathLike[str]]) -> Iterator[Ranking]:
    """The rankings of files and folders, in order.

    Raises DataError naming file, record and field; FileNotFoundError.
    """
    for file in data_files(paths):
        count = 0
        for place, record in read_records(file):
            yield parse_ranking(record, file, place)
            count += 1
        if not count:
            raise DataError(file, "", "", "the file holds no records")


def parse_ranking(
    record: Mapping[str, Any], file: str | os.PathLike[str] = "data", place: str = ""
) -> Ranking:
    """One record. Raises DataError naming file, place and field."""
    reader = _Reader(os.fspath(file), place, record)
    if "answers" in record or "ranks" in record:
        return reader.ranking()
    if "chosen" in record or "rejected" in record:
        return reader.pair()
    found = ", ".join(map(repr, list(record)[:8])) or "no fields"
    raise DataError(file, place, "", f"has {found}; that is no ranking", _FORMS)


class _Reader:
    """Checks and converts one record; its errors name the file and the place."""

    def __init__(self, file: str, place: str, record: Mapping[str, Any]) -> None:
        self.file, self.place, self.record = file, place, record

    def error(self, field: str, problem: str, expected: str) -> DataError:
        return DataError(self.file, self.place, field, problem, f"Expected {expected}")

    def ranking(self) -> Ranking:
        prompt = self.messages("messages" if "messages" in self.record else "prompt", "user")
        answers = self.list_of("answers")
        ranks = self.list_of("ranks")
        if len(answers) < 2:
            raise self.error("answers", f"has {len(answers)} items", "at least two answers")
        if len(ranks) != len(answers):
            problem = f"has {len(ranks)} ranks for {len(answers)} answers"
            raise self.error("ranks", problem, "a rank for each answer, 1 for the best")
        return Ranking(
            prompt=prompt,
            answers=[self.answer(value, f"answers[{i}]") for i, value in enumerate(answers)],
            ranks=tuple(self.number(value, f"ranks[{i}]") for i, value in enumerate(ranks)),
            truncated=self.truncated(len(answers)),
            file=self.file,
            record=self.place,
        )

    def truncated(self, count: int) -> tuple[bool, ...]:
        if self.record.get("truncated") is None:
            return ()
        found = self.list_of("truncated")
        if len(found) != count or not all(isinstance(value, bool) for value in found):
            raise self.error(
                "truncated", f"is {found!r:.60}", f"true or false for each of the {count} answers"
            )
        return tuple(found)

    def pair(self) -> Ranking:
        chosen, rejected = (self.record.get(name) for name in ("chosen", "rejected"))
        if "prompt" in self.record:
            prompt = self.messages("prompt", "user")
            answers = [self.answer(chosen, "chosen"), self.answer(rejected, "rejected")]
        else:
            prompt, answers = self.implicit(chosen, rejected)
        margin = self.number(self.record["margin"], "margin") if "margin" in self.record else 0.0
        return Ranking(
            prompt=prompt, answers=answers, ranks=(1.0, 2.0), margin=margin, file=self.file,
            record=self.place,
        )  # fmt: skip

    def implicit(self, chosen: Any, rejected: Any) -> tuple[list[Message], list[list[Message]]]:
        """The common beginning of two message lists, and what follows."""
        for name, value in (("chosen", chosen), ("rejected", rejected)):
            if not isinstance(value, list):
                problem = "is missing" if value is None else "is no message list"
                raise self.error(name, problem, "'prompt' beside it, or a list of messages")
        both = [self.message_list(chosen, "chosen"), self.message_list(rejected, "rejected")]
        most = min(map(len, both)) - 1  # an answer has at least one message
        common = 0
        while common < most and both[0][common] == both[1][common]:
            common += 1
        return both[0][:common], [messages[common:] for messages in both]

    def messages(self, name: str, role: str) -> list[Message]:
        value = self.record.get(name)
        if isinstance(value, str):
            return [{"role": role, "content": value}]
        return self.message_list(value, name)

    def answer(self, value: Any, where: str) -> list[Message]:
        if isinstance(value, str):
            return [{"role": "assistant", "content": value}]
        messages = self.message_list(value, where)
        if messages[-1].get("role") != "assistant":
            raise self.error(where, "does not end with the assistant's message", "an answer")
        return messages

    def message_list(self, value: Any, where: str) -> list[Message]:
        if not isinstance(value, list):
            problem = "is missing" if value is None else f"is a {type(value).__name__}"
            raise self.error(where, problem, "a string or a list of messages")
        if not value:
            raise self.error(where, "is empty", "at least one message")
        for i, message in enumerate(value):
            good = isinstance(message, dict) and isinstance(message.get("role"), str)
            if not good or not isinstance(message.get("content"), str | list):
                raise self.error(
                    f"{where}[{i}]", "is no message", "an object {'role': ..., 'content': ...}"
                )
        return [dict(message) for message in value]

    def list_of(self, name: str) -> list[Any]:
        value = self.record.get(name)
        if not isinstance(value, list):
            problem = "is missing" if value is None else f"is a {type(value).__name__}"
            raise self.error(name, problem, f"a list of {name}")
        return value

    def number(self, value: Any, where: str) -> float:
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not math.isfinite(value):
            problem = "is missing" if value is None else f"is {value!r:.40}"
            raise self.error(where, problem, "a number")
        return float(value)


def encode_rankings(
    rankings: Iterable[Ranking], encoder: ConversationEncoder, seq_len: int
) -> tuple[list[RankedExample], RankingCounts]:
    """The documents of rankings, and what became of the others.

    seq_len: the longest document; a ranking with a longer one is left out whole.
    Raises DataError naming a record that the template refuses, or if nothing is left.
    """
    counts, kept = RankingCounts(), []
    for ranking in rankings:
        examples = ranking.examples(encoder)
        documents = tuple(example.ids for example in examples)
        if not ranked_pairs(ranking.ranks):
            counts.tied += 1
        elif max(map(len, documents)) > seq_len:
            counts.dropped += 1
        else:
            example = RankedExample(
                documents=documents, ranks=ranking.ranks, margin=ranking.margin,
                place=examples[0].place,
            )  # fmt: skip
            kept.append(example)
            counts.pairs += len(example.pairs)
            counts.tokens += example.tokens
    counts.kept = len(kept)
    if not kept:
        lost = f"{counts.tied} are tied, {counts.dropped} too long for {seq_len} tokens"
        raise DataError("data", "", "", f"no ranking is left ({lost})")
    return kept, counts


def ranking_batches(
    examples: Sequence[RankedExample], chosen: Sequence[int], micro_tokens: int, rank: int = 0,
    world: int = 1,
) -> Iterator[RankingMicro]:  # fmt: skip
    """This process's micro batches of the chosen rankings, as `micro_batches` of examples."""
    rows = pack_rows([examples[i].tokens for i in chosen], micro_tokens)
    for low in range(0, len(rows), world):
        mine = rows[low + rank] if low + rank < len(rows) else []
        yield ranking_micro([examples[chosen[i]] for i in mine]) if mine else _idle(examples[0])


def ranking_micro(examples: Sequence[RankedExample]) -> RankingMicro:
    """All documents of the rankings, each prompt once, and all pairs."""
    groups, count = [], 0
    better: list[int] = []
    worse: list[int] = []
    weights: list[float] = []
    margins: list[float] = []
    for example in examples:
        pairs, common = example.pairs, example.common
        suffixes = [ids[common:].tolist() for ids in example.documents]
        groups.append((example.documents[0][:common].tolist(), suffixes))
        better += [count + i for i, _ in pairs]
        worse += [count + j for _, j in pairs]
        count += len(suffixes)
        weights += [1 / len(pairs)] * len(pairs)
        margins += [example.margin] * len(pairs)
    documents, rows = Documents.pack_shared(groups)
    return RankingMicro(
        documents=documents,
        ends=torch.stack([places[-1] for places in rows]),
        better=torch.tensor(better, dtype=torch.int64),
        worse=torch.tensor(worse, dtype=torch.int64),
        weights=torch.tensor(weights, dtype=torch.float32),
        margins=torch.tensor(margins, dtype=torch.float32),
        tokens=len(examples),
    )


def fingerprint(examples: Sequence[RankedExample]) -> str:
    """A hash of tokens and ranks, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        for ids in example.documents:
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(ids.tobytes())
        digest.update(np.array([*example.ranks, example.margin]).tobytes())
    return digest.hexdigest()


def _idle(example: RankedExample) -> RankingMicro:
    """A forward pass for a process that has nothing left."""
    none = torch.empty(0, dtype=torch.int64)
    return RankingMicro(
        documents=Documents.pack([torch.from_numpy(example.documents[0][:1])]),
        ends=torch.zeros(1, dtype=torch.int64), better=none, worse=none, weights=none.float(),
        margins=none.float(), tokens=0,
    )  # fmt: skip
