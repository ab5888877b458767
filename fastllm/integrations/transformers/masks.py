"""The mask function: what transformers wants hidden, described instead of spelled out.

Causal, sliding-window and bidirectional attention, with padding, with caches that hold more or
fewer keys than there are queries, or over packed documents, become a `LazyMask`, a mask of keys or
nothing at all. Any other mask function gets transformers' own booleans.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils as their
from transformers.utils.import_utils import is_torchdynamo_exporting, is_tracing

from ...ops.registry import is_transformed
from . import registry
from .lazy_mask import LazyMask


@dataclass(frozen=True, slots=True)
class Pattern:
    """left, right: keys before and after its own that a query sees, -1 all. packed: documents."""

    left: int = -1
    right: int = -1
    packed: Tensor | None = None  # int [B, T], equal where tokens are of one document


CAUSAL = Pattern(right=0)
FULL = Pattern()

# Mask functions are closures: they are known by their code, and what they hold by its cells.
_AND = their.and_masks(their.causal_mask_function).__code__
_WINDOW = their.sliding_window_overlay(1).__code__
_NEAR = their.sliding_window_bidirectional_overlay(1).__code__
_SAME = their.packed_sequence_mask_function(torch.zeros(1, 1)).__code__
# Since 5.23 positions are counted inside a document, which changes nothing of what is hidden.
_REMAPPED = (
    their.remap_positions_for_packed_sequence(
        their.causal_mask_function, torch.zeros(1, 1)
    ).__code__
    if hasattr(their, "remap_positions_for_packed_sequence")
    else None
)


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = their.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """transformers' mask interface (`masking_utils.sdpa_mask` has the same arguments).

    Returns:
        None: attention is causal from key 0 (or whole, for bidirectional models), no key hidden.
        A `LazyMask`, or bool `[B, 1, 1, Tk]` for one query, or whatever transformers' own function
        makes of a mask function that is none of the known ones.
    """

    def theirs() -> Tensor | None:
        return registry.original("mask")(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
            kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
            local_size=local_size, allow_is_causal_skip=allow_is_causal_skip,
            allow_is_bidirectional_skip=bool(allow_is_bidirectional_skip), use_vmap=use_vmap,
            device=device, **kwargs,
        )  # fmt: skip

    if use_vmap or is_torchdynamo_exporting() or is_transformed():
        return theirs()
    tracing = is_tracing(attention_mask)
    pattern = (
        _traced_pattern(
            mask_function, local_size, allow_is_bidirectional_skip, attention_mask, batch_size,
            q_length, device, kwargs.get("config"),
        )
        if tracing else _pattern(mask_function)
    )  # fmt: skip
    one_of_many = q_length == 1 and isinstance(q_offset, Tensor)  # a static cache's decoding step
    if pattern is None or one_of_many or (tracing and not _plain(q_length, kv_length, q_offset)):
        return theirs()
    offset = int(q_offset) - kv_offset
    size = (batch_size, 1, q_length, kv_length)
    if pattern.packed is not None:
        if offset or attention_mask is not None or q_length != kv_length:
            return theirs()
        starts = _document_starts(pattern.packed, tracing)
        return LazyMask(starts, size, "documents", 0, pattern.left, pattern.right)
    end = min(kv_length, offset + q_length) if pattern.right == 0 else kv_length
    keys = _hidden_keys(attention_mask, kv_offset, kv_length, end, tracing)
    skip = allow_is_causal_skip if pattern.right == 0 else bool(allow_is_bidirectional_skip)
    return _described(pattern, size, offset, end, keys, skip, device)


def _described(
    pattern: Pattern, size: tuple[int, ...], offset: int, end: int, keys: Tensor | None,
    skip: bool, device: torch.device | str,
) -> Tensor | None:  # fmt: skip
    """The mask of a pattern without documents; `end`: keys from there on are seen by no query."""
    queries, count = size[2], size[3]
    left = pattern.left if pattern.left < offset + queries - 1 else -1  # -1: it hides nothing
    if left < 0 and pattern.right <= 0:
        # One query sees all keys without being told, several see them causally from key 0.
        whole = pattern.right < 0 or (end == count if queries == 1 else offset == 0)
        if keys is None and skip and whole:
            return None
        if keys is not None and queries == 1 and end == count:
            return keys[:, None, None, :]
    if keys is None:
        empty = torch.empty(0, device=device)
        return LazyMask(empty, size, "", offset, left, pattern.right)
    return LazyMask(keys, size, "keys", offset, left, pattern.right)


def _plain(q_length: int, kv_length: int, q_offset: int | Tensor) -> bool:
    """Whether a graph that is being traced can hold our description: no number that changes."""
    return q_length > 1 and q_length == kv_length and not isinstance(q_offset, Tensor)


def _cells(function: Callable[..., Any]) -> dict[str, Any]:
    closure = function.__closure__ or ()  # type: ignore[attr-defined]
    code = function.__code__  # type: ignore[attr-defined]
    return {name: cell.cell_contents for name, cell in zip(code.co_freevars, closure, strict=True)}


def _pattern(function: Callable[..., Any]) -> Pattern | None:
    """What a mask function of transformers hides; None: it is none of those that are known."""
    if function is their.causal_mask_function:
        return CAUSAL
    if function is their.bidirectional_mask_function:
        return FULL
    if getattr(function, "__code__", None) is not _AND:
        return None
    parts = _cells(function)["mask_functions"]
    if len(parts) != 2:
        return None
    first, second = parts
    code, last = (getattr(part, "__code__", None) for part in parts)
    if code is _SAME and last is not None and last is _REMAPPED:
        return _packed(_cells(second)["mask_function"], first)
    if last is _SAME:
        return _packed(first, second)
    if code is _WINDOW and second is their.causal_mask_function:
        return Pattern(left=_cells(first)["sliding_window"] - 1, right=0)
    if code is _NEAR and second is their.bidirectional_mask_function:
        near = _cells(first)["sliding_window"]
        return Pattern(left=near, right=near)
    return None


def _packed(inner: Callable[..., Any], same: Callable[..., Any]) -> Pattern | None:
    """`inner`, inside each document that `same` tells apart."""
    pattern = _pattern(inner)
    if pattern is None or pattern.right != 0 or pattern.packed is not None:
        return None
    return Pattern(pattern.left, 0, _cells(same)["packed_sequence_mask"])


def _traced_pattern(
    function: Callable[..., Any], local_size: int | None, bidirectional: bool | None,
    mask: Tensor | None, batch: int, queries: int, device: torch.device | str, config: Any,
) -> Pattern | None:  # fmt: skip
    """`_pattern` where closures cannot be opened (torch.compile), from what the caller passes.

    Without user functions (`use_vmap`), an intersection of masks is a window, a chunk or packing,
    and packing shows in whether a token sees the one before it.
    """
    if function is their.causal_mask_function:
        return CAUSAL
    if function is their.bidirectional_mask_function:
        return FULL
    if bidirectional is not None or function.__qualname__ != _AND.co_qualname:
        return None
    if getattr(config, "attention_chunk_size", None) is not None or queries < 2:
        return None
    if mask is not None:  # transformers looks for packing where there is no padding mask
        return None if local_size is None else Pattern(local_size - 1, 0)
    if local_size is not None and local_size < 2:
        return None
    place = torch.arange(1, queries, device=device)
    rows = torch.arange(batch, device=device)
    sees = function(rows[:, None], 0, place[None], place[None] - 1).expand(batch, queries - 1)
    first = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    packed = torch.cat([first, (~sees).long().cumsum(-1)], dim=1)
    return Pattern(-1 if local_size is None else local_size - 1, 0, packed)


def _document_starts(packed: Tensor, tracing: bool) -> Tensor:
    """int32 `[n + 1]`: where documents begin in the flattened tokens, and the end."""
    new = packed.new_ones(packed.shape, dtype=torch.bool)
    new[:, 1:] = packed[:, 1:] != packed[:, :-1]
    flat = new.flatten()
    if tracing or is_tracing(packed):
        # Their number is no constant of a graph: as many as tokens, the last ones empty.
        document = flat.long().cumsum(0) - 1
        every = torch.arange(flat.shape[0] + 1, device=flat.device)
        return torch.searchsorted(document, every).to(torch.int32)
    starts = flat.nonzero().flatten()
    return torch.nn.functional.pad(starts, (0, 1), value=flat.shape[0]).to(torch.int32)


def _hidden_keys(
    mask: Tensor | None, kv_offset: int, kv_length: int, end: int, tracing: bool
) -> Tensor | None:
    """The part of a 2D padding mask that belongs to the keys, bool; None if it hides none."""
    if mask is None:
        return None
    shown: Any = their.prepare_padding_mask(mask.to(torch.bool), kv_length, kv_offset)
    if not tracing and their.fast_all(shown[:, kv_offset : kv_offset + end]):
        return None
    return shown[:, kv_offset : kv_offset + kv_length]
