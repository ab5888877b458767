"""Experiment trackers, each behind a flag and imported only then."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from fastllm.train.metrics import MetricsConfig


class Sink(Protocol):
    """Takes numbers by step."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def open_sinks(config: MetricsConfig, out: Path, settings: Mapping[str, Any]) -> list[Sink]:
    """The trackers that the configuration asks for.

    Raises ModuleNotFoundError naming the package to install.
    """
    sinks: list[Sink] = []
    if config.tensorboard:
        sinks.append(_TensorBoard(out))
    for name in ("trackio", "wandb"):
        if getattr(config, name):
            sinks.append(_Tracker(name, config.project, out.name, settings))
    return sinks


def _import(module: str, option: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{option} needs {package}: pip install {package}, or switch it off"
        ) from error


class _TensorBoard:
    def __init__(self, out: Path) -> None:
        _import("tensorboard", "metrics.tensorboard", "tensorboard")
        module = _import("torch.utils.tensorboard", "metrics.tensorboard", "tensorboard")
        self._writer = module.SummaryWriter(str(out / "tensorboard"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Tracker:
    """trackio and wandb, which have the same functions."""

    def __init__(self, name: str, project: str, run: str, settings: Mapping[str, Any]) -> None:
        self._module = _import(name, f"metrics.{name}", name)
        self._module.init(project=project, name=run, config=dict(settings))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._module.log(dict(values), step=step)

    def close(self) -> None:
        self._module.finish()
