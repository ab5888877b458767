"""What a kind of training gives the loop: model, optimizer, batches, loss, how weights are kept.

A micro batch is anything with `tokens`, the number of targets that count in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastllm.train import distributed
from fastllm.train.state import load_into


class Micro(Protocol):
    """What one forward and backward pass reads."""

    @property
    def tokens(self) -> int:
        """Targets that count."""


class Batches(Protocol):
    """An endless iterator over optimizer steps; each is the list of this process's micro batches.

    A loader that reads ahead must give the state of the batches that it has handed out.
    """

    def __next__(self) -> list[Any]: ...

    def state_dict(self) -> dict[str, Any]:
        """Where it is, as JSON values, the same on every process."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go there. Raises ValueError naming what does not fit."""


class StepOptimizer(Protocol):
    """A torch optimizer whose step takes what gradients are multiplied with."""

    param_groups: list[dict[str, Any]]
    state: Any

    def step(self, *, grad_scale: Tensor) -> Any:
        """Update. grad_scale: 0-dim float32 on the parameters' device."""

    def zero_grad(self, set_to_none: bool = True) -> None: ...


class StepAbandoned(Exception):
    """Raised by `Batches.__next__` or `Task.evaluate` when `Task.stopping` asks for it: nothing has
    changed, and the run ends with a checkpoint of the last step that was done."""


class NothingToLearn(ValueError):
    """Raised by `Batches.__next__` when no step can be made of what it finds: the run ends with the
    error and a checkpoint of the step before."""


def _never() -> bool:
    return False


class Task:
    """Base of every kind of training. A subclass sets the attributes and defines `loss`."""

    name: str = "train"
    stopping: Callable[[], bool] = staticmethod(_never)  # the loop's: a signal asks for the end
    evaluates_first = False  # before the first step of a new run too: the curve's beginning
    model: nn.Module
    optimizer: StepOptimizer
    batches: Batches

    def loss(self, micro: Any) -> Tensor:
        """The sum of the losses of the targets that count: 0-dim, differentiable."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(micro)")

    def evaluate(self) -> dict[str, float]:
        """Numbers on held-out data, equal on every process; called without gradients."""
        return {}

    def sample(self) -> list[tuple[str, str]]:
        """(prompt, continuation) pairs from the live weights; called without gradients."""
        return []

    def describe(self) -> list[str]:
        """What the run is about to do, in a few lines."""
        return []

    def flops(self, micro: Any) -> float:
        """Floating-point operations of a micro batch, forward and backward; 0: not known."""
        return 0.0

    def identity(self) -> dict[str, Any]:
        """JSON values that a checkpoint must share with a run that resumes from it, such as the
        model's shape and the tokenizer's hash."""
        return {}

    def after_update(self) -> None:
        """Called after each update, before `weights_changed`: what a step changes beside the
        parameters. Every process is there."""

    def state(self) -> dict[str, Tensor]:
        """Live tensors beside weights and optimizer that a resumed run needs, by name; the same on
        every process."""
        return {}

    def numbers(self, *, whole: bool) -> dict[str, Any]:
        """More values for a line of metrics, about the steps since the one before, whose count
        begins anew. whole: also what is too long for every line."""
        return {}

    def weights_changed(self) -> None:
        """Called after each update: the model drops what it computed from the old weights."""
        self.model.weights_changed()  # type: ignore[operator]

    def weights(self) -> dict[str, Tensor]:
        """The tensors of the model's own files, by name: what training changes. They are copied
        at once; may be sharded."""
        return dict(self.model.named_parameters())

    def write_weights(self, weights: Mapping[str, Tensor], directory: Path) -> None:
        """Make `directory`, which is not there yet, and write the model's files into it.

        weights: copies of `weights()` in host memory, whole. It may run in another thread, so it
        must read nothing else that training changes. Raises OSError.
        """
        raise NotImplementedError(f"{type(self).__name__} must define write_weights")

    def read_weights(self, directory: Path) -> None:
        """Fill the live tensors of `weights()` from the safetensors files in `directory`."""
        # Masters are read with the optimizer's state: the files hold what blocks read of them.
        weights = self.weights().items()
        load_into({n: t for n, t in weights if not distributed.is_master(t)}, directory)

    @property
    def device(self) -> torch.device:
        """Where the model's parameters lie."""
        return next(self.model.parameters()).device

    @property
    def compute_dtype(self) -> torch.dtype:
        """What products are made in: MFU compares with the device's peak in it."""
        dtype: torch.dtype = getattr(self.model, "dtype", torch.float32)
        return dtype
