"""Supervised fine-tuning: learn the assistant's answers of conversations.

    conversations -> texts by the chat template -> examples with masks -> packed micro batches
    loss = cross entropy of the assistant's tokens, summed; the loop divides by their number

A low-rank adapter is trained unless `method` is "full": on a Hugging Face directory, or on a GGUF
file, whose quantized weights stay packed and frozen (QLoRA). With `quant` the weights of either are
quantized as they are loaded. What is left open is chosen from the data, see `choose`, and printed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from fastllm.models.loader import read_tokenizer
from fastllm.models.names import resolve
from fastllm.models.weights import open_weights
from fastllm.train import distributed
from fastllm.train.checkpoint import refuse_used
from fastllm.train.config import load_config, to_dict
from fastllm.train.data.conversations import Conversation, read_conversations
from fastllm.train.data.examples import Counts, ExampleBatches, check_masks, fit_examples
from fastllm.train.data.masks import ConversationEncoder, Example
from fastllm.train.epochs import (
    MAX_HELD_OUT,
    Plan,
    Say,
    choose_length,
    epochs_loop,
    make_plan,
    read_template,
    say_nothing,
    split,
)
from fastllm.train.loop import LoopConfig, Result, run
from fastllm.train.sft_task import SftTask, question
from fastllm.train.tune_config import ALIASES, TuneConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class SftConfig(TuneConfig):
    """What is learned from what, and how. None: chosen from the data.

    Raises ValueError naming the field.
    """

    data: tuple[str, ...] = ()  # .jsonl, .json, .parquet files, or folders of them
    data_format: Literal["auto", "messages", "prompt", "alpaca", "sharegpt"] = "auto"
    holdout: str = "auto"  # auto (5%), none, a share such as 0.1, or a file
    chat_template: str = "model"  # the model's own; chatml, plain, or a Jinja file
    loss: Literal["assistant", "all"] = "assistant"
    seq_len: int | None = None  # the longest conversation, in tokens
    overlong: Literal["truncate", "drop"] = "truncate"
    epochs: float | None = None
    batch_size: int | None = None  # conversations of a step
    samples: int = 2  # held-out questions that are answered before and after
    loop: LoopConfig = field(default_factory=lambda: epochs_loop("runs/sft"))

    def __post_init__(self) -> None:
        TuneConfig.__post_init__(self)
        self.check_positive("epochs", "batch_size")
        if self.seq_len is not None and self.seq_len < 2:
            raise ValueError(f"seq_len must be at least 2, got {self.seq_len}")
        if self.samples < 0:
            raise ValueError(f"samples must be at least 0, got {self.samples}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One question, what the data answers, and the model before and after."""

    prompt: str
    expected: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SftResult:
    """How a run ended, and where its model is."""

    run: Result
    output: Path  # adapter or model directory
    loss_before: float | None  # on the held-out conversations, per token
    loss_after: float | None
    answers: list[Answer]


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Examples to train on and to evaluate on, and conversations to ask."""

    train: list[Example]
    held_out: list[Example]
    asked: list[Conversation]
    counts: Counts


def load(path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> SftConfig:
    """The configuration of a YAML file and overrides. Raises ValueError naming the key."""
    return load_config(SftConfig, path, overrides, aliases=ALIASES)


def main(config: SftConfig, say: Say = print) -> SftResult:
    """Fine-tune as `config` says; `say` gets lines for people.

    Raises DataError, ModelFileError, ValueError and what `loop.run` raises.
    """
    if not config.data:
        raise ValueError("data is empty: name at least one file of conversations")
    refuse_used(config.loop.out, config.loop.resume)
    with distributed.process_group(config.device) as device:
        return _main(config, device, say if distributed.rank() == 0 else say_nothing)


def _main(config: SftConfig, device: torch.device, say: Say) -> SftResult:
    source = open_weights(resolve(config.model))
    tokenizer = read_tokenizer(source)
    encoder = ConversationEncoder(tokenizer, read_template(config.chat_template), loss=config.loss)
    seq_len = choose_length(config.seq_len, source.config)
    data = read_data(config, encoder, seq_len)
    plan = choose(config, data.train, source.config.hidden_size)
    task = SftTask(config, source, encoder, lr=plan.lr, device=device)
    task.set_data(
        ExampleBatches(
            data.train,
            batch_size=plan.batch_size,
            micro_tokens=plan.micro_tokens,
            seed=config.loop.seed,
            count=plan.examples,
            rank=distributed.rank(),
            world=distributed.world(),
        ),
        data.held_out,
        plan.micro_tokens,
        data.asked[: config.samples],
        [*data.counts.lines(seq_len), *plan.lines()],
    )
    return train(config, plan, task, say)


def train(config: SftConfig, plan: Plan, task: SftTask, say: Say) -> SftResult:
    """The run itself: evaluation and answers before, the loop, and after."""
    loss_before, before = None, []
    if config.loop.resume == "none":
        loss_before = task.held_out_loss()
        before = task.answers()
    result = run(task, config.loop_of(plan.steps), settings=to_dict(config))
    loss_after = task.held_out_loss()
    after = task.answers()
    output = task.save_result(config.loop.out)
    if loss_after is not None and loss_before is not None:
        say(f"loss on held-out conversations: {loss_before:.4f} before, {loss_after:.4f} after")
    say(f"saved to {output}")
    answers = [
        Answer(prompt=prompt, expected=expected, before=was, after=now)
        for (prompt, expected), was, now in zip(
            map(question, task.asked), before or [""] * len(after), after, strict=True
        )
    ]
    return SftResult(
        run=result, output=output, loss_before=loss_before, loss_after=loss_after, answers=answers
    )


def choose(config: SftConfig, examples: Sequence[Example], hidden: int) -> Plan:
    """Fill in what the configuration leaves open, from the number of examples.

    epochs: 3; for few examples more, up to 10, until 1,000 are seen; for many fewer, so that 25,000
    are seen. lr: `TuneConfig.learning_rate`. The rest: `make_plan`.
    """
    n = len(examples)
    epochs = config.epochs
    if epochs is None:
        epochs = max(round(min(1000 / n, 10)), 3) if n < 8333 else max(25_000 // n, 1)
    return make_plan(
        config,
        n,
        max(len(example.ids) for example in examples) - 1,
        epochs=epochs,
        batch_size=config.batch_size,
        lr=config.learning_rate(hidden),
        unit="conversations",
    )


def read_data(config: SftConfig, encoder: ConversationEncoder, seq_len: int) -> Data:
    """Read, split and encode the conversations.

    Raises DataError naming file, record and field; ValueError for `holdout`.
    """
    form = None if config.data_format == "auto" else config.data_format
    conversations = list(read_conversations(config.data, form))
    held: list[Conversation] = []
    if Path(config.holdout).exists():
        held = list(read_conversations([config.holdout], form))[:MAX_HELD_OUT]
    else:
        conversations, held = split(conversations, config.holdout, config.loop.seed)
    train, counts = fit_examples(encoder.encode(conversations), seq_len, config.overlong)
    if config.loss == "assistant":
        check_masks(train)
    held_out = fit_examples(encoder.encode(held), seq_len, config.overlong)[0] if held else []
    asked = [c for c in held or conversations if any(c.answers)]
    return Data(train=train, held_out=held_out, asked=asked, counts=counts)
