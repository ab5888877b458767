"""`fastllm sft MODEL DATA...`: fine-tune a model on conversations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .console import heading
from .training import Help, asks_for_help, parse, train

if TYPE_CHECKING:
    from ..train.sft import SftResult

USAGE = "fastllm sft MODEL DATA [DATA...] [--config FILE] [--KEY VALUE...]"

DESCRIPTION = """
Learns the assistant's answers of conversations. MODEL is a Hugging Face directory, a GGUF file
(its quantized weights stay packed, an adapter learns), or a name. --quant FORMAT (nf4, int4, q4_k,
int8, fp8, ...) rounds the weights of layers and experts as they are loaded, one at a time; the same
--quant then goes with the adapter. DATA are .jsonl, .json or .parquet files, or folders of them, in
one of four forms:

  {"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}
  {"prompt": "...", "completion": "..."}
  {"instruction": "...", "input": "...", "output": "..."}
  {"conversations": [{"from": "human", "value": "..."}, ...]}

The run's folder (--out) gets checkpoints, metrics.jsonl, a loss curve, a report, and the result:
adapter/ in PEFT's format, or with --method full model/, a Hugging Face directory.

Ctrl-C or SIGTERM ends a run after the step in hand, with a checkpoint; --resume auto goes on.
exit status: 0 done or stopped, 1 the run failed (numbers that are none, a full disk), 2 bad input
"""

EXAMPLES = """
fastllm sft smollm2 chats.jsonl
fastllm sft smollm2 chats.jsonl --epochs 2 --rank 8 --out runs/polite
fastllm sft ./SmolLM2-135M-Instruct chats.jsonl --method full --lr 1e-4
fastllm sft ./SmolLM2-135M-Instruct chats.jsonl --quant nf4 --out runs/small
fastllm chat ./SmolLM2-135M-Instruct --quant nf4 --adapter runs/small/adapter
fastllm sft --config runs/polite/config.yaml --resume auto
fastllm chat smollm2 --adapter runs/polite/adapter
"""

CHOICES = """
What is none is chosen from the data and printed. epochs: 3; for few examples more, up to 10, until
1,000 are seen; for many fewer, so that 25,000 are seen. batch_size: the power of two nearest to
0.4 sqrt(examples), from 4 to 64. lr: 5e-5 (2000 / hidden)^0.78, ten times that for adapters, times
lr_multiplier. seq_len: 2,048 or the model's context. holdout auto: 5% of 20 conversations or more.
"""


HELP = Help(usage=USAGE, description=DESCRIPTION, examples=EXAMPLES, choices=CHOICES)


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    from ..train.sft import ALIASES, SftConfig, load, main

    if asks_for_help(argv):
        print(HELP.text(SftConfig, ALIASES))
        return 0
    return train(main, parse(argv, load, USAGE), show)


def show(result: SftResult) -> None:
    """Answers before and after."""
    for answer in result.answers:
        heading(f"> {answer.prompt}")
        if answer.before:
            print(f"before:   {_short(answer.before)}")
        print(f"after:    {_short(answer.after)}")
        print(f"the data: {_short(answer.expected)}")
    print(f"\n{result.run.status} after {result.run.step} steps: {result.output}")


def _short(text: str, length: int = 400) -> str:
    text = text.strip()
    text = text if len(text) <= length else text[: length - 3] + "..."
    return text.replace("\n", "\n          ")
