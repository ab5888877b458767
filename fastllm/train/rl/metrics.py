"""Numbers of an RL run, under the names that users of TRL know, and the time of each phase."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastllm.train.metrics import drop_after
from fastllm.train.rl.rollout import Trajectory

SAMPLES = "samples.jsonl"
PHASES = ("rollout", "reward", "reference", "update")


class RlMetrics:
    """Collects values between two lines of metrics."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Any, float]] = {}  # value times weight, weight
        self._ends: dict[str, Any] = {}  # extremes
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._steps = 0
        self._began: float | None = None

    def mean(self, name: str, value: Any, weight: float = 1.0) -> None:
        """A value, a number or a 0-dim tensor, whose mean over the steps is reported."""
        total, count = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (total + value * weight, count + weight)

    def smallest(self, name: str, value: Any) -> None:
        """... whose smallest is."""
        before = self._ends.get(name)
        self._ends[name] = value if before is None else _end(torch.minimum, before, value)

    def largest(self, name: str, value: Any) -> None:
        """... whose largest is; NaN counts as larger than anything."""
        before = self._ends.get(name)
        self._ends[name] = value if before is None else _end(torch.maximum, before, value)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds inside; a name beside `PHASES` is one more phase."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began

    def update_begins(self) -> None:
        """A micro batch of the step is about to be computed; the first one counts."""
        if self._began is None:
            self._began = time.perf_counter()

    def update_ends(self) -> None:
        """The optimizer has stepped."""
        if self._began is not None:
            self._seconds["update"] += time.perf_counter() - self._began
        self._began = None
        self._steps += 1

    def numbers(self) -> dict[str, float]:
        """Everything since the last call; seconds of phases are per step."""
        found = {name: float(total) / count for name, (total, count) in self._sums.items() if count}
        found |= {name: float(value) for name, value in self._ends.items()}
        steps = max(self._steps, 1)
        found |= {f"seconds/{name}": s / steps for name, s in self._seconds.items()}
        self._sums, self._ends, self._steps = {}, {}, 0
        self._seconds = dict.fromkeys(PHASES, 0.0)
        return found

    @contextmanager
    def undone_if_raised(self) -> Iterator[None]:
        """What is added inside counts if nothing is raised: a rollout that failed is made again."""
        before, done = (dict(self._sums), dict(self._ends)), False
        try:
            yield
            done = True
        finally:
            if not done:
                self._sums, self._ends = before

    def state_dict(self) -> dict[str, Any]:
        """What the next line will tell of the steps so far, seconds left out: JSON values."""
        return {
            "sums": {name: [float(total), count] for name, (total, count) in self._sums.items()},
            "ends": {name: float(value) for name, value in self._ends.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._sums = {name: (total, count) for name, (total, count) in state["sums"].items()}
        self._ends = dict(state["ends"])

    def rollout(self, trajectories: Sequence[Trajectory]) -> None:
        """Lengths of a rollout's completions."""
        lengths = [len(t.completion_ids) for t in trajectories]
        ended = [len(t.completion_ids) for t in trajectories if not t.truncated]
        self.mean("completions/mean_length", sum(lengths) / len(lengths))
        self.smallest("completions/min_length", min(lengths))
        self.largest("completions/max_length", max(lengths))
        self.mean("completions/clipped_ratio", 1 - len(ended) / len(lengths))
        if ended:
            self.mean("completions/mean_terminated_length", sum(ended) / len(ended))

    def rewards(
        self, table: Tensor, names: Sequence[str], rewards: Tensor, equal: Sequence[bool]
    ) -> None:
        """Rewards of a rollout.

        table: `[N, F]`, by function. rewards: `[N]`, weighed and summed, group by group. equal: of
        each group, whether all its rewards are the same.

        `reward_stderr`, the standard error of the mean reward, is that of the groups' means:
        samples of one prompt are alike, the more so the surer the policy is. Every rollout has
        other prompts, so changes of `reward` below three times this may be chance.
        """
        for column, name in enumerate(names):
            values = table[:, column].double()
            self.mean(f"rewards/{name}/mean", float(values.mean()))
            self.mean(f"rewards/{name}/std", _deviation(values))
        self.mean("reward", float(rewards.double().mean()))
        self.mean("reward_std", _deviation(rewards.double()))
        groups = rewards.double().reshape(len(equal), -1).mean(1)
        self.mean("reward_stderr", _deviation(groups) / math.sqrt(len(groups)))
        self.mean("frac_reward_zero_std", sum(equal) / len(equal))


class SampleFile:
    """Completions for people to read, one JSON object a line. It is closed between writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._started = False

    def write(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows of a step. The first write drops what a course of the run that was given up has
        left of this step and later ones. Raises OSError."""
        if not self._started:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            drop_after(self.path, step - 1)
            self._started = True
        with self.path.open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n")


def _deviation(values: Tensor) -> float:
    return float(values.std()) if len(values) > 1 else 0.0


def _end(which: Any, first: Any, second: Any) -> Any:
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return which(torch.as_tensor(first), torch.as_tensor(second))
    return float(which(torch.tensor(float(first)), torch.tensor(float(second))))
