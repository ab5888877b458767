"""Stages that learn a data set in epochs: how long, in which steps, and what is held out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fastllm.models.config import ModelConfig
from fastllm.train.data.masks import TEMPLATES
from fastllm.train.data.order import permutation
from fastllm.train.loop_config import LoopConfig
from fastllm.train.schedule import ScheduleConfig
from fastllm.train.tune_config import TuneConfig

MAX_HELD_OUT = 200  # records; more make evaluation slow and no steadier
Say = Callable[[str], None]
T = TypeVar("T")


def epochs_loop(out: str) -> LoopConfig:
    """The loop's defaults of such a run; its steps come from the plan."""
    return LoopConfig(
        out=out,
        steps=1_000_000_000,
        schedule=ScheduleConfig(kind="cosine", final=0.05),
        eval_every=100,
        save_every=200,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is chosen where the configuration leaves it open, all values known."""

    epochs: float
    batch_size: int
    lr: float
    micro_tokens: int
    examples: int  # in all epochs
    steps: int
    unit: str  # what a batch is made of: conversations, pairs, rankings

    def lines(self) -> list[str]:
        """A sentence."""
        return [
            f"{self.epochs:g} epochs in {self.steps} steps of {self.batch_size} {self.unit}, "
            f"learning rate {self.lr:.2g}"
        ]


def make_plan(
    config: TuneConfig, count: int, longest: int, *, epochs: float, batch_size: int | None,
    lr: float, unit: str,
) -> Plan:  # fmt: skip
    """The plan for `count` examples, the longest of which has `longest` tokens.

    batch_size: None is the power of two nearest to 0.4 sqrt(count), from 4 to 64: some hundred
    steps for a thousand examples. micro_tokens: 2,048 where none is given, or the longest example.
    """
    if batch_size is None:
        batch_size = min(2 ** round(math.log2(min(max(0.4 * math.sqrt(count), 4), 64))), count)
    total = max(round(count * epochs), 1)
    return Plan(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        micro_tokens=max(config.micro_tokens or 2048, longest),
        examples=total,
        steps=math.ceil(total / batch_size),
        unit=unit,
    )


def few_epochs(count: int) -> int:
    """1, for fewer than 1,000 examples up to 3: what is compared is overfitted soon."""
    return min(max(round(1000 / count), 1), 3)


def choose_length(seq_len: int | None, model: ModelConfig) -> int:
    """The longest example in tokens: 2,048 or the model's context. Raises ValueError beyond it."""
    most = model.max_position_embeddings
    if seq_len is None:
        return min(most, 2048)
    if seq_len > most:
        raise ValueError(f"seq_len {seq_len} is beyond the model's context of {most}")
    return seq_len


def held_out_count(n: int, holdout: str, most: int = MAX_HELD_OUT) -> int:
    """How many of n records `holdout` keeps from training: "auto" (5% of 20 or more), "none" or a
    share. Raises ValueError for anything else."""
    if holdout == "auto":
        return min(n // 20, most)
    if holdout == "none":
        return 0
    try:
        share = float(holdout)
    except ValueError:
        share = math.nan
    if not 0 <= share < 1:
        raise ValueError(
            f"holdout must be auto, none, a share from 0 to below 1 or a file that exists, "
            f"got {holdout!r}"
        )
    return min(math.ceil(share * n), n - 1, most)


def split(records: list[T], holdout: str, seed: int) -> tuple[list[T], list[T]]:
    """(train, held out): see `held_out_count`."""
    n = len(records)
    chosen = set(permutation(n, seed, -1)[: held_out_count(n, holdout)].tolist())
    return (
        [record for i, record in enumerate(records) if i not in chosen],
        [records[i] for i in sorted(chosen)],
    )


def read_template(name: str) -> str | None:
    """The Jinja source that `name` means, None for the model's own.

    Raises ValueError if it is neither a known name nor a file.
    """
    if name == "model":
        return None
    if name in TEMPLATES:
        return TEMPLATES[name]
    if Path(name).is_file():
        return Path(name).read_text(encoding="utf-8")
    known = ", ".join(("model", *TEMPLATES))
    raise ValueError(f"chat_template must be {known} or a file that exists, got {name!r}")


def say_nothing(text: str) -> None:
    """What processes but the first say."""
