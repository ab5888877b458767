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

from fastllm.train import distributed
from fastllm.train.checkpoint import refuse_used
from fastllm.train.distillation.config import ALIASES, DistillConfig, check, load
from fastllm.train.distillation.runs import DistillResult, StoreResult, on_data, on_own_answers
from fastllm.train.distillation.teaching import SequencesResult, on_sequences
from fastllm.train.epochs import Say, say_nothing

__all__ = [
    "ALIASES",
    "DistillConfig",
    "DistillResult",
    "SequencesResult",
    "StoreResult",
    "load",
    "main",
]


def main(config: DistillConfig, say: Say = print) -> DistillResult | StoreResult | SequencesResult:
    """Distill as `config` says; `say` gets lines for people.

    Raises DataError, ModelFileError, RewardError, ValueError and what `loop.run` raises.
    """
    check(config)
    if config.mode != "logits" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"mode {config.mode} generates in the one process that trains: start it without "
            "torchrun, with all cores (OMP_NUM_THREADS) or one GPU. (What mode sequences has "
            "written, sequences.jsonl, `fastllm sft` learns in any number of processes)"
        )
    if config.store_top_k is None:
        refuse_used(config.loop.out, config.loop.resume)
    if config.mode == "sequences":
        return on_sequences(config, say)
    with distributed.process_group(config.device) as device:
        mine = say if distributed.rank() == 0 else say_nothing
        if config.mode == "on_policy":
            return on_own_answers(config, device, mine)
        return on_data(config, device, mine)
