"""What a distillation begins with: the student, its vocabulary beside the teacher's, data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastllm.models.decoder import Decoder
from fastllm.models.loader import save_pretrained
from fastllm.models.names import resolve
from fastllm.models.tokenizer import Tokenizer
from fastllm.models.trainable import initialize
from fastllm.models.weights import WeightSource
from fastllm.train import distributed, presets
from fastllm.train.checkpoint import newest_of
from fastllm.train.data.masks import ConversationEncoder, Example
from fastllm.train.distillation.config import NEW, DistillConfig
from fastllm.train.distillation.data import kind_of_all, read_store, read_texts
from fastllm.train.distillation.teacher import LiveTeacher, StoredTeacher
from fastllm.train.distillation.vocabulary import SharedVocabulary, shared_vocabulary
from fastllm.train.epochs import choose_length, read_template
from fastllm.train.sft import read_data

_CONTEXT = 2048  # of a new student of a stored teacher
_DTYPES = {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Examples to train on and to evaluate on; who goes with the model; what to say."""

    train: Sequence[Example]
    held_out: Sequence[Example]
    lines: tuple[str, ...]
    end_ids: Sequence[int]
    template: str | None


def student_path(config: DistillConfig, teacher: LiveTeacher | StoredTeacher) -> Path:
    """Where the student's weights are. A new one is made first: a Hugging Face directory `start` in
    the run's folder, with the teacher's tokenizer and vocabulary."""
    if config.model != NEW:
        return resolve(config.model)
    if config.store_top_k is not None:  # whoever learns from the store: only its data counts here
        return resolve(config.teacher.model)
    start = Path(config.loop.out) / "start"
    begun = newest_of(config.loop.out) is not None  # a run that must find it again
    fresh = config.loop.resume == "none" and not begun
    if distributed.rank() == 0 and (fresh or not start.exists()):
        save_pretrained(_new(config, teacher), start, teacher.tokenizer, overwrite=True)
    distributed.gather(None)  # nobody reads it before it is whole
    return start


def _new(config: DistillConfig, teacher: LiveTeacher | StoredTeacher) -> Decoder:
    """The model of random weights, with the teacher's context where it is known."""
    tokenizer = teacher.tokenizer
    context = config.student.context or teacher.longest or config.seq_len or _CONTEXT
    shape = presets.model_config(
        config.student,
        vocab_size=teacher.rows,
        bos=tokenizer.bos_token_id,
        eos=tuple(sorted(tokenizer.eos_token_ids)),
        context=context,
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
    config: DistillConfig, teacher: StoredTeacher, examples: Sequence[Example]
) -> None:
    """Raises ValueError or DataError unless the store fits the objective and the examples."""
    stored = teacher.store.temperature
    if config.objective.alpha > 0 and config.objective.temperature != stored:
        raise ValueError(
            f"temperature {config.objective.temperature:g} is not that of the stored "
            f"log-probabilities, {stored:g}: give --temperature {stored:g}, or store them again"
        )
    teacher.store.check(examples)


def read(config: DistillConfig, tokenizer: Tokenizer, seq_len: int) -> Data:
    """The examples of `config.data`. Raises DataError, FileNotFoundError, ValueError."""
    kind = kind_of_all(config.data)
    if kind == "conversations":
        template = read_template(config.chat_template)
        encoder = ConversationEncoder(tokenizer, template, loss=config.loss)
        found = read_data(config, encoder, seq_len)
        return Data(
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
    return Data(
        train=texts.train,
        held_out=texts.held_out,
        lines=texts.lines,
        end_ids=sorted(tokenizer.eos_token_ids),
        template=tokenizer.chat_template,
    )


def with_rate(
    config: DistillConfig, source: WeightSource, examples: Sequence[Example]
) -> DistillConfig:
    """A new student learns at the rate of pretraining, which its size and the tokens decide."""
    if config.model != NEW or config.lr is not None:
        return config
    size = presets.active_parameters(source.config)
    tokens = sum(len(example.ids) - 1 for example in examples) * (config.epochs or 1)
    budget = presets.budget(size, row=512, tokens=max(round(tokens), 1))
    return replace(config, lr=budget.lr * config.lr_multiplier)


def longest_document(
    config: DistillConfig, source: WeightSource, teacher: LiveTeacher | StoredTeacher
) -> int:
    """Tokens that both models can read. Raises ValueError if `config.seq_len` is beyond it."""
    seq_len = choose_length(config.seq_len, source.config)
    if teacher.longest is None or seq_len <= teacher.longest:
        return seq_len
    if config.seq_len is not None:
        raise ValueError(f"seq_len {seq_len} is beyond the teacher's context of {teacher.longest}")
    return teacher.longest
