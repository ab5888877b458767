"""`fastllm sft MODEL DATA...`: fine-tune a model on conversations."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import NumericalError
from .console import heading, note

if TYPE_CHECKING:
    from ..train.sft import SftConfig, SftResult

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


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    if {"-h", "--help"} & set(argv):
        print(help_text())
        return 0
    config = parse(argv)
    from ..train.sft import main

    try:
        result = main(config, say=note)
    except (NumericalError, OSError) as error:
        if "--debug" in sys.argv or isinstance(error, FileNotFoundError):
            raise
        note(f"fastllm: error: {error}")
        return 1
    if os.environ.get("RANK", "0") == "0":  # one of torchrun's processes speaks
        show(result)
    return 0


def parse(argv: Sequence[str]) -> SftConfig:
    """The configuration of a command line. Raises ValueError naming what does not fit."""
    from ..train.sft import load

    words = list(argv)
    named: list[str] = []
    while words and not words[0].startswith("-") and "=" not in words[0]:
        named.append(words.pop(0))
    path = None
    if "--config" in words:
        at = words.index("--config")
        if at + 1 == len(words):
            raise ValueError("--config needs a file")
        path = words[at + 1]
        del words[at : at + 2]
    given = [f"--model={named[0]}"] if named else []
    if len(named) > 1:
        given += ["--data", ",".join(named[1:])]
    if len(named) == 1 and path is None:
        raise ValueError(f"no data is given: {USAGE}")
    if not named and path is None:
        raise ValueError(f"a model and data, or --config, are needed: {USAGE}")
    return load(path, [*given, *words])


def show(result: SftResult) -> None:
    """Answers before and after."""
    for answer in result.answers:
        heading(f"> {answer.prompt}")
        if answer.before:
            print(f"before:   {_short(answer.before)}")
        print(f"after:    {_short(answer.after)}")
        print(f"the data: {_short(answer.expected)}")
    print(f"\n{result.run.status} after {result.run.step} steps: {result.output}")


def help_text() -> str:
    """The text of `fastllm sft --help`."""
    from ..train.config import describe
    from ..train.sft import ALIASES, SftConfig

    keys = [(f"--{key}", kind, default) for key, kind, default in describe(SftConfig)]
    width = max(len(name) for name, _, _ in keys)
    short = ", ".join(f"--{name} for --{key}" for name, key in ALIASES.items())
    return "\n".join(
        [
            f"usage: {USAGE}",
            DESCRIPTION,
            "keys (also of the YAML file, nested), types and defaults:",
            *(f"  {name:{width}}  {kind} = {default}" for name, kind, default in keys),
            "",
            *textwrap.wrap(f"short: {short}", 96),
            CHOICES,
            "examples:",
            *(f"  {line}" for line in EXAMPLES.strip().splitlines()),
        ]
    )


def _short(text: str, length: int = 400) -> str:
    text = text.strip()
    text = text if len(text) <= length else text[: length - 3] + "..."
    return text.replace("\n", "\n          ")
