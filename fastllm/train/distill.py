"""Distillation: a student learns from a teacher, in one of three ways.

    logits     on texts or conversations the student's next-token distributions are drawn to the
               teacher's: a live one's, or its stored likeliest ids
    sequences  the teacher answers prompts, a reward keeps what is right, the student is fine-tuned
    on_policy  the student answers, the teacher's distributions at those very tokens draw it closer

The first and the last compare probabilities id by id, so that both models need one vocabulary; it
is checked before anything is trained. Full vocabularies are compared without `[tokens, vocab]`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from fastllm.models.loader import read_tokenizer, save_pretrained
from fastllm.models.names import resolve
from fastllm.models.tokenizer import Tokenizer
from fastllm.models.trainable import initialize
from fastllm.models.weights import WeightSource, open_weights
from fastllm.train import distributed, presets
from fastllm.train.config import load_config, to_dict
from fastllm.train.data.examples import ExampleBatches, fingerprint
from fastllm.train.data.masks import ConversationEncoder, Example
from fastllm.train.distillation.data import kind_of_all, read_store, read_texts
from fastllm.train.distillation.storing import store_top_k
from fastllm.train.distillation.task import DistillTask, LossConfig
from fastllm.train.distillation.teacher import (
    LiveTeacher,
    StoredTeacher,
    TeacherConfig,
    open_teacher,
)
from fastllm.train.distillation.vocabulary import SharedVocabulary, shared_vocabulary
from fastllm.train.loop import LoopConfig, Result, ScheduleConfig, run
from fastllm.train.presets import ShapeConfig
from fastllm.train.sft import (
    Plan,
    Say,
    SftConfig,
    choose,
    choose_length,
    loop_config,
    read_data,
    read_template,
)
from fastllm.train.tune_config import ALIASES as TUNE_ALIASES

NEW = "new"  # the name of a student of random weights
ALIASES = {
    **TUNE_ALIASES,
    "teacher": "teacher.model",
    "teacher_quant": "teacher.quant",
    "teacher_activation": "teacher.activation",
    **{name: f"objective.{name}" for name in ("divergence", "beta", "temperature", "alpha")},
    "preset": "student.preset",
    "depth": "student.depth",
}
_DTYPES = {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def _loop() -> LoopConfig:
    return LoopConfig(
        out="runs/distill",
        steps=1_000_000_000,
        schedule=ScheduleConfig(kind="cosine", final=0.05),
        eval_every=100,
        save_every=200,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig(SftConfig):
    """Who learns what from whom. None: chosen from the data.

    model: the student; "new" is one of random weights, whose shape `student` gives and whose
    vocabulary and context are the teacher's. Raises ValueError naming the field.
    """

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    mode: Literal["logits", "sequences", "on_policy"] = "logits"
    objective: LossConfig = field(default_factory=LossConfig)
    student: ShapeConfig = field(default_factory=ShapeConfig)  # of model new
    store_top_k: int | None = None  # store so many of the teacher's likeliest ids, train nothing
    loop: LoopConfig = field(default_factory=_loop)

    def __post_init__(self) -> None:
        SftConfig.__post_init__(self)
        self.check_positive("store_top_k")


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillResult:
    """How a run ended, and where its model is. before, after: (forward KL from the teacher, cross
    entropy) per held-out token."""

    run: Result
    output: Path  # adapter or model directory
    before: tuple[float, float] | None
    after: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreResult:
    """What `store_top_k` has written, and of how many examples."""

    output: Path
    examples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Data:
    """Examples to train on and to evaluate on; who goes with the model; what to say."""

    train: Sequence[Example]
    held_out: Sequence[Example]
    lines: tuple[str, ...]
    end_ids: Sequence[int]
    template: str | None


def load(path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> DistillConfig:
    """The configuration of a YAML file and overrides. Raises ValueError naming the key."""
    return load_config(DistillConfig, path, overrides, derive=_derive, aliases=ALIASES)


def _derive(config: DistillConfig, given: Set[str]) -> dict[str, Any]:
    """A new student is trained in full."""
    return {"method": "full"} if config.model == NEW else {}


def main(config: DistillConfig, say: Say = print) -> DistillResult | StoreResult:
    """Distill as `config` says; `say` gets lines for people.

    Raises DataError, ModelFileError, ValueError and what `loop.run` raises.
    """
    check(config)
    with distributed.process_group(config.device) as device:
        return _main(config, device, say if distributed.rank() == 0 else _say_nothing)


def check(config: DistillConfig) -> None:
    """What a configuration needs before anything is loaded. Raises ValueError naming the field."""
    if not config.teacher.model:
        raise ValueError("teacher.model is not given: a model, or a directory of stored "
                         "log-probabilities (--teacher MODEL)")  # fmt: skip
    if not config.data:
        raise ValueError("data is empty: name a token store, or files of texts or conversations")
    if config.model == NEW and config.method == "lora":
        raise ValueError("method lora adapts weights that are there: a new student needs full")


def _main(config: DistillConfig, device: torch.device, say: Say) -> DistillResult | StoreResult:
    teacher = open_teacher(config.teacher, device)
    source = open_weights(student_path(config, teacher))
    tokenizer = read_tokenizer(source)
    shared = check_vocabularies(tokenizer, source, teacher)
    seq_len = choose_length(config, source.config)
    if teacher.longest is not None:
        seq_len = min(seq_len, teacher.longest)
    data = read(config, tokenizer, seq_len)
    if config.store_top_k is not None:
        return _store(config, teacher, data, shared, say)
    if isinstance(teacher, StoredTeacher):
        check_stored(config, teacher, shared, [*data.train, *data.held_out])
    plan = choose(_with_rate(config, source, data.train), data.train, source.config.hidden_size)
    task = DistillTask(
        config, source, tokenizer, teacher, config.objective, shared,
        lr=plan.lr, end_ids=data.end_ids, template=data.template, device=device,
    )  # fmt: skip
    batches = ExampleBatches(
        data.train,
        batch_size=plan.batch_size,
        micro_tokens=plan.micro_tokens,
        seed=config.loop.seed,
        count=plan.examples,
        rank=distributed.rank(),
        world=distributed.world(),
    )
    lines = [*data.lines, *plan.lines()]
    task.set_data(batches, data.train, data.held_out, plan.micro_tokens, lines)
    return train(config, plan, task, say)


def train(config: DistillConfig, plan: Plan, task: DistillTask, say: Say) -> DistillResult:
    """The run itself, with what held-out tokens say before and after."""
    before = task.held_out_losses() if config.loop.resume == "none" else None
    result = run(task, loop_config(config, plan), settings=to_dict(config))
    after = task.held_out_losses()
    output = task.save_result(config.loop.out)
    if before is not None and after is not None:
        say(
            f"held-out KL from the teacher: {before[0]:.4f} before, {after[0]:.4f} after; cross "
            f"entropy: {before[1]:.4f} before, {after[1]:.4f} after"
        )
    say(f"saved to {output}")
    return DistillResult(run=result, output=output, before=before, after=after)


def student_path(config: DistillConfig, teacher: LiveTeacher | StoredTeacher) -> Path:
    """Where the student's weights are. A new one is made first: a Hugging Face directory `start` in
    the run's folder, with the teacher's tokenizer, vocabulary and context.

    Raises ValueError for a new student of a teacher that is not there.
    """
    if config.model != NEW:
        return resolve(config.model)
    if isinstance(teacher, StoredTeacher):
        raise ValueError("a new student takes vocabulary and context of a live teacher: make it "
                         "first, from the model that was stored")  # fmt: skip
    start = Path(config.loop.out) / "start"
    if distributed.rank() == 0 and not start.exists():
        save_pretrained(_new(config, teacher), start, teacher.tokenizer)
    distributed.gather(None)  # nobody reads it before it is whole
    return start


def _new(config: DistillConfig, teacher: LiveTeacher) -> Any:
    """The model of random weights."""
    its = teacher.decoder.config
    shape = presets.model_config(
        config.student,
        vocab_size=its.vocab_size,
        bos=its.bos_token_id,
        eos=its.eos_token_ids,
        context=config.student.context or its.max_position_embeddings,
    )
    dtype = _DTYPES[config.dtype]
    return initialize(replace(shape, dtype=dtype), dtype=dtype, seed=config.loop.seed)


def check_vocabularies(
    tokenizer: Tokenizer, source: WeightSource, teacher: LiveTeacher | StoredTeacher
) -> SharedVocabulary:
    """What both vocabularies share. Raises ValueError where they differ."""
    rows = source.config.vocab_size
    shared = shared_vocabulary(tokenizer, teacher.tokenizer, rows, teacher.rows)
    if isinstance(teacher, StoredTeacher) and shared.size < teacher.rows:
        raise ValueError(
            f"{teacher.store.directory} holds probabilities over {teacher.rows} ids, and the "
            f"student's head has {rows} rows: store them again for this student"
        )
    return shared


def check_stored(
    config: DistillConfig,
    teacher: StoredTeacher,
    shared: SharedVocabulary,
    examples: Sequence[Example],
) -> None:
    """Raises ValueError or DataError unless the store fits the objective and the examples."""
    stored = teacher.store.temperature
    if config.objective.alpha > 0 and config.objective.temperature != stored:
        raise ValueError(
            f"temperature {config.objective.temperature:g} is not that of the stored "
            f"log-probabilities, {stored:g}: give --temperature {stored:g}, or store them again"
        )
    teacher.store.check(examples)


def read(config: DistillConfig, tokenizer: Tokenizer, seq_len: int) -> _Data:
    """The examples of `config.data`. Raises DataError, FileNotFoundError, ValueError."""
    kind = kind_of_all(config.data)
    if kind == "conversations":
        template = read_template(config.chat_template)
        encoder = ConversationEncoder(tokenizer, template, loss=config.loss)
        found = read_data(config, encoder, seq_len)
        return _Data(
            train=found.train,
            held_out=found.held_out,
            lines=tuple(found.counts.lines(seq_len)),
            end_ids=sorted(encoder.end_ids),
            template=encoder.template.source,
        )
    if kind == "store":
        texts = read_store(config.data[0], tokenizer, seq_len)
    else:
        texts = read_texts(config.data, tokenizer, seq_len, config.holdout, config.loop.seed)
    return _Data(
        train=texts.train,
        held_out=texts.held_out,
        lines=texts.lines,
        end_ids=sorted(tokenizer.eos_token_ids),
        template=tokenizer.chat_template,
    )


def _with_rate(
    config: DistillConfig, source: WeightSource, examples: Sequence[Example]
) -> DistillConfig:
    """A new student learns at the rate of pretraining, which its size and the tokens decide."""
    if config.model != NEW or config.lr is not None:
        return config
    size = presets.active_parameters(source.config)
    tokens = sum(len(example.ids) - 1 for example in examples) * (config.epochs or 1)
    budget = presets.budget(size, row=512, tokens=max(round(tokens), 1))
    return replace(config, lr=budget.lr * config.lr_multiplier)


def _store(
    config: DistillConfig,
    teacher: LiveTeacher | StoredTeacher,
    data: _Data,
    shared: SharedVocabulary,
    say: Say,
) -> StoreResult:
    """Write the teacher's likeliest ids of the data set to the run's folder."""
    assert config.store_top_k is not None
    if isinstance(teacher, StoredTeacher):
        raise ValueError("store_top_k asks a live teacher: teacher.model is a store already")
    if distributed.world() > 1:
        raise ValueError("store_top_k runs in one process: start it without torchrun, the runs "
                         "that read the store may have several")  # fmt: skip
    say(teacher.describe())
    for line in (*shared.notes, *data.lines):
        say(line)
    examples = [*data.train, *data.held_out]
    store_top_k(
        teacher,
        examples,
        config.loop.out,
        k=config.store_top_k,
        temperature=config.objective.temperature,
        vocab_size=shared.size,
        data=fingerprint(examples),
        micro_tokens=config.micro_tokens or 2048,
        say=say,
    )
    say(f"stored in {config.loop.out}; learn from it with --teacher {config.loop.out}")
    return StoreResult(output=Path(config.loop.out), examples=len(examples))


def _say_nothing(text: str) -> None:
    """What processes but the first say."""
