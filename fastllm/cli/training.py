"""What commands share that train a given model: `fastllm STAGE MODEL DATA... [--KEY VALUE...]`."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import NumericalError
from .console import note

if TYPE_CHECKING:
    from ..train.rl.setup import RlResult

T = TypeVar("T")
R = TypeVar("R")
Load = Callable[[str | None, Sequence[str]], T]


@dataclass(frozen=True, kw_only=True, slots=True)
class Help:
    """The texts of a command's `--help`; examples are one command a line."""

    usage: str
    description: str
    examples: str
    choices: str = ""  # what is chosen where a value is none

    def text(self, config: type, aliases: Mapping[str, str]) -> str:
        """All of it, with every key of the configuration, its type and default."""
        from ..train.config import describe

        keys = [(f"--{key}", kind, default) for key, kind, default in describe(config)]
        width = max(len(name) for name, _, _ in keys)
        short = ", ".join(f"--{name} for --{key}" for name, key in aliases.items())
        return "\n".join(
            [
                f"usage: {self.usage}",
                self.description,
                "keys (also of the YAML file, nested), types and defaults:",
                *(f"  {name:{width}}  {kind} = {default}" for name, kind, default in keys),
                "",
                *textwrap.wrap(f"short: {short}", 96),
                self.choices,
                "examples:",
                *(f"  {line}" for line in self.examples.strip().splitlines()),
            ]
        )


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether -h or --help is among the words."""
    return bool({"-h", "--help"} & set(argv))


def parse(argv: Sequence[str], load: Load[T], usage: str) -> T:
    """The configuration of `MODEL DATA... --config FILE --KEY VALUE...`.

    load: from a YAML file's path and overrides. Raises ValueError naming what does not fit.
    """
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
        raise ValueError(f"no data is given: {usage}")
    if not named and path is None:
        raise ValueError(f"a model and data, or --config, are needed: {usage}")
    return load(path, [*given, *words])


def train(main: Callable[..., R], config: Any, show: Callable[[R], None]) -> int:
    """Run `main(config, say=...)` and show its result; returns the exit status.

    A run that fails (numbers that are none, a full disk) says why in one line and gives 1.
    """
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


def show_rewards(result: RlResult) -> None:
    """Held-out rewards before and after."""
    for name, value in result.after.items():
        before = result.before.get(name)
        was = "" if before is None else f"{before:.4f} before, "
        print(f"{name.removeprefix('eval_')} on held-out prompts: {was}{value:.4f} now")
    print(f"{result.run.status} after {result.run.step} steps: {result.output}")
