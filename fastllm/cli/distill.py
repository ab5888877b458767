"""`fastllm distill STUDENT DATA... --teacher TEACHER`: a student learns from a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .training import Help, asks_for_help, parse, train

if TYPE_CHECKING:
    from ..train.distill import DistillResult, SequencesResult, StoreResult

USAGE = "fastllm distill STUDENT DATA [DATA...] --teacher TEACHER [--KEY VALUE...]"

DESCRIPTION = """
--mode logits, the default: at every token of DATA (a token store, texts, or conversations, of which
the assistant's tokens count) the student's distribution is drawn to the teacher's.

  loss = alpha T^2 D(teacher, student at temperature T) + (1 - alpha) cross entropy

--divergence forward, reverse or js; T^2 keeps the gradient's size at every temperature (Hinton et
al., 2015). Student and teacher need one vocabulary, which is checked first.

STUDENT is a Hugging Face directory, a GGUF file (its quantized weights stay packed, an adapter
learns), a name, or `new`: random weights of the shape that --depth, --student.width, ... give, with
the teacher's vocabulary. TEACHER is any model file, frozen, --teacher-quant FORMAT rounds it as it
is loaded; or a folder that --store-top-k has written:

  fastllm distill STUDENT DATA --teacher BIG --store-top-k 64 --out answers
  fastllm distill STUDENT DATA --teacher answers

--mode sequences: TEACHER answers the prompts of DATA (files with prompt, question or messages, or
tasks such as arithmetic:2), --sequences.samples times each; answers whose rewards reach
--sequences.threshold are kept in OUT/sequences.jsonl, and STUDENT is fine-tuned on them as by
`fastllm sft`. The vocabularies may differ.

--mode on_policy: STUDENT answers the prompts of DATA, a --on_policy.student_share of them; the
divergence (reverse unless said otherwise) is taken at every token of those answers.

The run's folder (--out) gets checkpoints, metrics.jsonl, a loss curve, a report, and the result:
adapter/ in PEFT's format, or with --method full model/, a Hugging Face directory.

Ctrl-C or SIGTERM ends a run after the step in hand, with a checkpoint; --resume auto goes on, and
a store that was interrupted goes on where it ended. Mode logits runs under torchrun, the modes that
generate run in one process.
exit status: 0 done or stopped, 1 the run failed (numbers that are none, a full disk), 2 bad input
"""

EXAMPLES = """
fastllm distill new store --teacher smollm2 --depth 4
fastllm distill ./SmolLM2-135M chats.jsonl --teacher ./SmolLM2-1.7B-Instruct --method full
fastllm distill smollm2 chats.jsonl --teacher ./big --teacher-quant nf4 --divergence reverse
fastllm distill smollm2 gsm8k.jsonl --teacher ./big --mode sequences --sequences.samples 8
fastllm distill smollm2 chats.jsonl --teacher ./big --mode on_policy --steps 200
"""

CHOICES = """
What is none is chosen from the data, as `fastllm sft --help` says; a new student's rate is that of
pretraining. teacher.activation auto: int8 for quantized weights on a CPU, the compute dtype else.
"""

HELP = Help(usage=USAGE, description=DESCRIPTION, examples=EXAMPLES, choices=CHOICES)


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    from ..train.distill import ALIASES, DistillConfig, load, main

    if asks_for_help(argv):
        print(HELP.text(DistillConfig, ALIASES))
        return 0
    return train(main, parse(argv, load, USAGE), show)


def show(result: DistillResult | StoreResult | SequencesResult) -> None:
    """Where the result is."""
    from ..train.distill import SequencesResult, StoreResult

    if isinstance(result, SequencesResult):
        print(f"\n{result.kept.line()}: {result.sequences}")
        print(f"{result.sft.run.status} after {result.sft.run.step} steps: {result.sft.output}")
        return
    if isinstance(result, StoreResult):
        print(f"\nstored the answers to {result.examples} examples: {result.output}")
        return
    print(f"\n{result.run.status} after {result.run.step} steps: {result.output}")
