"""The demo's stages: what each is given, what it shows, how they are run one after the other."""

from __future__ import annotations

import json
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from .console import facts, heading

Points = list[tuple[float, float]]
MARK = ".fastllm-demo"  # in folders that may be emptied


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What a stage is given.

    root: the demo's folder; every stage writes to the one of its name in it. seconds: that the
    stage trains, or 0. options: of the command line.
    """

    root: Path
    model: str
    seconds: float
    quick: bool
    options: Any

    def folder(self, stage: str) -> Path:
        """Where a stage has written, or will."""
        return self.root / stage

    def found(self, *paths: str) -> Path | None:
        """The first of these paths below the root that is there: what an earlier stage has made."""
        return next((self.root / path for path in paths if (self.root / path).exists()), None)


@dataclass(kw_only=True, slots=True)
class Part:
    """What a stage has to show, in the terminal and in the report.

    record: for demo.json. curves: lines of points under each title. tables: a title, columns and
    rows. samples: titles and texts. problem: why its result is not what it has to be.
    """

    record: dict[str, Any] = field(default_factory=dict)
    facts: list[tuple[str, str]] = field(default_factory=list)
    curves: dict[str, list[tuple[str, Points]]] = field(default_factory=dict)
    tables: list[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = field(default_factory=list)
    samples: list[tuple[str, str]] = field(default_factory=list)
    problem: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One part of the demo.

    training, quick: seconds that it trains, in full and with --quick; what comes before and after
    (loading, evaluation) is about as long again. in_quick: whether --quick has it.
    """

    name: str
    title: str
    run: Callable[[Setting], Part]
    training: float = 0.0
    quick: float = 0.0
    in_quick: bool = True


@dataclass(kw_only=True, slots=True)
class Outcome:
    """How a stage ended."""

    stage: Stage
    part: Part
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether its problem is one."""
        return self.part.problem is not None


class _Attempt:
    """Keeps an error of a stage, so that the stages after it are run all the same.

    A stage runs everything there is, and any error of it is one of the stage alone: there is no
    narrower class to name. Ctrl-C and exits go on.
    """

    problem: str | None = None

    def __enter__(self) -> _Attempt:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:  # fmt: skip
        if not isinstance(error, Exception):
            return False
        traceback.print_exception(kind, error, trace, file=sys.stderr)
        self.problem = f"{type(error).__name__}: {error}"
        return True


def check_folder(folder: Path) -> None:
    """Raise ValueError if a folder holds what no demo has written."""
    if folder.exists() and not (folder.is_dir() and (folder / MARK).exists()):
        if folder.is_dir() and not any(folder.iterdir()):
            return
        raise ValueError(
            f"{folder} is there and the demo has not made it: it would be emptied. Give another "
            "folder with --out, or remove it"
        )


def empty_folder(folder: Path) -> None:
    """Make the folder of a stage, or empty one that an earlier demo has made. Raises ValueError."""
    check_folder(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARK).touch()


def run_stage(stage: Stage, setting: Setting) -> Outcome:
    """Run a stage in an empty folder and print what it shows; its errors are kept, not raised."""
    heading(stage.title)
    empty_folder(setting.folder(stage.name))
    outcome = Outcome(stage=stage, part=Part())
    start, cpu = time.perf_counter(), time.process_time()
    with _Attempt() as attempt:
        outcome.part = stage.run(setting)
    outcome.seconds, outcome.cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    if attempt.problem is not None:
        outcome.part = Part(problem=attempt.problem)
    if outcome.part.facts:
        print()
        facts(outcome.part.facts)
    if outcome.failed:
        print(f"  FAILED: {outcome.part.problem}")
    return outcome


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, such as metrics.jsonl."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def shortened(text: str, length: int = 160) -> str:
    """On one line, cut at `length` characters."""
    text = " | ".join(line for line in text.splitlines() if line.strip())
    return text if len(text) <= length else text[: length - 3] + "..."
