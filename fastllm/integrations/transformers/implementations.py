"""Choosing a named implementation (of attention, of experts) for a model, and going back.

transformers keeps the choice in the config of every model inside a model. What was there before is
kept in the outermost module, as plain strings: copies of the model can go back too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "fastllm"
_BEFORE = "fastllm_before"  # in the __dict__ of the outermost module: kind -> module -> name
_FIELDS = {"attention": "_attn_implementation", "experts": "_experts_implementation"}


def current(model: Any, kind: str) -> str | None:
    """The implementation ("attention" or "experts") that a model's config names."""
    return getattr(model.config, _FIELDS[kind], None)


def choose(model: nn.Module, kind: str) -> None:
    """Let every transformers model in `model` use ours; a second time changes nothing."""
    before = model.__dict__.setdefault(_BEFORE, {}).setdefault(kind, {})
    for name, inner in _configured(model):
        had = current(inner, kind)
        if had != NAME:
            before[name] = had
            setattr(inner.config, f"{_FIELDS[kind]}_internal", NAME)


def restore(model: nn.Module, kind: str) -> None:
    """Undo `choose`; models whose implementation was chosen anew since then keep it."""
    kinds = model.__dict__.get(_BEFORE, {})
    before = kinds.pop(kind, {})
    if not kinds:
        model.__dict__.pop(_BEFORE, None)
    inside = dict(model.named_modules())
    for name, had in before.items():
        if name in inside and current(inside[name], kind) == NAME:
            setattr(inside[name].config, f"{_FIELDS[kind]}_internal", had)


def _configured(model: nn.Module) -> Iterator[tuple[str, PreTrainedModel]]:
    """The transformers models inside, one for each config that they share."""
    from transformers import PreTrainedModel

    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and id(module.config) not in seen:
            seen.add(id(module.config))
            yield name, module


def chosen(model: nn.Module) -> set[str]:
    """The kinds of which `choose` was called for `model`, and not undone."""
    return set(model.__dict__.get(_BEFORE, {}))
