"""The run of mode sequences: the teacher answers, a reward chooses, the student is fine-tuned."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from fastllm.engine.llm import LLM
from fastllm.models.loader import read_tokenizer
from fastllm.models.names import resolve
from fastllm.models.weights import open_weights
from fastllm.train import sft
from fastllm.train.data.prompts import (
    EncodedPrompt,
    PromptRecord,
    encode_prompts,
    gather_columns,
    read_prompts,
)
from fastllm.train.distillation.config import NEW, DistillConfig
from fastllm.train.distillation.sequences import (
    SEQUENCES,
    Kept,
    ask,
    check_rewards,
    keep,
    write_sequences,
)
from fastllm.train.distillation.top_k import TopKStore
from fastllm.train.epochs import Say, read_template
from fastllm.train.rewards import resolve as resolve_rewards
from fastllm.train.sft import SftConfig, SftResult


@dataclass(frozen=True, kw_only=True, slots=True)
class SequencesResult:
    """What was kept of the teacher's answers, where it is, and the fine-tuning on it."""

    kept: Kept
    sequences: Path
    sft: SftResult


def on_sequences(config: DistillConfig, say: Say) -> SequencesResult:
    """Mode sequences. Raises what `fastllm.train.distill.main` does."""
    if config.model == NEW:
        raise ValueError("a new student knows no language yet: teach it by mode logits first")
    if TopKStore.is_at(config.teacher.model):
        raise ValueError("mode sequences lets the teacher answer: teacher.model must be a model")
    options, out = config.sequences, Path(config.loop.out)
    rewards = resolve_rewards(options.rewards) if options.rewards else []
    read_template(config.chat_template)  # a mistyped name is an error before the teacher answers
    read_tokenizer(open_weights(resolve(config.model)))
    records = read_prompts(config.data, task_count=config.task_count, seed=config.loop.seed)
    check_rewards(rewards, gather_columns(records))
    prompts = _encoded(config, records)
    answers = ask(
        lambda: _engine(config, prompts),
        prompts,
        options,
        out,
        settings=_settings(config, prompts),
        seed=config.loop.seed,
        say=say,
    )
    kept, counts = keep(answers, records, rewards, options)
    say(counts.line())
    path = out / SEQUENCES
    write_sequences(path, kept, records, plain=config.chat_template == "plain")
    return SequencesResult(
        kept=counts, sequences=path, sft=sft.main(_fine_tuning(config, path), say)
    )


def _encoded(config: DistillConfig, records: Sequence[PromptRecord]) -> list[EncodedPrompt]:
    """The prompts as the teacher reads them, by its own chat template.

    Raises DataError naming a prompt that does not fit into its context with an answer.
    """
    source = open_weights(resolve(config.teacher.model))
    tokenizer = read_tokenizer(source)
    context, answer = source.config.max_position_embeddings, config.sequences.max_completion
    if answer >= context:
        raise ValueError(
            f"sequences.max_completion {answer} fills the teacher's context of {context}"
        )
    return encode_prompts(records, tokenizer, max_tokens=context - answer)


def _engine(config: DistillConfig, prompts: Sequence[EncodedPrompt]) -> LLM:
    """The teacher, as long as the longest prompt needs."""
    teacher, options = config.teacher, config.sequences
    return LLM(
        teacher.model,
        dtype=None if teacher.dtype == "auto" else teacher.dtype,
        device=config.device,
        activation=None if teacher.activation == "auto" else teacher.activation,
        max_model_len=max(len(prompt.ids) for prompt in prompts) + options.max_completion,
        max_num_seqs=options.max_num_seqs,
        quantization=teacher.quant,
    )


def _settings(config: DistillConfig, prompts: Sequence[EncodedPrompt]) -> dict[str, Any]:
    """What the answers depend on."""
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        digest.update(json.dumps(prompt.ids).encode() + b"\n")
    options = config.sequences
    names = ("samples", "temperature", "top_p", "max_completion")
    return {
        "teacher": asdict(config.teacher),
        **{name: getattr(options, name) for name in names},
        "seed": config.loop.seed,
        "prompts": digest.hexdigest(),
    }


def _fine_tuning(config: DistillConfig, sequences: Path) -> SftConfig:
    """The student's fine-tuning, in the same folder."""
    values = {field.name: getattr(config, field.name) for field in fields(SftConfig)}
    form: Literal["prompt", "messages"] = (
        "prompt" if config.chat_template == "plain" else "messages"
    )
    return replace(SftConfig(**values), data=(str(sequences),), data_format=form)
