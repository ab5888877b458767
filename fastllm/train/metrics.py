"""What a run tells: `metrics.jsonl` always, a progress bar in a terminal, plain lines elsewhere.

A line of `metrics.jsonl` is an object with `step` and what was measured then: training (`loss`,
`lr`, `norm`, `tokens`, `tokens_per_second`, `mfu`, `seconds`; of a model with experts also what
`balance.Balance.numbers` names), evaluation (`eval_loss`, `bits_per_byte`), or `samples`. A resumed
run first drops the lines beyond the step that it starts at. Only the first process tells anything.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Literal

import yaml

from fastllm.train import balance, distributed
from fastllm.train.config import flat
from fastllm.train.report import write_report
from fastllm.train.sinks import Sink, open_sinks

FILE, SETTINGS = "metrics.jsonl", "config.yaml"


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsConfig:
    """How often and where to."""

    every: int = 10  # steps between lines; a line's loss is the mean since the one before
    progress: Literal["auto", "rich", "plain", "none"] = "auto"
    tensorboard: bool = False
    trackio: bool = False
    wandb: bool = False
    project: str = "fastllm"  # of trackio and wandb
    report: bool = True  # loss.png and report.html when the run ends

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1 step, got {self.every}")
        if self.progress not in ("auto", "rich", "plain", "none"):
            raise ValueError(f"progress must be auto, rich, plain or none, got {self.progress!r}")


class Metrics:
    """Writes and shows one run's numbers."""

    def __init__(self, out: Path, config: MetricsConfig, settings: Mapping[str, Any]) -> None:
        self.out = out
        self.config = config
        self._settings = dict(settings)
        self._first = distributed.rank() == 0
        self._file: FileIO | None = None
        self._failed = False  # the last line could not be written
        self._sinks: list[Sink] = []
        self._view: PlainView | RichView | None = None

    def open(self, *, step: int) -> None:
        """Begin at `step`; later lines of an earlier run are dropped. Raises OSError and, for a
        tracker that is not installed, ModuleNotFoundError."""
        if not self._first:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        self._sinks = open_sinks(self.config, self.out, flat(self._settings))
        text = yaml.safe_dump(self._settings, sort_keys=False, allow_unicode=True)
        (self.out / SETTINGS).write_text("# every value of the run\n" + text, encoding="utf-8")
        drop_after(self.out / FILE, step)
        self._file = (self.out / FILE).open("ab", buffering=0)
        kind = self.config.progress
        if kind == "auto":
            kind = "rich" if sys.stderr.isatty() else "plain"
        if kind != "none":
            self._view = RichView() if kind == "rich" else PlainView()

    def training(self, record: Mapping[str, Any], *, steps: int, remaining: float) -> None:
        """A line of training. steps: in all. remaining: seconds."""
        self._write(record)
        if self._view is not None:
            self._view.training(record, steps, remaining)

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """The numbers of an evaluation."""
        self._write({"step": step, **values})
        text = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items())
        self.say(f"step {step}: {text}")

    def samples(self, step: int, pairs: list[tuple[str, str]]) -> None:
        """What the model says now."""
        self._write({"step": step, "samples": [list(pair) for pair in pairs]})
        for prompt, text in pairs:
            self.say(f"step {step}: {prompt!r} -> {text!r}")

    def say(self, text: str) -> None:
        """A line for people."""
        if not self._first:
            return
        if self._view is None:
            if self.config.progress != "none":
                print(text, file=sys.stderr, flush=True)
        else:
            self._view.say(text)

    def report(self) -> None:
        """Draw the curves, where the configuration asks for it."""
        if not self._first or not self.config.report:
            return
        try:
            write_report(self.out, read(self.out / FILE), self._settings, self.say)
        except OSError as error:
            self.say(f"warning: the report cannot be written: {error}")

    def close(self) -> None:
        """Let go of the terminal, the file and the trackers."""
        if self._view is not None:
            self._view.close()
            self._view = None
        if self._file is not None:
            self._file.close()
            self._file = None
        for sink in self._sinks:
            sink.close()
        self._sinks = []

    def _write(self, record: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        text = json.dumps(dict(record), ensure_ascii=False, allow_nan=False) + "\n"
        self._append(text.encode())
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        for sink in self._sinks:
            sink.log(record["step"], numbers)

    def _append(self, line: bytes) -> None:
        """Write a line whole or not at all. A full disk costs lines, not the run."""
        assert self._file is not None, "the caller has looked"
        start = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._failed = False
        except OSError as error:
            os.ftruncate(self._file.fileno(), start)
            if not self._failed:
                self.say(f"warning: {self.out / FILE} cannot be written: {error}; lines are lost")
            self._failed = True


def drop_after(path: Path, step: int) -> None:
    """Keep the lines of a metrics file up to `step`; a torn last line goes too."""
    if not path.exists():
        return
    kept = [json.dumps(r, ensure_ascii=False) + "\n" for r in read(path) if r["step"] <= step]
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text("".join(kept) if step else "", encoding="utf-8")
    os.replace(aside, path)


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a torn last line, which a kill leaves, is not one."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}: line {number} is not JSON: {error}") from error
    return records


def summary(record: Mapping[str, Any], steps: int, remaining: float, *, short: bool = False) -> str:
    """`step 120/1000  loss 3.2104  ...`: one line of training for people.

    short: leave out rate and norm, so that a bar and the line fit into 80 columns.
    """
    parts = [f"step {record['step']}/{steps}", f"loss {record['loss']:.4f}"]
    if "reward" in record:
        error = None if short else record.get("reward_stderr")
        said = f"reward {record['reward']:.3f}"
        parts.append(said if error is None else f"{said} +- {error:.3f}")
    if not short:
        parts += [f"lr {record['lr']:.2e}", f"norm {record['norm']:.2f}"]
    if "expert_load" in record:
        parts.append(balance.describe(record))
    parts.append(f"{record['tokens_per_second']:,.0f} tok/s")
    if "mfu" in record:
        parts.append(f"MFU {100 * record['mfu']:.1f}%")
    return "  ".join([*parts, f"ETA {clock(remaining)}"])


def clock(seconds: float) -> str:
    """`2:05` or `1:02:05`."""
    minutes, rest = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class PlainView:
    """A line per record on stderr, at most two a second."""

    def __init__(self) -> None:
        self._last = 0.0

    def training(self, record: Mapping[str, Any], steps: int, remaining: float) -> None:
        """Show a line of training; the first and the last always are."""
        now = time.monotonic()
        if now - self._last > 0.5 or record["step"] == steps:
            self._last = now
            self.say(summary(record, steps, remaining))

    def say(self, text: str) -> None:
        """Show a line."""
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing is held."""


class RichView:
    """A progress bar that stays at the bottom of the terminal; lines pass above it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._bar = Progress(
            BarColumn(bar_width=12),
            TextColumn("{task.fields[text]}"),
            console=Console(stderr=True, highlight=False, soft_wrap=True),
        )
        self._task = self._bar.add_task("training", text="", total=None)
        self._bar.start()

    def training(self, record: Mapping[str, Any], steps: int, remaining: float) -> None:
        """Move the bar."""
        text = summary(record, steps, remaining, short=True)
        self._bar.update(self._task, completed=record["step"], total=steps, text=text)

    def say(self, text: str) -> None:
        """Show a line above the bar."""
        from rich.text import Text

        self._bar.console.print(Text(text))

    def close(self) -> None:
        """Give the terminal back."""
        self._bar.stop()
