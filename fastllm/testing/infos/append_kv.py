"""Cases of append_kv and rope_append_kv, and the random paged batches that attention shares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ...ops.append_kv import append_kv_ref
from ...ops.paged_cache import FLOAT, INT8, Which, new_cache, pack_page, quantize_rows
from ...ops.registry import FLOATS
from ...ops.rope import rope_ref
from ..opinfo import Args, Case, OpInfo
from .rope import exact_rope, positions, tables

PAGE = 64


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences of a step: new tokens and cached tokens (new ones included, 0 is a dead slot)."""

    new: tuple[int, ...]
    cached: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 1
    dim: int = 64
    value_dim: int | None = None
    window: int = -1
    page_size: int = PAGE
    int8: bool = False  # the cache
    sinks: bool = False
    softcap: float = 0.0

    @property
    def label(self) -> str:
        lengths = "+".join(f"{n}of{c}" for n, c in zip(self.new, self.cached, strict=True))
        text = f"{lengths}-{self.heads}h{self.kv_heads}-d{self.dim}"
        if self.value_dim:
            text += f"v{self.value_dim}"
        if self.page_size != PAGE:
            text += f"-p{self.page_size}"
        text += ("-int8" if self.int8 else "") + ("-sinks" if self.sinks else "")
        text += f"-cap{self.softcap:g}" if self.softcap else ""
        return text + (f"-w{self.window}" if self.window >= 0 else "")


def make_cache(g: torch.Generator, batch: Batch, dtype: torch.dtype) -> tuple[Any, ...]:
    """Random pages, shuffled: `(k_cache, v_cache, block_table, cu_seqlens_q, cache_seqlens,
    k_scales, v_scales)`, the scales None unless the batch is int8."""
    width = max(1, -(-max(batch.cached) // batch.page_size))
    sequences = len(batch.cached)
    pages = sequences * width + 1
    shape = (pages, batch.kv_heads, batch.page_size)
    k = torch.randn(*shape, batch.dim, generator=g).to(dtype)
    v = torch.randn(*shape, batch.value_dim or batch.dim, generator=g).to(dtype)
    cache = new_cache(
        *shape, batch.dim, torch.int8 if batch.int8 else dtype, value_dim=batch.value_dim
    )
    kinds: tuple[tuple[Tensor, Tensor, Tensor | None, Which], ...]
    kinds = ((k, cache.k, cache.k_scales, "k"), (v, cache.v, cache.v_scales, "v"))
    for rows, to, scales, which in kinds:
        stored = rows
        if scales is not None:
            stored, row_scales = quantize_rows(rows)
            scales.copy_(row_scales)
        to.copy_(pack_page(stored, which))
    table = torch.randperm(pages, generator=g)[: sequences * width].view(sequences, width)
    starts = torch.tensor([0, *accumulate(batch.new)], dtype=torch.int32)
    lengths = torch.tensor(batch.cached, dtype=torch.int32)
    places = (table.int(), starts, lengths)
    return cache.k, cache.v, *places, cache.k_scales, cache.v_scales


_FIRST = Batch(new=(3, 1, 0, 5), cached=(70, 64, 0, 0), kv_heads=2, dim=24)
_WIDER = Batch(new=(1,), cached=(128,), kv_heads=1, dim=80, value_dim=48)
APPENDS = (
    _FIRST,
    replace(_FIRST, int8=True),
    Batch(new=(130, 1), cached=(135, 1), kv_heads=3, dim=64),
    _WIDER,
    replace(_WIDER, int8=True),
    Batch(new=(0,), cached=(0,), kv_heads=2, dim=16),
)


def _append_cases(dtype: torch.dtype) -> Iterator[Case]:
    for batch in APPENDS:

        def make(g: torch.Generator, batch: Batch = batch) -> Args:
            cache = make_cache(g, batch, dtype)
            tokens, value_dim = sum(batch.new), batch.value_dim or batch.dim
            kv = torch.randn(tokens, batch.kv_heads, batch.dim + value_dim, generator=g).to(dtype)
            return kv[..., : batch.dim], kv[..., batch.dim :], *cache

        yield Case(label=batch.label, make=make)


def _rope_append_cases(dtype: torch.dtype) -> Iterator[Case]:
    for batch in APPENDS:

        def make(g: torch.Generator, batch: Batch = batch) -> Args:
            cache = make_cache(g, batch, dtype)
            tokens, value_dim = sum(batch.new), batch.value_dim or batch.dim
            q = torch.randn(tokens, batch.heads, batch.dim, generator=g).to(dtype)
            k = torch.randn(tokens, batch.kv_heads, batch.dim, generator=g).to(dtype)
            v = torch.randn(tokens, batch.kv_heads, value_dim, generator=g).to(dtype)
            return q, k, v, positions(g, tokens), *tables(g, batch.dim), *cache

        yield Case(label=batch.label, make=make)


def _exact_rope_append(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
    places, cos, sin, *cache = rest
    if cache[0].dtype == torch.int8:  # codes of what the rotation gave, its rounding included
        rotated = rope_ref(k, places, cos, sin)
    else:
        rotated = exact_rope(k, places, cos, sin).to(k.dtype)
    append_kv_ref(rotated, v, *cache)
    return exact_rope(q, places, cos, sin)


INFOS = [
    OpInfo(
        name="append_kv",
        cases=_append_cases,
        exact=append_kv_ref,
        dtypes=FLOATS,
        bitwise=True,
        variants=(FLOAT, INT8),
    ),
    OpInfo(
        name="rope_append_kv",
        cases=_rope_append_cases,
        exact=_exact_rope_append,
        dtypes=FLOATS,
        variants=(FLOAT, INT8),
    ),
]
