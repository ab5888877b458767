"""Means of numbers over the steps between two lines of metrics; a resumed run continues them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastllm.train import distributed


class RunningMeans:
    """Sums over micro batches and processes, and what they are divided by.

    `add` in the loss, `after_step` in `Task.after_update`, `state` in `Task.state`, `read` in
    `Task.numbers`. Nothing waits for the device before `read`.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._names = list(names)
        self._step = torch.zeros(len(names) + 1, dtype=torch.float64, device=device)
        self._total = torch.zeros_like(self._step)

    def add(self, sums: Mapping[str, Tensor], count: int) -> None:
        """Add sums over `count` things, 0-dim each, all names."""
        values = [sums[name].detach().to(torch.float64) for name in self._names]
        self._step += torch.stack([*values, self._step.new_tensor(count)])

    def after_step(self) -> None:
        """Add up what all processes have; each of them calls it."""
        self._total += distributed.sum_(self._step)
        self._step.zero_()

    def read(self) -> dict[str, float]:
        """The means since the last call; empty if nothing was counted."""
        *sums, count = self._total.tolist()
        self._total.zero_()
        return {n: s / count for n, s in zip(self._names, sums, strict=True)} if count else {}

    def state(self) -> dict[str, Tensor]:
        """The live tensor, for checkpoints."""
        return {"running_means": self._total}
