"""The teacher of a distillation: a frozen model beside the student, or what one has said before.

Either gives, for rows of a micro batch, what `linear_kl` takes for a teacher: hidden states and a
head, or the most likely ids with their log-probabilities. Neither ever holds [tokens, vocab].
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fastllm.errors import ModelFileError
from fastllm.models.loader import load_model, read_tokenizer
from fastllm.models.names import resolve
from fastllm.models.quantization import check_quantization
from fastllm.models.tokenizer import Tokenizer
from fastllm.models.weights import open_weights
from fastllm.quantize.rule import FallbackWarning
from fastllm.train.data.batch import NO_LOSS, MicroBatch
from fastllm.train.data.masks import Example
from fastllm.train.distillation.top_k import TopKStore
from fastllm.train.distillation.vocabulary import narrowed


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """Who teaches, and how it is loaded.

    model: a GGUF file, a directory, a name or an id; or a directory of `--store-top-k`.
    quant: round its layers' matrices to this format as they are loaded (nf4, int4, q4_k, ...).
    activation: how inputs meet quantized weights. "auto" is inference's choice, int8 on a CPU: the
    fastest, and what the teacher computes with when it generates. Its log-probabilities are then
    off by what int8 inputs cost: 0.005 nats a token of KL for SmolLM2-135M in 4 bits. "bf16" and
    "fp32" compute as training does: a model is then at 0 from itself.
    """

    model: str = ""
    quant: str | None = None
    activation: Literal["auto", "int8", "bf16", "fp32"] = "auto"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"

    def __post_init__(self) -> None:
        if self.quant is not None:
            check_quantization(self.quant)


class Teacher(Protocol):
    """What a divergence is taken from."""

    tokenizer: Tokenizer
    rows: int  # of its head
    longest: int | None  # document; None: any that is stored

    def targets(
        self, micro: MicroBatch, examples: Sequence[Example] | None, size: int
    ) -> dict[str, Any]:
        """The teacher's arguments of `linear_kl` for the places of `micro` with a target.

        examples: those that `micro.sources` counts, None for tokens that are in no data set. size:
        ids that both vocabularies have.
        """

    def describe(self) -> str:
        """What it is, in a line."""


class LiveTeacher:
    """A frozen model, in whatever form its file has.

    Raises ModelFileError if it has no tokenizer: ids could not be compared with the student's.
    """

    def __init__(self, config: TeacherConfig, device: torch.device | str) -> None:
        source = open_weights(resolve(config.model))
        try:
            self.tokenizer = read_tokenizer(source)
        except ModelFileError as error:
            remedy = "A teacher needs its tokenizer beside the weights, to compare vocabularies"
            raise ModelFileError(error.file, error.field, error.problem, remedy) from error
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)  # `describe` says it
            self.decoder = load_model(
                source,
                None if config.dtype == "auto" else config.dtype,
                device,
                None if config.activation == "auto" else config.activation,
                quantization=config.quant,
            )
        self.decoder.requires_grad_(False)
        self.name = config.model
        self.rows = self.decoder.config.vocab_size
        self.longest: int | None = self.decoder.max_positions

    def describe(self) -> str:
        """Name, memory, activation mode."""
        report = self.decoder.quantization
        packed = "" if report is None else f", {report.summary()}"
        return (
            f"teacher: {self.name}, {self.decoder.nbytes / 1e6:,.0f} MB, activation "
            f"{self.decoder.activation}{packed}"
        )

    def hidden(self, micro: MicroBatch) -> Tensor:
        """Hidden states `[R, hidden]` of the R places with a target, from one forward pass."""
        with torch.no_grad():
            x = self.decoder.train_hidden(micro.documents)
            return x[micro.targets != NO_LOSS]

    def targets(
        self, micro: MicroBatch, examples: Sequence[Example] | None, size: int
    ) -> dict[str, Any]:
        """Hidden states and the head."""
        return {
            "teacher_x": self.hidden(micro),
            "teacher_weight": narrowed(self.decoder._head(), size),
            "teacher_activation": self.decoder.activation,
        }


class StoredTeacher:
    """The most likely ids of a teacher that `fastllm distill --store-top-k` has asked before."""

    def __init__(self, store: TopKStore) -> None:
        self.store = store
        self.tokenizer = Tokenizer.from_hf(store.directory)
        self.rows = store.vocab_size
        self.longest: int | None = None

    def describe(self) -> str:
        """Whose, and how much of it."""
        store = self.store
        return (
            f"teacher: the {store.k} likeliest ids of {store.teacher} at temperature "
            f"{store.temperature:g}, stored in {store.directory}"
        )

    def targets(
        self, micro: MicroBatch, examples: Sequence[Example] | None, size: int
    ) -> dict[str, Any]:
        """Ids and log-probabilities, looked up by the contents of the examples."""
        if examples is None:
            raise ValueError("a stored teacher knows the tokens of its data set alone")
        chosen = [examples[int(i)] for i in micro.sources[:, 0] if i >= 0]
        ids, logprobs = self.store.rows(chosen)
        device = micro.targets.device
        return {"teacher_ids": ids.to(device), "teacher_logprobs": logprobs.to(device)}


def open_teacher(config: TeacherConfig, device: torch.device | str) -> LiveTeacher | StoredTeacher:
    """A model, or a directory of stored log-probabilities. Raises what loading raises, ValueError
    for options that a stored one does not have."""
    if not TopKStore.is_at(config.model):
        return LiveTeacher(config, device)
    if config.quant is not None or (config.activation, config.dtype) != ("auto", "auto"):
        raise ValueError(f"{config.model} holds what a teacher has said: it is not loaded, and "
                         "takes no teacher.quant, activation or dtype")  # fmt: skip
    return StoredTeacher(TopKStore.open(config.model))
