"""Steps in a process of their own: what one peer asks of the memory allocator or leaves in caches
does not reach the others.

The program answers every line of its input by a step's seconds and the bytes of its resident set
at the peak, beyond what the imports had taken.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

_ANSWER = "step:"


class StepProcess:
    """`python -m MODULE ARGUMENTS`, which takes steps when it is asked to; it ends with `close`,
    or with this process."""

    def __init__(self, module: str, *arguments: object) -> None:
        quiet = ["-W", "ignore::FutureWarning"]  # of libraries about libraries
        self.start([sys.executable, *quiet, "-m", module, *map(str, arguments)])

    def start(self, command: list[str]) -> None:
        """Run a program that serves steps, with as many threads as this process has."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._peak = 0.0

    def step(self) -> float:
        """Seconds of one step."""
        seconds, self._peak = self._ask()
        return seconds

    def peak(self) -> float:
        """Bytes of the resident set at the peak of warming up and steps, beyond the imports."""
        if not self._peak:
            self.step()
        return self._peak

    def _ask(self) -> tuple[float, float]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        while answer := self._process.stdout.readline():
            if answer.startswith(_ANSWER):
                seconds, peak = answer.split()[1:]
                return float(seconds), float(peak)
        raise RuntimeError(f"{self._process.args!r} ended with {self._process.wait()}")

    def close(self) -> None:
        """End the process and wait for it."""
        self._process.kill()
        self._process.communicate()


class StepClock:
    """The program's side. Made after the imports and before anything is loaded."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._before = _resident()
        self._asked = iter(sys.stdin)
        self._start = 0.0

    def waits(self) -> Iterator[None]:
        """One turn for every line of input; the turn is a step."""
        while self.begin():
            yield
            self.end()

    def begin(self) -> bool:
        """Wait until a step is asked for; False: there will be none."""
        if next(self._asked, None) is None:
            return False
        self._start = time.perf_counter()
        return True

    def end(self) -> None:
        """Answer for the step that `begin` began."""
        if self._device != "cpu":
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - self._start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - self._before
        print(_ANSWER, seconds, peak, flush=True)


def serve_steps(step: Callable[[], Any], clock: StepClock) -> None:
    """Take a step for every line of standard input."""
    for _ in clock.waits():
        step()


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
