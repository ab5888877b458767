"""Reward models: learn from people's rankings which of several answers is the better one.

    rankings -> each answer a document by the chat template -> whole rankings packed
    score of an answer = a scalar head at its end token
    loss = -log sigmoid(better - worse), mean over the pairs of a ranking, then over rankings

K answers of a prompt make K (K - 1) / 2 pairs of one forward pass. An adapter and the head are
trained unless `method` is "full". The result is what transformers (or PEFT) loads as a model for
sequence classification with one label, and what `model:DIR` means as a reward.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastllm.models.loader import read_tokenizer
from fastllm.models.names import resolve
from fastllm.models.weights import open_weights
from fastllm.train import distributed
from fastllm.train.checkpoint import refuse_used
from fastllm.train.config import load_config, to_dict
from fastllm.train.data.examples import ExampleBatches
from fastllm.train.data.masks import ConversationEncoder
from fastllm.train.data.rankings import (
    RankedExample,
    RankingCounts,
    encode_rankings,
    fingerprint,
    ranking_batches,
    read_rankings,
)
from fastllm.train.epochs import (
    MAX_HELD_OUT,
    Plan,
    Say,
    choose_length,
    epochs_loop,
    few_epochs,
    make_plan,
    read_template,
    say_nothing,
    split,
)
from fastllm.train.loop import LoopConfig, Result, run
from fastllm.train.metrics import FILE, read
from fastllm.train.ranking_loss import Ordering
from fastllm.train.report import write_report
from fastllm.train.reward_task import RewardTask
from fastllm.train.tune_config import ALIASES, TuneConfig

EVALUATION = "evaluation.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig(TuneConfig):
    """What is learned from which rankings, and how. None: chosen from the data.

    Raises ValueError naming the field.
    """

    data: tuple[str, ...] = ()  # .jsonl, .json, .parquet files of rankings, or folders of them
    holdout: str = "auto"  # auto (5%), none, a share such as 0.1, or a file
    chat_template: str = "model"  # the model's own; chatml, plain, or a Jinja file
    margin: float = 0.0  # by how much the better answer is to win, beside the records' own
    center: float = 0.0  # coefficient of the squared sum of a pair's scores; 0.01 keeps them near 0
    seq_len: int | None = None  # the longest prompt and answer, in tokens
    epochs: float | None = None
    batch_size: int | None = None  # rankings of a step
    loop: LoopConfig = field(default_factory=lambda: epochs_loop("runs/reward"))

    def __post_init__(self) -> None:
        TuneConfig.__post_init__(self)
        self.check_positive("epochs", "batch_size")
        if self.seq_len is not None and self.seq_len < 2:
            raise ValueError(f"seq_len must be at least 2, got {self.seq_len}")
        for name in ("margin", "center"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number from 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardResult:
    """How a run ended, where its model is, and how well it orders held-out pairs."""

    run: Result
    output: Path  # adapter or model directory
    before: Ordering | None
    after: Ordering | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Rankings to train on and to evaluate on."""

    train: list[RankedExample]
    held_out: list[RankedExample]
    counts: RankingCounts


def load(path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> RewardConfig:
    """The configuration of a YAML file and overrides. Raises ValueError naming the key."""
    return load_config(RewardConfig, path, overrides, aliases=ALIASES)


def main(config: RewardConfig, say: Say = print) -> RewardResult:
    """Train a reward model as `config` says; `say` gets lines for people.

    Raises DataError, ModelFileError, ValueError and what `loop.run` raises.
    """
    if not config.data:
        raise ValueError("data is empty: name at least one file of rankings")
    refuse_used(config.loop.out, config.loop.resume)
    with distributed.process_group(config.device) as device:
        return _main(config, device, say if distributed.rank() == 0 else say_nothing)


def _main(config: RewardConfig, device: torch.device, say: Say) -> RewardResult:
    source = open_weights(resolve(config.model))
    encoder = ConversationEncoder(
        read_tokenizer(source), read_template(config.chat_template), literal=True
    )
    seq_len = choose_length(config.seq_len, source.config)
    data = read_data(config, encoder, seq_len)
    plan = choose(config, data.train, source.config.hidden_size)
    task = RewardTask(
        config, source, encoder, lr=plan.lr, margin=config.margin, center=config.center,
        device=device,
    )  # fmt: skip
    batches = ExampleBatches(
        data.train,
        batch_size=plan.batch_size,
        micro_tokens=plan.micro_tokens,
        seed=config.loop.seed,
        count=plan.examples,
        rank=distributed.rank(),
        world=distributed.world(),
        cut=ranking_batches,
        hash_of=fingerprint,
    )
    held_tokens = max([plan.micro_tokens, *(example.tokens for example in data.held_out)])
    lines = [*data.counts.lines(seq_len), *plan.lines()]
    task.set_data(batches, data.held_out, held_tokens, lines)
    return train(config, plan, task, say)


def train(config: RewardConfig, plan: Plan, task: RewardTask, say: Say) -> RewardResult:
    """The run itself, with the order of held-out pairs before and after."""
    before = task.held_out() if config.loop.resume == "none" else None
    result = run(task, config.loop_of(plan.steps), settings=to_dict(config))
    after = task.held_out()
    output = task.save_result(config.loop.out)
    if after is not None:
        for line in after.lines():
            say(line)
        if distributed.rank() == 0:
            write_evaluation(Path(config.loop.out), before, after)
            if config.loop.metrics.report:
                add_reliability(config, result.step, after, say)
    say(f"saved to {output}")
    return RewardResult(run=result, output=output, before=before, after=after)


def write_evaluation(out: Path, before: Ordering | None, after: Ordering) -> None:
    """`evaluation.json`: the order of held-out pairs before and after, with reliability bins."""
    values: dict[str, Any] = {"after": asdict(after)}
    if before is not None:
        values["before"] = asdict(before)
    (out / EVALUATION).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def add_reliability(config: RewardConfig, step: int, after: Ordering, say: Say) -> None:
    """Write the run's page again, with how often the model was right at each confidence."""
    out = Path(config.loop.out)
    last = {"step": step, "reliability": [asdict(b) for b in after.bins]}
    write_report(out, [*read(out / FILE), last], to_dict(config), say)


def choose(config: RewardConfig, examples: Sequence[RankedExample], hidden: int) -> Plan:
    """Fill in what the configuration leaves open, from the number of rankings.

    epochs: `few_epochs`. lr: as for fine-tuning. The rest: `make_plan`.
    """
    return make_plan(
        config,
        len(examples),
        max(example.tokens for example in examples),
        epochs=few_epochs(len(examples)) if config.epochs is None else config.epochs,
        batch_size=config.batch_size,
        lr=config.learning_rate(hidden),
        unit="rankings",
    )


def read_data(config: RewardConfig, encoder: ConversationEncoder, seq_len: int) -> Data:
    """Read, split and encode the rankings.

    Raises DataError naming file, record and field; ValueError for `holdout`.
    """
    rankings = list(read_rankings(config.data))
    if Path(config.holdout).exists():
        held = list(read_rankings([config.holdout]))[:MAX_HELD_OUT]
    else:
        rankings, held = split(rankings, config.holdout, config.loop.seed)
    train, counts = encode_rankings(rankings, encoder, seq_len)
    held_out = encode_rankings(held, encoder, seq_len)[0] if held else []
    return Data(train=train, held_out=held_out, counts=counts)
