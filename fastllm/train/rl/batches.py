"""The optimizer steps that rollouts make: a buffer of samples, cut into mini- and micro batches.

    collect -> samples -> `epochs` times: shuffled, cut into `mini_batches`, each one optimizer step
                                          packed into micro batches of whole documents

State is what is left of the buffer and where the collector is, so a run that is killed between two
steps of one rollout resumes with the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from fastllm.nn.batch import Documents
from fastllm.train.data.order import permutation
from fastllm.train.data.packing import pack_rows
from fastllm.train.rl.objective import token_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A completion as it is trained on. Lists have a value for every completion token."""

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    old: list[float]  # log-probabilities by the policy that sampled
    advantages: list[float]
    group: int = 0  # samples of one number, side by side, have the same prompt
    extra: dict[str, list[float]] = field(default_factory=dict)  # reference, values, ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RlMicro:
    """T rows of S completions and their prompts; N completion tokens are to be predicted.

    The completions of one prompt share its rows.
    """

    documents: Documents  # T tokens
    places: Tensor  # [N] int64: the row that each completion token follows
    targets: Tensor  # [N] int64: the completion tokens
    lengths: Tensor  # [S] int64: tokens of each completion, summing to N
    old: Tensor  # [N] float32
    advantages: Tensor  # [N] float32
    weights: Tensor  # [N] float32: see `token_weights`
    extra: dict[str, Tensor]  # [N] float32 each
    tokens: int  # N
    fresh: bool  # the weights are still those that sampled

    def to(self, device: torch.device | str) -> RlMicro:
        """The batch with its tensors on `device`."""
        moved = {
            name: getattr(self, name).to(device)
            for name in ("targets", "places", "lengths", "old", "advantages", "weights")
        }
        extra = {name: tensor.to(device) for name, tensor in self.extra.items()}
        return replace(self, documents=self.documents.to(device), extra=extra, **moved)


class Collector(Protocol):
    """Makes a rollout and says where it is. A call that raises must not have moved it."""

    def __call__(self, step: int) -> list[Sample]:
        """Samples of the next rollout, at least one. step: the optimizer step that is next."""

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError naming what does not fit."""


class RlBatches:
    """The `Batches` of the training loop.

    Args:
        collect: makes the next rollout.
        mini_batches: optimizer steps of one pass over a rollout's samples.
        epochs: passes.
        micro_tokens: rows that go through the model at once; a longer sample goes alone.
        aggregation, longest: see `token_weights`.
        seed: of the shuffling.
        skip: see `micro_batches`.
    """

    def __init__(
        self, collect: Collector, *, mini_batches: int = 1, epochs: int = 1, micro_tokens: int,
        aggregation: str, longest: int, seed: int = 0, skip: bool = False,
    ) -> None:  # fmt: skip
        self.collect = collect
        self.mini_batches = mini_batches
        self.epochs = epochs
        self.micro_tokens = micro_tokens
        self.aggregation = aggregation
        self.longest = longest
        self.seed = seed
        self.skip = skip
        self._rollouts = 0  # made so far
        self._step = 0  # steps taken from the buffer
        self._taken = 0  # steps in all
        self._buffer: list[Sample] = []

    def __iter__(self) -> Iterator[list[RlMicro]]:
        return self

    def __next__(self) -> list[RlMicro]:
        steps = self._steps()
        if self._step >= len(steps):
            self._buffer = self.collect(self._taken + 1)
            self._rollouts += 1
            self._step = 0
            steps = self._steps()
        chosen = [self._buffer[i] for i in steps[self._step]]
        fresh = self._step == 0
        self._step += 1
        self._taken += 1
        if self._step == len(steps):
            self._buffer = []  # a checkpoint need not hold what is done with
        return micro_batches(
            chosen, self.micro_tokens, aggregation=self.aggregation, longest=self.longest,
            fresh=fresh, skip=self.skip,
        )  # fmt: skip

    def _steps(self) -> list[list[int]]:
        """The samples of every step that the buffer makes."""
        count, steps = len(self._buffer), []
        for epoch in range(self.epochs if count else 0):
            order = self._shuffled(epoch)
            parts = min(self.mini_batches, count)
            edges = [count * i // parts for i in range(parts + 1)]
            steps += [order[a:b] for a, b in pairwise(edges)]
        return steps

    def _shuffled(self, epoch: int) -> list[int]:
        """The samples with their groups in a seeded order: a prompt goes through the model once."""
        groups: dict[int, list[int]] = {}
        for i, sample in enumerate(self._buffer):
            groups.setdefault(sample.group, []).append(i)
        order = permutation(len(groups), self.seed, self._rollouts, epoch)
        parts = list(groups.values())
        return [i for place in order for i in parts[int(place)]]

    def state_dict(self) -> dict[str, Any]:
        """Where the run is, the samples that wait included."""
        return {
            "rollouts": self._rollouts,
            "step": self._step,
            "taken": self._taken,
            "cut": [self.mini_batches, self.epochs],
            "buffer": [_plain(sample) for sample in self._buffer],
            "collect": self.collect.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go there. Raises ValueError naming what does not fit."""
        cut = [self.mini_batches, self.epochs]
        if state["buffer"] and state["cut"] != cut:
            raise ValueError(
                f"the run was within a rollout that is cut into {state['cut'][0]} mini_batches and "
                f"{state['cut'][1]} epochs: they cannot change there to {cut[0]} and {cut[1]}"
            )
        self.collect.load_state_dict(state["collect"])
        self._rollouts = int(state["rollouts"])
        self._step = int(state["step"])
        self._taken = int(state["taken"])
        self._buffer = [Sample(**values) for values in state["buffer"]]


def micro_batches(
    samples: Sequence[Sample], micro_tokens: int, *, aggregation: str, longest: int, fresh: bool,
    skip: bool = False,
) -> list[RlMicro]:  # fmt: skip
    """The samples of one optimizer step, packed best-fit; those of a prompt stay together as far as
    `micro_tokens` rows allow.

    skip: leave out samples whose advantages are all 0, unless all are: weights are such that the
        loss and its gradient are what they would be with them.
    """
    lengths = torch.tensor([len(sample.completion_ids) for sample in samples])
    weights = token_weights(lengths, aggregation, longest).tolist()
    if skip and (chosen := [i for i, sample in enumerate(samples) if any(sample.advantages)]):
        # The loop divides by the tokens that are there.
        share = int(lengths[chosen].sum()) / int(lengths.sum())
        samples, weights = [samples[i] for i in chosen], [share * weights[i] for i in chosen]
    units = list(_units(samples, micro_tokens))
    sizes = [_rows([samples[i] for i in unit]) for unit in units]
    packed = pack_rows(sizes, max(micro_tokens, *sizes))
    return [
        micro_batch(
            [samples[i] for u in row for i in units[u]],
            [weights[i] for u in row for i in units[u]],
            fresh=fresh,
        )
        for row in packed
    ]


def _units(samples: Sequence[Sample], most: int) -> Iterator[list[int]]:
    """Consecutive samples of one prompt, as many as fit into `most` rows, at least one."""
    unit: list[int] = []
    for i, sample in enumerate(samples):
        joined = [samples[j] for j in unit] + [sample]
        if unit and (samples[unit[0]].group != sample.group or _rows(joined) > most):
            yield unit
            unit = []
        unit.append(i)
    yield unit


def _rows(samples: Sequence[Sample]) -> int:
    """Rows of samples that share a prompt: every token but the last of each."""
    return len(samples[0].prompt_ids) + sum(len(s.completion_ids) - 1 for s in samples)


def stretches(samples: Sequence[Sample], most: int) -> Iterator[list[Sample]]:
    """The samples in their order, cut so that each part has at most `most` rows, or one unit."""
    part: list[Sample] = []
    rows = 0
    for unit in _units(samples, most):
        size = _rows([samples[i] for i in unit])
        if part and rows + size > most:
            yield part
            part, rows = [], 0
        part += [samples[i] for i in unit]
        rows += size
    yield part


def micro_batch(
    samples: Sequence[Sample], weights: Sequence[float], *, fresh: bool = False
) -> RlMicro:
    """The samples, in order, as one micro batch. weights: of each."""
    groups = [list(part) for _, part in groupby(samples, key=lambda sample: sample.group)]
    documents, rows = Documents.pack_shared(
        [(part[0].prompt_ids, [s.completion_ids[:-1] for s in part]) for part in groups]
    )
    lengths = torch.tensor([len(sample.completion_ids) for sample in samples])
    return RlMicro(
        documents=documents,
        places=torch.cat(rows),
        targets=torch.tensor([token for sample in samples for token in sample.completion_ids]),
        lengths=lengths,
        old=_flat([s.old for s in samples]),
        advantages=_flat([s.advantages for s in samples]),
        weights=torch.tensor(weights, dtype=torch.float32).repeat_interleave(lengths),
        extra={name: _flat([s.extra[name] for s in samples]) for name in samples[0].extra},
        tokens=int(lengths.sum()),
        fresh=fresh,
    )


def _flat(parts: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor([value for part in parts for value in part], dtype=torch.float32)


def _plain(sample: Sample) -> Mapping[str, Any]:
    return asdict(
        replace(
            sample, prompt_ids=list(sample.prompt_ids), completion_ids=list(sample.completion_ids)
        )
    )
