"""Direct preference optimization: learn from pairs of answers without reward model or rollouts.

    rankings -> pairs -> each answer a document by the chat template -> whole pairs packed
    loss = -log sigmoid(beta (log-ratio of the chosen answer - log-ratio of the rejected one))

A log-ratio is the answer's log-probability less the reference's: the model as it is given, whose
values are computed once at the start. An adapter is trained unless `method` is "full".
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastllm.models.loader import read_tokenizer
from fastllm.models.names import resolve
from fastllm.models.weights import open_weights
from fastllm.train import distributed
from fastllm.train.checkpoint import newest_of, refuse_used
from fastllm.train.config import load_config, to_dict
from fastllm.train.data.examples import ExampleBatches
from fastllm.train.data.masks import ConversationEncoder
from fastllm.train.data.rankings import read_rankings
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
from fastllm.train.preference.loss import PreferenceConfig
from fastllm.train.preference.pairs import (
    Pair,
    PairCounts,
    encode_pairs,
    fingerprint,
    pair_batches,
)
from fastllm.train.preference.task import DpoTask
from fastllm.train.tune_config import ALIASES as TUNE_ALIASES
from fastllm.train.tune_config import TuneConfig

ALIASES = {
    **TUNE_ALIASES,
    **{name: f"loss.{name}" for name in ("beta", "label_smoothing", "normalize")},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DpoConfig(TuneConfig):
    """What is learned from which pairs, and how. None: chosen from the data.

    Raises ValueError naming the field.
    """

    data: tuple[str, ...] = ()  # .jsonl, .json, .parquet files of pairs or rankings, or folders
    holdout: str = "auto"  # auto (5%), none, a share such as 0.1, or a file
    chat_template: str = "model"  # the model's own; chatml, plain, or a Jinja file
    loss: PreferenceConfig = field(default_factory=PreferenceConfig)
    seq_len: int | None = None  # the longest prompt and answer, in tokens
    epochs: float | None = None
    batch_size: int | None = None  # pairs of a step
    loop: LoopConfig = field(default_factory=lambda: epochs_loop("runs/dpo"))

    def __post_init__(self) -> None:
        TuneConfig.__post_init__(self)
        self.check_positive("epochs", "batch_size")
        if self.seq_len is not None and self.seq_len < 2:
            raise ValueError(f"seq_len must be at least 2, got {self.seq_len}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DpoResult:
    """How a run ended, where its model is, and what is measured of held-out pairs."""

    run: Result
    output: Path  # adapter or model directory
    before: Mapping[str, float] | None
    after: Mapping[str, float] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Pairs to train on and to evaluate on."""

    train: list[Pair]
    held_out: list[Pair]
    counts: PairCounts


def load(path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> DpoConfig:
    """The configuration of a YAML file and overrides. Raises ValueError naming the key."""
    return load_config(DpoConfig, path, overrides, aliases=ALIASES)


def main(config: DpoConfig, say: Say = print) -> DpoResult:
    """Train as `config` says; `say` gets lines for people.

    Raises DataError, ModelFileError, ValueError and what `loop.run` raises.
    """
    if not config.data:
        raise ValueError("data is empty: name at least one file of pairs or rankings")
    refuse_used(config.loop.out, config.loop.resume)
    with distributed.process_group(config.device) as device:
        return _main(config, device, say if distributed.rank() == 0 else say_nothing)


def _main(config: DpoConfig, device: torch.device, say: Say) -> DpoResult:
    source = open_weights(resolve(config.model))
    encoder = ConversationEncoder(read_tokenizer(source), read_template(config.chat_template))
    seq_len = choose_length(config.seq_len, source.config)
    data = read_data(config, encoder, seq_len)
    plan = choose(config, data.train, source.config.hidden_size)
    task = DpoTask(config, source, encoder, config.loss, lr=plan.lr, device=device)
    batches = ExampleBatches(
        data.train,
        batch_size=plan.batch_size,
        micro_tokens=plan.micro_tokens,
        seed=config.loop.seed,
        count=plan.examples,
        rank=distributed.rank(),
        world=distributed.world(),
        cut=pair_batches,
        hash_of=fingerprint,
    )
    lines = [*data.counts.lines(seq_len), *plan.lines()]
    task.set_data(batches, data.train, data.held_out, plan.micro_tokens, lines)
    return train(config, plan, task, say)


def train(config: DpoConfig, plan: Plan, task: DpoTask, say: Say) -> DpoResult:
    """The reference, then the run itself, with what held-out pairs say before and after."""
    out, resumes = Path(config.loop.out), config.loop.resume != "none"
    task.set_reference(out, say, resumed=resumes and newest_of(out) is not None)
    before = None if resumes else task.held_out()
    result = run(task, config.loop_of(plan.steps), settings=to_dict(config))
    after = task.held_out()
    output = task.save_result(out)
    if after is not None:
        say(
            f"held-out pairs: {100 * after['eval_rewards/accuracies']:.1f}% in order, margin "
            f"{after['eval_rewards/margins']:.3f}"
        )
    say(f"saved to {output}")
    return DpoResult(run=result, output=output, before=before, after=after)


def choose(config: DpoConfig, pairs: Sequence[Pair], hidden: int) -> Plan:
    """Fill in what the configuration leaves open, from the number of pairs.

    epochs: `few_epochs`. lr: a tenth of fine-tuning's: the loss rewards any distance between two
    answers, and a model that is pulled hard forgets how to give either. The rest: `make_plan`.
    """
    rate = config.learning_rate(hidden)
    return make_plan(
        config,
        len(pairs),
        max(pair.places for pair in pairs),
        epochs=few_epochs(len(pairs)) if config.epochs is None else config.epochs,
        batch_size=config.batch_size,
        lr=rate if config.lr is not None else rate / 10,
        unit="pairs",
    )


def read_data(config: DpoConfig, encoder: ConversationEncoder, seq_len: int) -> Data:
    """Read, split and encode; pairs of one ranking are on the same side.

    Raises DataError naming file, record and field; ValueError for `holdout`.
    """
    rankings = list(read_rankings(config.data))
    if Path(config.holdout).exists():
        held = list(read_rankings([config.holdout]))[:MAX_HELD_OUT]
    else:
        rankings, held = split(rankings, config.holdout, config.loop.seed)
    train, counts = encode_pairs(rankings, encoder, seq_len)
    held_out = encode_pairs(held, encoder, seq_len)[0] if held else []
    return Data(train=train, held_out=held_out, counts=counts)
