"""The configuration of a distillation: who learns what from whom, in which of three ways."""

from __future__ import annotations

import os
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal

from fastllm.train.config import load_config
from fastllm.train.distillation.on_policy import OnPolicyConfig
from fastllm.train.distillation.sequences import SequencesConfig
from fastllm.train.distillation.task import LossConfig
from fastllm.train.distillation.teacher import TeacherConfig
from fastllm.train.loop_config import LoopConfig
from fastllm.train.presets import ShapeConfig
from fastllm.train.schedule import ScheduleConfig
from fastllm.train.sft import SftConfig
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
    vocabulary and context are the teacher's. samples: of mode sequences. Raises ValueError naming
    the field.
    """

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    mode: Literal["logits", "sequences", "on_policy"] = "logits"
    objective: LossConfig = field(default_factory=LossConfig)
    on_policy: OnPolicyConfig = field(default_factory=OnPolicyConfig)
    sequences: SequencesConfig = field(default_factory=SequencesConfig)
    task_count: int = 1000  # problems of a task, where data names tasks (arithmetic:2)
    student: ShapeConfig = field(default_factory=ShapeConfig)  # of model new
    store_top_k: int | None = None  # store so many of the teacher's likeliest ids, train nothing
    loop: LoopConfig = field(default_factory=_loop)

    def __post_init__(self) -> None:
        SftConfig.__post_init__(self)
        self.check_positive("store_top_k", "task_count")


def load(path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> DistillConfig:
    """The configuration of a YAML file and overrides. Raises ValueError naming the key."""
    return load_config(DistillConfig, path, overrides, derive=_derive, aliases=ALIASES)


def _derive(config: DistillConfig, given: Set[str]) -> dict[str, Any]:
    """A new student is trained in full. Answers of the student's own are drawn to the teacher by
    the reverse divergence, whose expectation is over just them."""
    values: dict[str, Any] = {"method": "full"} if config.model == NEW else {}
    if config.mode == "on_policy" and "objective.divergence" not in given:
        values["objective.divergence"] = "reverse"
    return values


def check(config: DistillConfig) -> None:
    """What a configuration needs before anything is loaded. Raises ValueError naming the field."""
    if not config.teacher.model:
        raise ValueError("teacher.model is not given: a model, or a directory of stored "
                         "log-probabilities (--teacher MODEL)")  # fmt: skip
    if not config.data:
        raise ValueError("data is empty: name a token store, or files of texts, conversations or "
                         "prompts")  # fmt: skip
    if config.model == NEW and config.method == "lora":
        raise ValueError("method lora adapts weights that are there: a new student needs full")
    if config.mode != "logits" and config.store_top_k is not None:
        raise ValueError(f"store_top_k belongs to mode logits, not {config.mode}")
    if config.mode == "on_policy" and config.objective.alpha < 1:
        raise ValueError(
            f"alpha must be 1 in mode on_policy, got {config.objective.alpha:g}: cross entropy "
            "would make the student's own answers likelier, right or wrong"
        )
