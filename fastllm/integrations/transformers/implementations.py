"""Choosing a named implementation (of attention, of experts) for a model, and going back.

transformers keeps the choice in the config of every model inside a model. What was there before is
kept in each of those models, as plain strings: copies of a model, and what it is inside of or has
inside, can go back too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "fastllm"
_BEFORE = "fastllm_before"  # in the __dict__ of a transformers model: kind -> name
_FIELDS = {"attention": "_attn_implementation", "experts": "_experts_implementation"}
KINDS = tuple(_FIELDS)


def current(model: Any, kind: str) -> str | None:
    """The implementation of a kind (one of `KINDS`) that a model's config names."""
    return getattr(model.config, _FIELDS[kind], None)


def set_name(config: Any, kind: str, name: str | None) -> None:
    """Let that config alone name an implementation, not those inside it."""
    setattr(config, f"{_FIELDS[kind]}_internal", name)


def choose(model: nn.Module, kind: str) -> None:
    """Let every transformers model in `model` use ours; a second time changes nothing."""
    models = list(_models(model))
    before = {id(inner.config): current(inner, kind) for inner in models}
    for inner in models:
        had = before[id(inner.config)]  # several models share one config
        if had != NAME:
            inner.__dict__.setdefault(_BEFORE, {})[kind] = had
            set_name(inner.config, kind, NAME)


def restore(model: nn.Module, kind: str) -> None:
    """Undo `choose`; models whose implementation was chosen anew since then keep it."""
    for inner in _models(model):
        kinds = inner.__dict__.get(_BEFORE, {})
        if kind in kinds:
            had = kinds.pop(kind)
            if current(inner, kind) == NAME:
                set_name(inner.config, kind, had)
        if not kinds:
            inner.__dict__.pop(_BEFORE, None)


def chosen(model: nn.Module) -> set[str]:
    """The kinds that `choose` changed in a model inside, and that were not restored."""
    return {kind for inner in _models(model) for kind in inner.__dict__.get(_BEFORE, {})}


def _models(model: nn.Module) -> Iterator[PreTrainedModel]:
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            yield module
