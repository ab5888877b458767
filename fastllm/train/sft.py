"""Supervised fine-tuning: learn the assistant's answers of conversations.

    conversations -> texts by the chat template -> examples with masks -> packed micro batches
    loss = cross entropy of the assistant's tokens, summed; the loop divides by their number

A low-rank adapter is trained unless `method` is "full": on a Hugging Face directory, or on a GGUF
file, whose quantized weights stay packed and frozen (QLoRA). With `quant` the weights of either are
quantized as they are loaded. What is left open is chosen from the data, see `choose`, and printed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

import torch

from fastllm.models.config import ModelConfig
from fastllm.models.loader import read_tokenizer
from fastllm.models.names import resolve
from fastllm.models.weights import open_weights
from fastllm.train import distributed
from fastllm.train.config import load_config, to_dict
from fastllm.train.data.conversations import Conversation, read_conversations
from fastllm.train.data.examples import Counts, ExampleBatches, check_masks, fit_examples
from fastllm.train.data.masks import TEMPLATES, ConversationEncoder, Example
from fastllm.train.data.order import permutation
from fastllm.train.loop import LoopConfig, Result, ScheduleConfig, run
from fastllm.train.sft_task import SftTask, question
from fastllm.train.tune_config import ALIASES, TuneConfig

MAX_HELD_OUT = 200  # conversations; more make evaluation slow and no steadier
Say = Callable[[str], None]
T = TypeVar("T")


def _loop() -> LoopConfig:
    return LoopConfig(
        out="runs/sft",
        steps=1_000_000_000,
        schedule=ScheduleConfig(kind="cosine", final=0.05),
        eval_every=100,
        save_every=200,
    )


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
    loop: LoopConfig = field(default_factory=_loop)

    def __post_init__(self) -> None:
        TuneConfig.__post_init__(self)
        self.check_positive("epochs", "batch_size")
        if self.seq_len is not None and self.seq_len < 2:
            raise ValueError(f"seq_len must be at least 2, got {self.seq_len}")
        if self.samples < 0:
            raise ValueError(f"samples must be at least 0, got {self.samples}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What `choose` has chosen, all values known."""

    epochs: float
    batch_size: int
    lr: float
    micro_tokens: int
    examples: int  # in all epochs
    steps: int

    def lines(self) -> list[str]:
        """A sentence."""
        return [
            f"{self.epochs:g} epochs in {self.steps} steps of {self.batch_size} conversations, "
            f"learning rate {self.lr:.2g}"
        ]


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
    with distributed.process_group(config.device) as device:
        return _main(config, device, say if distributed.rank() == 0 else _say_nothing)


def _main(config: SftConfig, device: torch.device, say: Say) -> SftResult:
    source = open_weights(resolve(config.model))
    tokenizer = read_tokenizer(source)
    encoder = ConversationEncoder(tokenizer, read_template(config.chat_template), loss=config.loss)
    seq_len = choose_length(config, source.config)
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
    result = run(task, loop_config(config, plan), settings=to_dict(config))
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


def loop_config(config: SftConfig, plan: Plan) -> LoopConfig:
    """The loop's configuration with the steps of the plan; `loop.steps` is the most."""
    steps = min(plan.steps, config.loop.steps)
    schedule = config.loop.schedule
    warmup = schedule.warmup or round(config.warmup * steps)
    return replace(config.loop, steps=steps, schedule=replace(schedule, warmup=warmup))


def choose(config: SftConfig, examples: Sequence[Example], hidden: int) -> Plan:
    """Fill in what the configuration leaves open, from the number of examples.

    epochs: 3; for few examples more, up to 10, until 1,000 are seen; for many fewer, so that 25,000
    are seen. batch_size: the power of two nearest to 0.4 sqrt(examples), from 4 to 64: some hundred
    steps for a thousand examples. lr: 5e-5 (2000 / hidden)^0.78, ten times that for adapters, as
    Schulman et al. fitted it over models ("LoRA without regret", 2025). micro_tokens: 2,048, or the
    longest example.
    """
    n = len(examples)
    epochs = config.epochs
    if epochs is None:
        epochs = max(round(min(1000 / n, 10)), 3) if n < 8333 else max(25_000 // n, 1)
    batch = config.batch_size
    if batch is None:
        batch = min(2 ** round(math.log2(min(max(0.4 * math.sqrt(n), 4), 64))), n)
    longest = max(len(example.ids) for example in examples) - 1
    total = max(round(n * epochs), 1)
    return Plan(
        epochs=epochs,
        batch_size=batch,
        lr=config.learning_rate(hidden),
        micro_tokens=max(config.micro_tokens or 2048, longest),
        examples=total,
        steps=math.ceil(total / batch),
    )


def choose_length(config: SftConfig, model: ModelConfig) -> int:
    """The longest example in tokens: 2,048 or the model's context. Raises ValueError beyond it."""
    most = model.max_position_embeddings
    if config.seq_len is None:
        return min(most, 2048)
    if config.seq_len > most:
        raise ValueError(f"seq_len {config.seq_len} is beyond the model's context of {most}")
    return config.seq_len


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


def split(conversations: list[T], holdout: str, seed: int) -> tuple[list[T], list[T]]:
    """(train, held out): `holdout` is "auto", "none" or a share.

    "auto" holds out 5% of 20 conversations or more. Raises ValueError for anything else.
    """
    n = len(conversations)
    if holdout == "auto":
        count = n // 20
    elif holdout == "none":
        count = 0
    else:
        try:
            share = float(holdout)
        except ValueError:
            share = math.nan
        if not 0 <= share < 1:
            raise ValueError(
                f"holdout must be auto, none, a share from 0 to below 1 or a file that exists, "
                f"got {holdout!r}"
            )
        count = min(math.ceil(share * n), n - 1)
    count = min(count, MAX_HELD_OUT)
    chosen = set(permutation(n, seed, -1)[:count].tolist())
    return (
        [c for i, c in enumerate(conversations) if i not in chosen],
        [conversations[i] for i in sorted(chosen)],
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


def _say_nothing(text: str) -> None:
    """What processes but the first say."""
