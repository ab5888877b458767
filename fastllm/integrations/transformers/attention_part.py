"""The attention part of `patch`: modules that ask transformers' registry get our function."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from . import implementations
from .parts import Offer
from .swap import original

NAME = "attention"


def offer(name: str, module: nn.Module, model: nn.Module) -> Offer | None:
    """An offer for a module of attention; a reason where it computes attention by itself."""
    if "Attention" not in type(module).__name__ or not hasattr(module, "config"):
        return None
    if not _asks_registry(original(module)):
        inner = any("Attention" in type(child).__name__ for child in module.children())
        return None if inner else Offer(reason="computes attention by itself, not by name")
    if not _reached(module, model):
        return Offer(reason="its config belongs to no transformers model inside this one")
    if implementations.current(module, "attention") == implementations.NAME:
        return Offer(replaced=True, reason="already replaced")
    return Offer(True, functools.partial(implementations.choose, model, "attention"))


def _reached(module: nn.Module, model: nn.Module) -> bool:
    config: Any = module.config
    return any(isinstance(m, PreTrainedModel) and m.config is config for m in model.modules())


@functools.cache
def _asks_registry(cls: type) -> bool:
    """Whether the class's forward looks its attention up in the registry."""
    forward = inspect.unwrap(cls.forward)  # type: ignore[attr-defined]
    code = getattr(forward, "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names
