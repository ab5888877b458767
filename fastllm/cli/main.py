"""The `fastllm` command: picks a subcommand's module and turns expected errors into one line.

Nothing heavy is imported before a subcommand is known, so `fastllm --help` takes milliseconds.
A subcommand is a module of this package with `run(argv) -> exit status`.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from ..errors import FastLLMError, did_you_mean

# command -> what it does, in the order of `fastllm --help`: as the life of a model goes
COMMANDS = {
    "tokenizer": "train a tokenizer, or measure one on files",
    "data": "turn text into a token store; show what a batch holds; make problems",
    "pretrain": "train a model from random weights on a token store",
    "sft": "fine-tune a model on conversations",
    "rank": "rank the answers of a model, for a reward model",
    "reward": "train a reward model on rankings of answers",
    "ppo": "let a model learn from rewards, with a critic",
    "grpo": "let a model learn from rewards of its own samples: GRPO, DAPO, RLOO, ...",
    "dpo": "fine-tune a model on pairs of answers",
    "distill": "let a student learn from a teacher",
    "generate": "answer prompts",
    "chat": "talk with a model",
    "eval": "measure how well a model predicts text, solves problems and chooses answers",
    "export": "write a model as GGUF or for Hugging Face, adapters merged",
    "quantize": "write a model in fewer bits, calibrated on text",
    "models": "list the model names that resolve on this machine",
    "inspect": "show what a model file holds: metadata, tensors, formats, memory",
    "doctor": "show hardware, libraries and the backend table, and test every op",
    "verify": "compare a model in transformers with itself on our kernels, and time both",
    "bench": "measure fastllm beside PyTorch, transformers and llama.cpp",
    "demo": "a model's whole life in 20 minutes: trained, tuned, rewarded, distilled, quantized",
}

EXPECTED = (FastLLMError, ValueError, OSError, ModuleNotFoundError)


def overview() -> str:
    """The text of `fastllm --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fastllm COMMAND [ARGUMENTS]",
            "",
            "One set of CPU and GPU kernels under the whole life of a language model.",
            "",
            "commands:",
            *lines,
            "",
            "fastllm COMMAND --help describes a command and gives examples.",
            "--debug after any command shows the traceback of an error; --version the version.",
            "",
            "examples:",
            "  fastllm doctor",
            "  fastllm generate smollm2 --chat 'Name three primary colors.'",
            "  fastllm chat smollm2",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0, 1 (a check failed), 2 (bad input) or 130 (Ctrl-C).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        from .. import __version__

        print(__version__)
        return 0
    name = arguments.pop(0)
    if name not in COMMANDS:
        return _fail(_unknown(name))
    debug = "--debug" in arguments
    try:
        module = importlib.import_module(f"{__package__}.{name}")
        return int(module.run([a for a in arguments if a != "--debug"]))
    except BrokenPipeError:
        # The reader of a pipe has left; closing stdout at exit would raise a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except EXPECTED as error:
        if debug:
            raise
        return _fail(_printable(str(error)) or type(error).__name__)


def _printable(text: str) -> str:
    """Messages quote names from files: a terminal must not obey what is in them."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _fail(message: str) -> int:
    print(f"fastllm: error: {message}", file=sys.stderr)
    return 2


def _unknown(name: str) -> str:
    hint = did_you_mean(name, COMMANDS)
    hint = f"; {hint}" if hint else ""
    return f"no command named {name!r}{hint} (fastllm --help lists the commands)"
