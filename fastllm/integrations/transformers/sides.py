"""One model, two sides: as transformers wrote it and patched, switched in place.

Both sides run on the same parameters, so a comparison takes no second copy of the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from . import implementations, registry
from .patching import patch, patched, unpatch
from .report import Report
from .swap import swapped


class Sides:
    """Switches a model between `original()` and `patched()`; `close()` leaves it as it came.

    A model that came patched is compared as it is patched; `ops` counts for others.

    Args:
        model: a transformers model, patched or not.
        ops: what to replace in a model that is not patched.

    Raises:
        ValueError: only a part of the model was patched by itself, so that a second patch would
            not give it back as it was.
    """

    def __init__(self, model: nn.Module, ops: Sequence[str]) -> None:
        self._model = model
        self._defaults = registry.defaults_taken()
        had, before = _parts(model), _state(model)
        self._came_patched = bool(had)
        self._ops = tuple(sorted(had)) if had else tuple(ops)
        self._by_name = _named_ours(model, had)
        with patched(model, ops=self._ops) as report:
            grown = bool(had) and _state(model) != before
        self.report: Report = report
        if grown:
            raise ValueError(
                "model: it was patched in part; unpatch the module inside first, or verify that one"
            )

    def original(self) -> None:
        """transformers' own code serves the model."""
        unpatch(self._model)
        registry.restore_defaults()
        for config, kind in self._by_name:
            implementations.set_name(config, kind, registry.DEFAULTS[kind])

    def patched(self) -> None:
        """Our kernels serve the model."""
        for config, kind in self._by_name:
            implementations.set_name(config, kind, implementations.NAME)
        patch(self._model, ops=self._ops)

    def close(self) -> None:
        """Back to how it came."""
        self.patched()
        if not self._came_patched:
            unpatch(self._model)
        if self._defaults:
            registry.register(default=True)


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards training flags and random states are as they were."""
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


@contextlib.contextmanager
def heads_training(model: nn.Module) -> Iterator[None]:
    """Training mode of the modules that compute a loss, not of what they hold: no dropout."""
    heads = [module for module in model.modules() if hasattr(module, "lm_head")]
    for module in heads:
        module.training = True
    try:
        yield
    finally:
        for module in heads:
            module.training = False


def _parts(model: nn.Module) -> set[str]:
    """The parts of which anything in `model` is patched."""
    found: set[str] = set()
    for module in model.modules():
        found |= {*swapped(module), *implementations.chosen(module)}
    return found


def _state(model: nn.Module) -> list[tuple[Any, ...]]:
    """What is patched where; two equal ones are one patch."""
    return [
        (name, swapped(module), sorted(implementations.chosen(module)))
        for name, module in model.named_modules()
    ]


def _named_ours(model: nn.Module, patched: set[str]) -> list[tuple[Any, str]]:
    """Configs, with the kind of implementation, that name "fastllm" by the user's own choice."""
    return [
        (module.config, kind)
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
        for kind in implementations.KINDS
        if kind not in patched and implementations.current(module, kind) == implementations.NAME
    ]
