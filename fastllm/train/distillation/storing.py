"""Asks a teacher for its likeliest ids at every learned token of a data set, and stores them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastllm.train import distributed
from fastllm.train.data.examples import micro_batches
from fastllm.train.data.masks import Example
from fastllm.train.distillation.teacher import LiveTeacher
from fastllm.train.distillation.top_k import Say, StoreSettings, TopKWriter, learned

_LOGITS = 1 << 23  # values of a chunk of logits: 32 MB


def store_top_k(
    teacher: LiveTeacher,
    examples: Sequence[Example],
    out: str | os.PathLike[str],
    *,
    k: int,
    temperature: float,
    vocab_size: int,
    data: str,
    micro_tokens: int,
    say: Say,
) -> None:
    """Write, or go on writing, the store `out`.

    k: ids of a token. temperature: of the log-probabilities. vocab_size: ids that they are over.
    data: names the examples. micro_tokens: that go through the teacher at once.
    Raises ValueError for k, DataError if `out` holds another store, BlockingIOError if another
    process writes it.
    """
    if not 1 <= k <= vocab_size:
        raise ValueError(f"store_top_k must be from 1 to {vocab_size}, got {k}")
    settings = StoreSettings(
        teacher=teacher.name, k=k, temperature=float(temperature), vocab_size=vocab_size, data=data
    )

    def rows(part: Sequence[Example]) -> tuple[Tensor, Tensor]:
        return top_k_of(teacher, part, k, temperature, vocab_size, micro_tokens)

    with distributed.only_run_in(Path(out)):
        TopKWriter(out, settings, teacher.tokenizer).write(examples, rows, say)


@torch.no_grad()
def top_k_of(
    teacher: LiveTeacher,
    examples: Sequence[Example],
    k: int,
    temperature: float,
    vocab_size: int,
    micro_tokens: int,
) -> tuple[Tensor, Tensor]:
    """(ids int32, log-probabilities float32) `[learned tokens of the examples, k]`, in order."""
    longest = max(len(example.ids) - 1 for example in examples)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for micro in micro_batches(examples, range(len(examples)), max(micro_tokens, longest)):
        x = teacher.hidden(micro.to(teacher.decoder.device))
        step = max(_LOGITS // teacher.rows, 1)
        chunks = [_likeliest(teacher, part, k, temperature, vocab_size) for part in x.split(step)]
        ids, logprobs = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        numbers = micro.sources[:, 0].tolist()
        counts = [learned(examples[number]) for number in numbers]
        found |= dict(
            zip(numbers, zip(ids.split(counts), logprobs.split(counts), strict=True), strict=True)
        )
    ordered = [found[number] for number in range(len(examples))]
    return torch.cat([ids for ids, _ in ordered]), torch.cat([logprobs for _, logprobs in ordered])


def _likeliest(
    teacher: LiveTeacher, x: Tensor, k: int, temperature: float, vocab_size: int
) -> tuple[Tensor, Tensor]:
    logits = teacher.decoder.logits(x)[:, :vocab_size] * (1 / temperature)
    values, ids = logits.topk(k, dim=1)
    logprobs = values - torch.logsumexp(logits, 1, keepdim=True)
    return ids.to("cpu", torch.int32), logprobs.cpu()
