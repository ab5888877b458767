"""`fastllm dpo MODEL DATA...`: fine-tune a model on pairs of answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .training import Help, asks_for_help, parse, train

if TYPE_CHECKING:
    from ..train.dpo import DpoResult

USAGE = "fastllm dpo MODEL DATA [DATA...] [--config FILE] [--KEY VALUE...]"

DESCRIPTION = """
Direct preference optimization: makes chosen answers likelier and rejected ones less likely, beside
a fixed reference, the model as it is given (its adapter off, no second copy in memory). DATA are
.jsonl, .json or .parquet files, or folders of them:

  {"prompt": "...", "chosen": "...", "rejected": "..."}
  {"chosen": [{"role": "user", ...}, ...], "rejected": [...]}
  {"prompt": "...", "answers": ["...", ...], "ranks": [2, 1, 3]}     every two of different rank

"truncated", a list of true or false beside answers, marks those that were cut: their end is not
learned.

--loss.kind sigmoid (DPO), ipo or hinge; --beta, --label-smoothing (the share of labels taken to be
wrong), --normalize (means over an answer's tokens). Metrics have TRL's names: rewards/chosen,
rewards/rejected, rewards/accuracies, rewards/margins, logps/chosen, logps/rejected.

The run's folder (--out) gets checkpoints, metrics.jsonl, a loss curve, a report, and the result:
adapter/ in PEFT's format, or with --method full model/, a Hugging Face directory.

Ctrl-C or SIGTERM ends a run after the step in hand, with a checkpoint; --resume auto goes on.
exit status: 0 done or stopped, 1 the run failed (numbers that are none, a full disk), 2 bad input
"""

EXAMPLES = """
fastllm dpo smollm2 pairs.jsonl
fastllm dpo ./SmolLM2-135M-Instruct pairs.jsonl --beta 0.3 --out runs/preferred
fastllm dpo ./SmolLM2-135M-Instruct pairs.jsonl --method full --loss.kind ipo
fastllm dpo --config runs/preferred/config.yaml --resume auto
"""

CHOICES = """
What is none is chosen from the data and printed. epochs: 1, for fewer than 1,000 pairs up to 3.
batch_size: the power of two nearest to 0.4 sqrt(pairs), from 4 to 64. lr: a tenth of `fastllm
sft`'s. seq_len: 2,048 or the model's context; a pair with a longer answer is left out and counted.
"""

HELP = Help(usage=USAGE, description=DESCRIPTION, examples=EXAMPLES, choices=CHOICES)


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    from ..train.dpo import ALIASES, DpoConfig, load, main

    if asks_for_help(argv):
        print(HELP.text(DpoConfig, ALIASES))
        return 0
    return train(main, parse(argv, load, USAGE), show)


def show(result: DpoResult) -> None:
    """How held-out pairs are ordered, and where the result is."""
    if result.after is not None:
        for name, value in result.after.items():
            was = f" ({result.before[name]:.4f} before)" if result.before else ""
            print(f"{name.removeprefix('eval_'):20} {value:.4f}{was}")
    print(f"\n{result.run.status} after {result.run.step} steps: {result.output}")
