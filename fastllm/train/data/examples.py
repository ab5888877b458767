"""Examples of a fine-tuning run, and its steps: seeded, packed, resumable.

A step is `batch_size` examples, taken from one permutation of all of them after another. Its
documents are packed best-fit into micro batches of at most `micro_tokens` tokens, whole and without
padding: how they are packed changes nothing but speed. The last step of a run may be smaller.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastllm.errors import DataError
from fastllm.train.data.batch import NO_LOSS, MicroBatch, micro_batch
from fastllm.train.data.masks import Example
from fastllm.train.data.order import permutation
from fastllm.train.data.packing import pack_rows

OVERLONG = ("truncate", "drop")


@dataclass(slots=True)
class Counts:
    """What became of the examples that were read."""

    kept: int = 0
    tokens: int = 0  # places of the kept ones: inputs of the model
    trained: int = 0  # of them with a target
    truncated: int = 0  # kept, but cut at the end
    dropped: int = 0  # too long and dropped by choice
    emptied: int = 0  # too long, and what is left trains nothing: dropped

    def lines(self, seq_len: int) -> list[str]:
        """Sentences about them."""
        share = 100 * self.trained / max(self.tokens, 1)
        said = [
            f"{self.kept} examples, {self.tokens} tokens, {self.trained} of them learned"
            f" ({share:.0f}%)"
        ]
        longer = f"longer than {seq_len} tokens"
        if self.truncated:
            said.append(f"{self.truncated} examples {longer} were cut at the end")
        if self.dropped:
            said.append(f"{self.dropped} examples {longer} were dropped")
        if self.emptied:
            said.append(
                f"{self.emptied} examples {longer} were dropped: no learned token is in the part "
                "that fits"
            )
        return said


def fit_examples(
    examples: Iterable[Example], seq_len: int, overlong: str = "truncate"
) -> tuple[list[Example], Counts]:
    """Examples of at most `seq_len` places (inputs of the model), and what became of the others.

    overlong: "truncate" cuts longer ones at the end, "drop" drops them. What follows the last
    learned token, and trains nothing, is always cut.
    Raises ValueError naming the argument; DataError if nothing is left, or every token of every
    example is learned though some are questions.
    """
    if overlong not in OVERLONG:
        raise ValueError(f"overlong must be one of {', '.join(OVERLONG)}, got {overlong!r}")
    if seq_len < 2:
        raise ValueError(f"seq_len must be at least 2, got {seq_len}")
    kept: list[Example] = []
    counts = Counts()
    for example in examples:
        fitted = _fit(example, seq_len, overlong, counts)
        if fitted is not None:
            kept.append(fitted)
            counts.kept += 1
            counts.tokens += len(fitted.ids) - 1
            counts.trained += int(fitted.trained.sum())
    if not kept:
        lost = counts.dropped + counts.emptied
        problem = f"all {lost} examples are too long for {seq_len} tokens" if lost else "no example"
        raise DataError(
            "data", "", "", problem, "Give a larger --seq-len, or shorter conversations"
        )
    return kept, counts


def check_masks(examples: Sequence[Example]) -> None:
    """Raises DataError if the masks of all examples hold nothing back: questions are learned too,
    and the template or the data is not what it seems."""
    if all(example.trained[1:].all() for example in examples):
        raise DataError(
            examples[0].place,
            "",
            "",
            "every token of every example would be learned: there is nothing that is answered",
            "Give conversations with questions, or --loss all",
        )


class ExampleBatches:
    """An endless iterator over steps; each is the list of this process's micro batches.

    batch_size: examples of a step, all processes together. micro_tokens: places that go through the
    model at once; the longest example must fit. count: examples of the run, the step that reaches
    it ends there. cut: makes micro batches as `micro_batches` does, hash_of hashes as `fingerprint`
    does; they are given for examples of another kind.
    """

    def __init__(
        self,
        examples: Sequence[Any],
        *,
        batch_size: int,
        micro_tokens: int,
        seed: int = 0,
        count: int | None = None,
        rank: int = 0,
        world: int = 1,
        cut: Callable[..., Iterable[Any]] | None = None,
        hash_of: Callable[[Sequence[Any]], str] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.examples = examples
        self.batch_size = batch_size
        self.micro_tokens = micro_tokens
        self.seed = seed
        self.count = count
        self.rank = rank
        self.world = world
        self._done = 0  # examples of earlier steps, all processes together
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        self._cut = cut or micro_batches
        self._fingerprint = (hash_of or fingerprint)(examples)

    def __iter__(self) -> Iterator[list[Any]]:
        return self

    def __next__(self) -> list[Any]:
        last = self._done + self.batch_size
        if self.count is not None and self._done < self.count:
            last = min(last, self.count)
        chosen = [self._at(number) for number in range(self._done, last)]
        self._done = last
        return list(self._cut(self.examples, chosen, self.micro_tokens, self.rank, self.world))

    def state_dict(self) -> dict[str, Any]:
        """Where the run is, as JSON values; batch size, packing and processes may change."""
        return {"examples": self._done, "seed": self.seed, "data": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken. Raises ValueError naming what does not fit."""
        for name, mine in (("seed", self.seed), ("data", self._fingerprint)):
            if state.get(name) != mine:
                raise ValueError(
                    f"the position in the examples was saved with {name} {state.get(name)!r}, this "
                    f"run has {mine!r}: resume with the data, template, lengths and seed of before"
                )
        self._done = int(state["examples"])

    def _at(self, number: int) -> int:
        epoch, place = divmod(number, len(self.examples))
        if self._order[0] != epoch:
            self._order = (epoch, permutation(len(self.examples), self.seed, epoch))
        return int(self._order[1][place])


def micro_batches(
    examples: Sequence[Example],
    chosen: Sequence[int],
    micro_tokens: int,
    rank: int = 0,
    world: int = 1,
) -> Iterator[MicroBatch]:
    """This process's micro batches of the chosen examples, the same number for every process; one
    that has none left gets a batch of one place without a target."""
    places = [len(examples[i].ids) - 1 for i in chosen]
    rows = pack_rows(places, micro_tokens)
    for low in range(0, len(rows), world):
        mine = rows[low + rank] if low + rank < len(rows) else []
        yield _batch(examples, [chosen[i] for i in mine]) if mine else _idle(examples[0])


def fingerprint(examples: Sequence[Example]) -> str:
    """A hash of the tokens and masks, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        digest.update(len(example.ids).to_bytes(8, "little"))
        digest.update(example.ids.tobytes())
        digest.update(example.trained.tobytes())
    return digest.hexdigest()


def _fit(example: Example, seq_len: int, overlong: str, counts: Counts) -> Example | None:
    most = seq_len + 1  # tokens; the last one is only predicted
    long = len(example.ids) > most
    if long and overlong == "drop":
        counts.dropped += 1
        return None
    learned = np.flatnonzero(example.trained[:most])
    if not len(learned):
        counts.emptied += 1
        return None
    counts.truncated += long
    end = int(learned[-1]) + 1
    return replace(example, ids=example.ids[:end], trained=example.trained[:end])


def _batch(examples: Sequence[Example], chosen: Sequence[int]) -> MicroBatch:
    parts = [examples[i] for i in chosen]
    lengths = [len(part.ids) - 1 for part in parts]
    sources = np.array([(i, 0, n) for i, n in zip(chosen, lengths, strict=True)], np.int64)
    return micro_batch(
        np.concatenate([part.ids[:-1] for part in parts]),
        np.concatenate([part.targets()[:-1] for part in parts]),
        lengths,
        sources,
    )


def _idle(example: Example) -> MicroBatch:
    ids, targets = example.ids[:1].copy(), np.array([NO_LOSS], np.int64)
    return micro_batch(ids, targets, [1], np.array([[-1, 0, 1]], np.int64))
