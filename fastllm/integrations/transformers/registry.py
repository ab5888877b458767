"""Our functions in transformers' registries of attention, masks and experts, and the way back.

Attention and mask belong together: a name that only the attention registry knows gets no mask at
all, padding included, without a word. The name is "fastllm" because anything with "flash" in it is
taken for FlashAttention's package and anything with a slash for a download.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from .implementations import NAME

# kind -> the name that it has in transformers by default, and that `default=True` takes
DEFAULTS = {"attention": "sdpa", "mask": "sdpa", "experts": "grouped_mm"}
_LOCK = threading.RLock()
_ORIGINALS: dict[str, Callable[..., Any]] = {}  # kind -> what transformers had under that name


def register(*, default: bool = False) -> None:
    """Make "fastllm" known, and with `default` serve the default names too; idempotent.

    Default names belong together: where some are ours, one that a registry made anew has given
    back to transformers becomes ours again.
    """
    with _LOCK:
        interfaces, ours = _interfaces(), _functions()
        served = {kind: interface()[DEFAULTS[kind]] for kind, interface in interfaces.items()}
        taken = any(served[kind] is ours[kind] for kind in served)
        for kind, interface in interfaces.items():
            interface.register(NAME, ours[kind])
            original(kind)
            theirs = str(served[kind].__module__).startswith("transformers.")
            if default or (taken and theirs):
                interface.register(DEFAULTS[kind], ours[kind])


def restore_defaults() -> None:
    """Give the default names back; one that somebody else has registered since stays theirs."""
    with _LOCK:
        if not _ORIGINALS:
            return
        interfaces, ours = _interfaces(), _functions()
        for kind, interface in interfaces.items():
            if interface()[DEFAULTS[kind]] is ours[kind]:
                interface.register(DEFAULTS[kind], _ORIGINALS[kind])


def defaults_taken() -> bool:
    """Whether the default names are ours now."""
    with _LOCK:
        if not _ORIGINALS:
            return False
        interfaces, ours = _interfaces(), _functions()
        return all(i()[DEFAULTS[kind]] is ours[kind] for kind, i in interfaces.items())


def original(kind: str) -> Callable[..., Any]:
    """What transformers itself runs under the default name of "attention", "mask" or "experts"."""
    found = _ORIGINALS.get(kind)
    if found is None:
        with _LOCK:
            found = _ORIGINALS.setdefault(kind, _interfaces()[kind]()[DEFAULTS[kind]])
    return found


def _interfaces() -> dict[str, Any]:
    from transformers.integrations.moe import ExpertsInterface
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    return {
        "attention": AttentionInterface,
        "mask": AttentionMaskInterface,
        "experts": ExpertsInterface,
    }


def _functions() -> dict[str, Callable[..., Any]]:
    from .attention import attention_forward
    from .experts import experts_forward
    from .masks import make_mask

    return {"attention": attention_forward, "mask": make_mask, "experts": experts_forward}
