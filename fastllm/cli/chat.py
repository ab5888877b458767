"""`fastllm chat MODEL`: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from .answering import load, print_stream, sampling_params
from .console import note
from .parsing import add_config, add_model_options, add_sampling_options, command_parser

if TYPE_CHECKING:
    from ..engine.llm import LLM
    from ..engine.request import SamplingParams

DESCRIPTION = """
Talks with an instruct model. Answers are streamed, the conversation is remembered, and each
answer is followed by its speed. Ctrl-C stops an answer, not the program.

  /reset   forget the conversation
  /help    show these commands
  /exit    leave (Ctrl-D leaves too)
"""

EXAMPLES = """
fastllm chat smollm2
fastllm chat smollm2 --system 'You answer in one sentence.'
fastllm chat ./Qwen3-0.6B --temperature 0.7 --top-p 0.95 --seed 1
"""

HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = command_parser("chat", DESCRIPTION, EXAMPLES)
    parser.add_argument("model", help="a path, a name of `fastllm models`, or a Hugging Face id")
    parser.add_argument("--system", metavar="TEXT", default=None, help="instructions")
    add_sampling_options(parser, temperature=0.2, max_tokens=1024)
    add_model_options(parser)
    add_config(parser)
    options = parser.parse_args(list(argv))
    params = sampling_params(options)
    llm = load(options)
    if sys.stdin.isatty():
        if find_spec("readline"):
            import readline  # line editing and history for input()

            readline.set_auto_history(True)
        note(HELP)
    converse(llm, params, options.system, _read_line)
    return 0


def _read_line() -> str:
    return input("\n> " if sys.stdin.isatty() else "")


def converse(
    llm: LLM, params: SamplingParams, system: str | None, read: Callable[[], str]
) -> list[dict[str, str]]:
    """Answer lines from `read` until it raises EOFError or gives /exit.

    Returns:
        The conversation as it stands at the end.
    """
    start = [{"role": "system", "content": system}] if system is not None else []
    history = list(start)
    while True:
        try:
            line = read().strip()
        except EOFError:
            return history
        except KeyboardInterrupt:
            note(f"\n{HELP}")
            continue
        if line == "/exit":
            return history
        if line == "/reset":
            history = list(start)
            note("the conversation is forgotten")
        elif line.startswith("/"):
            note(HELP)
        elif line:
            history = _answer(llm, params, [*history, {"role": "user", "content": line}])


def _answer(
    llm: LLM, params: SamplingParams, history: list[dict[str, str]]
) -> list[dict[str, str]]:
    """Print the answer to the last message; returns the history with it."""
    try:
        text, speed = print_stream(llm.chat(history, params, stream=True))
    except KeyboardInterrupt:  # before the first token was asked for, or a second time
        note("\nstopped; the last message is forgotten")
        return history[:-1]
    except ValueError as error:  # the conversation outgrew the context, say
        note(f"{error}\n/reset starts anew")
        return history[:-1]
    note(f"[{speed}]")
    return [*history, {"role": "assistant", "content": text}]
