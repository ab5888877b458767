"""Pairs of answers as packed documents: a prompt, read once, and the answers that follow it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastllm.errors import DataError
from fastllm.nn.batch import Documents
from fastllm.train.data.batch import NO_LOSS
from fastllm.train.data.masks import ConversationEncoder, Example
from fastllm.train.data.packing import pack_rows
from fastllm.train.data.rankings import Ranking, ranked_pairs


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two conversations that differ in their answer, the better one first."""

    chosen: Example
    rejected: Example

    @property
    def shared(self) -> int:
        """Tokens that both begin with and that neither learns: at least the first."""
        both = self.chosen, self.rejected
        most = min(int(np.flatnonzero(example.trained)[0]) for example in both)
        equal = self.chosen.ids[:most] == self.rejected.ids[:most]
        return most if equal.all() else int(np.argmin(equal))

    @property
    def places(self) -> int:
        """Inputs of the model for both, what they share once."""
        return len(self.chosen.ids) + len(self.rejected.ids) - 2 - self.shared

    @property
    def lengths(self) -> tuple[int, int]:
        """Learned tokens of both."""
        both = self.chosen, self.rejected
        first, second = (int(np.count_nonzero(example.trained[1:])) for example in both)
        return first, second


@dataclass(slots=True)
class PairCounts:
    """What became of the rankings that were read."""

    kept: int = 0  # pairs
    tokens: int = 0
    learned: int = 0
    tied: int = 0  # rankings left out: no answer is better than another
    dropped: int = 0  # rankings left out: an answer is too long
    equal: int = 0  # pairs left out: both answers have the same tokens

    def lines(self, seq_len: int) -> list[str]:
        """Sentences about them."""
        said = [f"{self.kept} pairs, {self.tokens} tokens, {self.learned} of them of answers"]
        if self.tied:
            said.append(f"{self.tied} rankings were left out: all of their answers are tied")
        if self.dropped:
            said.append(
                f"{self.dropped} rankings were left out: an answer is longer than {seq_len} tokens"
            )
        if self.equal:
            said.append(f"{self.equal} pairs were left out: both answers are the same")
        return said


@dataclass(frozen=True, kw_only=True, slots=True)
class PairMicro:
    """P pairs as 2 P documents, chosen and rejected in turn, with what a pair shares once.

    N places predict what is not shared: `sizes` of them for each document.
    """

    documents: Documents
    rows: Tensor  # [N] int64: where the documents' hidden states are
    targets: Tensor  # [N] int64: the next token where it is an answer's, else NO_LOSS
    sizes: tuple[int, ...]  # 2 P
    lengths: Tensor  # [P, 2] float64: tokens of the answers
    numbers: tuple[int, ...]  # P: which pair of the data set
    tokens: int  # pairs: what the loop divides by

    def to(self, device: torch.device | str) -> PairMicro:
        """The batch with its tensors on `device`."""
        return replace(
            self,
            documents=self.documents.to(device),
            rows=self.rows.to(device),
            targets=self.targets.to(device),
            lengths=self.lengths.to(device),
        )


def encode_pairs(
    rankings: Iterable[Ranking], encoder: ConversationEncoder, seq_len: int
) -> tuple[list[Pair], PairCounts]:
    """Every two answers of different rank as a pair, and what became of the others.

    seq_len: places of the longest document; a ranking with a longer one is left out whole.
    Raises DataError naming a record that the template refuses, or if nothing is left.
    """
    counts = PairCounts()
    kept: list[Pair] = []
    for ranking in rankings:
        examples = ranking.examples(encoder)
        for number, example in enumerate(examples):
            if not example.trained.any():
                raise ranking.error(f"answers[{number}]", "is empty and was cut: nothing is said",
                                    "Leave it out")  # fmt: skip
        pairs = ranked_pairs(ranking.ranks)
        if not pairs:
            counts.tied += 1
        elif max(len(example.ids) - 1 for example in examples) > seq_len:
            counts.dropped += 1
        else:
            kept += _different(examples, pairs, counts)
    if not kept:
        lost = (
            f"{counts.tied} rankings are tied, {counts.dropped} too long for {seq_len} tokens, "
            f"{counts.equal} pairs of equal answers"
        )
        raise DataError("data", "", "", f"no pair is left ({lost})")
    counts.kept = len(kept)
    counts.tokens = sum(pair.places for pair in kept)
    counts.learned = sum(sum(pair.lengths) for pair in kept)
    return kept, counts


def _different(
    examples: Sequence[Example], pairs: Sequence[tuple[int, int]], counts: PairCounts
) -> Iterator[Pair]:
    for better, worse in pairs:
        chosen, rejected = _cut(examples[better]), _cut(examples[worse])
        if np.array_equal(chosen.ids, rejected.ids):
            counts.equal += 1
        else:
            yield Pair(chosen=chosen, rejected=rejected)


def _cut(example: Example) -> Example:
    """Without what follows the last learned token."""
    end = int(np.flatnonzero(example.trained)[-1]) + 1
    return replace(example, ids=example.ids[:end], trained=example.trained[:end])


def pair_batches(
    pairs: Sequence[Pair], chosen: Sequence[int], micro_tokens: int, rank: int = 0, world: int = 1
) -> Iterator[PairMicro]:
    """This process's micro batches of the chosen pairs, the same number for every process."""
    rows = pack_rows([pairs[i].places for i in chosen], micro_tokens)
    for low in range(0, len(rows), world):
        mine = rows[low + rank] if low + rank < len(rows) else []
        yield pair_micro(pairs, [chosen[i] for i in mine])


def pair_micro(pairs: Sequence[Pair], numbers: Sequence[int]) -> PairMicro:
    """The pairs packed; without any, one place that trains nothing."""
    groups, targets = [], []
    for pair in (pairs[number] for number in numbers):
        both, shared = (pair.chosen, pair.rejected), pair.shared
        suffixes = [example.ids[shared:-1].tolist() for example in both]
        groups.append((pair.chosen.ids[:shared].tolist(), suffixes))
        targets += [torch.from_numpy(example.targets()[shared - 1 : -1]) for example in both]
    if not numbers:
        groups = [(pairs[0].chosen.ids[:1].tolist(), [[]])]
    documents, rows = Documents.pack_shared(groups)
    return PairMicro(
        documents=documents,
        rows=torch.cat(rows),
        targets=torch.cat(targets) if targets else torch.tensor([NO_LOSS]),
        sizes=tuple(map(len, targets)),
        lengths=torch.tensor([pairs[i].lengths for i in numbers], dtype=torch.float64).reshape(
            -1, 2
        ),
        numbers=tuple(numbers),
        tokens=len(numbers),
    )


def fingerprint(pairs: Sequence[Pair]) -> str:
    """A hash of tokens and masks, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for pair in pairs:
        for example in (pair.chosen, pair.rejected):
            digest.update(len(example.ids).to_bytes(8, "little"))
            digest.update(example.ids.tobytes())
            digest.update(example.trained.tobytes())
    return digest.hexdigest()
