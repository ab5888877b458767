"""Parsers of the commands: readable help with examples, typed options, `--config FILE`."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

import jsonargparse

from ..errors import did_you_mean

MAX_THREADS = 1024  # a runtime that is asked for millions of threads ends the process


class Parser(jsonargparse.ArgumentParser):
    """A jsonargparse parser whose error for an unknown option names the nearest one."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print usage and `message`, and exit with status 2."""
        unknown = message.partition("unrecognized arguments: --")[2].split("=")[0].split()
        if unknown:
            known = [option for option in self._option_string_actions if option.startswith("--")]
            hint = did_you_mean("--" + unknown[0], known)
            message += f" ({hint})" if hint else ""
        super().error(message, ex)


def command_parser(name: str, description: str, examples: str) -> Parser:
    """The parser of `fastllm NAME`.

    Args:
        name: the command's name.
        description: what it does, in paragraphs.
        examples: command lines, one a line.
    """
    parser = Parser(
        prog=f"fastllm {name}",
        description=description.strip(),
        epilog="examples:\n" + "\n".join(f"  {line}" for line in examples.strip().splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def add_config(parser: Parser) -> None:
    """Let a YAML file give the options: `--config FILE`, written by `--print_config`."""
    parser.add_argument(
        "--config", action=jsonargparse.ActionConfigFile, help="read options from a YAML file"
    )


def add_model_options(parser: Parser) -> None:
    """How a model is loaded; the names are those of `fastllm.LLM`."""
    group: Any = parser.add_argument_group("model options")
    group.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        default=None,
        help="compute dtype (default: what suits this machine)",
    )
    group.add_argument(
        "--activation",
        choices=["int8", "bf16", "fp32"],
        default=None,
        help="what quantized weights are multiplied with (default: int8, which of fp8 weights is "
        "e4m3; with an adapter, as it was trained, the compute dtype)",
    )
    group.add_argument(
        "--quant",
        default=None,
        metavar="FORMAT",
        help="quantize the layers as they are loaded: int4, nf4, q4_k, q8_0, int8, fp8, ...",
    )
    group.add_argument(
        "--kv-cache-dtype",
        choices=["auto", "bf16", "fp16", "fp32", "int8"],
        default="auto",
        help="of cached keys and values: auto is the compute dtype, int8 halves their memory",
    )
    group.add_argument("--device", default=None, help="cpu or cuda (default: cpu)")
    group.add_argument(
        "--max-model-len",
        type=int,
        default=None,
        metavar="N",
        help="longest prompt plus answer, in tokens (default: what the model declares)",
    )
    group.add_argument(
        "--adapter", default=None, metavar="DIR", help="a LoRA adapter, put on the model"
    )
    group.add_argument(
        "--threads", type=int, default=None, metavar="N", help="CPU threads (default: PyTorch's)"
    )


def use_threads(count: int | None) -> None:
    """Set the number of CPU threads; None leaves PyTorch's. Raises ValueError naming the option."""
    if count is None:
        return
    if not 1 <= count <= MAX_THREADS:
        raise ValueError(f"--threads must be from 1 to {MAX_THREADS}, got {count}")
    import torch

    torch.set_num_threads(count)


def add_sampling_options(parser: Parser, temperature: float, max_tokens: int) -> None:
    """How tokens are chosen; the names are those of `fastllm.SamplingParams`."""
    group: Any = parser.add_argument_group("sampling options")
    options: list[tuple[str, type, Any, str]] = [
        ("max-tokens", int, max_tokens, "length of an answer, at most"),
        ("min-tokens", int, 0, "length of an answer, at least"),
        ("temperature", float, temperature, "0 always takes the likeliest token"),
        ("top-k", int, 0, "choose among the k likeliest tokens; 0: all"),
        ("top-p", float, 1.0, "choose among the likeliest tokens of this total probability"),
        ("min-p", float, 0.0, "drop tokens below this share of the likeliest one's probability"),
        ("repetition-penalty", float, 1.0, "above 1 discourages every token already seen"),
        ("presence-penalty", float, 0.0, "above 0 discourages tokens already generated"),
        ("frequency-penalty", float, 0.0, "the same, growing with each repetition"),
    ]
    for name, kind, default, text in options:
        group.add_argument(
            f"--{name}",
            type=kind,
            default=default,
            metavar="X",
            help=f"{text} (default: {default})",
        )
    group.add_argument(
        "--seed", type=int, default=None, metavar="N", help="the same seed gives the same answer"
    )
    group.add_argument(
        "--stop", action="append", default=None, metavar="TEXT", help="end an answer before TEXT"
    )
