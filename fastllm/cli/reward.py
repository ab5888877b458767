"""`fastllm reward MODEL DATA...`: train a reward model on rankings of answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .console import heading, table
from .training import Help, asks_for_help, parse, train

if TYPE_CHECKING:
    from ..train.reward import RewardResult

USAGE = "fastllm reward MODEL DATA [DATA...] [--config FILE] [--KEY VALUE...]"

DESCRIPTION = """
Learns which of several answers people prefer: a scalar head on any decoder gives each answer a
score, and of two answers the better one is to have the higher score. MODEL is a Hugging Face
directory, a GGUF file, a name, or an earlier reward model. DATA are .jsonl, .json or .parquet files
of rankings (`fastllm rank` makes them), or folders of them, in one of three forms:

  {"prompt": "...", "answers": ["...", "...", "...", "..."], "ranks": [2, 1, 3, 1]}
  {"messages": [{"role": "user", "content": "..."}, ...], "answers": [...], "ranks": [...]}
  {"prompt": "...", "chosen": "...", "rejected": "...", "margin": 1.0}

Rank 1 is the best. Two or more answers; answers of equal rank are not compared with each other, and
a ranking without any comparison is left out. Prompts and answers may be lists of messages; without
a prompt, chosen and rejected are whole conversations. margin may be absent. "truncated", a list of
true or false beside answers, marks those that were cut: they are scored without the token that ends
an answer. Special tokens that answers spell are read as characters.

The run's folder (--out) gets checkpoints, metrics.jsonl, a report, evaluation.json (order and
calibration of held-out pairs), and the result: adapter/ in PEFT's format, or with --method full
model/, which transformers' AutoModelForSequenceClassification loads.

exit status: 0 done or stopped, 1 the run failed (numbers that are none, a full disk), 2 bad input
"""

EXAMPLES = """
fastllm reward smollm2 rankings.jsonl --out runs/judge
fastllm reward ./SmolLM2-135M-Instruct rankings.jsonl --method full --center 0.01
fastllm rank smollm2 questions.jsonl --answers 4 --out rankings.jsonl
fastllm export smollm2 --adapter runs/judge/adapter --format hf --out judge
fastllm grpo smollm2 questions.jsonl --reward model:runs/judge/adapter
"""

CHOICES = """
What is none is chosen from the data and printed. epochs: 1, for fewer than 1,000 rankings up to 3.
batch_size: the power of two nearest to 0.4 sqrt(rankings), from 4 to 64. lr: 5e-5 (2000 /
hidden)^0.78, ten times that for adapters, times lr_multiplier. seq_len: 2,048 or the model's
context. holdout auto: 5% of 20 rankings or more.
"""

HELP = Help(usage=USAGE, description=DESCRIPTION, examples=EXAMPLES, choices=CHOICES)


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    from ..train.reward import ALIASES, RewardConfig, load, main

    if asks_for_help(argv):
        print(HELP.text(RewardConfig, ALIASES))
        return 0
    return train(main, parse(argv, load, USAGE), show)


def show(result: RewardResult) -> None:
    """How held-out pairs are ordered, and how sure the model may be believed to be."""
    after = result.after
    if after is not None:
        was = "" if result.before is None else f" ({100 * result.before.accuracy:.1f}% before)"
        heading(f"{after.pairs} held-out pairs")
        print(f"in the right order: {100 * after.accuracy:.1f}%{was}")
        print(f"mean margin: {after.margin:.3f}; calibration error: {100 * after.ece:.1f}%")
        rows = [
            [f"{100 * b.low:.0f}-{100 * b.high:.0f}%", b.pairs, f"{100 * b.confidence:.1f}%",
             f"{100 * b.accuracy:.1f}%"]
            for b in after.bins
        ]  # fmt: skip
        columns = ["confidence", "pairs", "said", "right"]
        table(columns, rows, right=columns[1:])
    print(f"\n{result.run.status} after {result.run.step} steps: {result.output}")
