"""Cases of paged_attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ops.paged_attention import paged_attention_ref
from ...ops.paged_cache import FLOAT, INT8, read_pages, read_scales
from ...ops.registry import FLOATS
from ..opinfo import Args, Case, OpInfo
from .append_kv import Batch, make_cache

# Together: T 0, 1, 3, 17, 65, 130; every head dim class; GQA 1 to 9/3; chunks of longer contexts;
# several splits of 512; windows that begin inside a tile and a split; dead slots.
BATCHES = (
    Batch(new=(1,), cached=(1,), heads=1, kv_heads=1, dim=16),
    Batch(new=(3, 17, 0, 5), cached=(3, 80, 0, 0), heads=4, kv_heads=1, dim=24),
    Batch(new=(130,), cached=(130,), heads=9, kv_heads=3, dim=64),
    Batch(new=(65, 1, 1), cached=(600, 1100, 64), heads=8, kv_heads=8, dim=80),
    Batch(new=(17, 1), cached=(17, 1030), heads=4, kv_heads=1, dim=128, window=100),
    Batch(new=(1, 1, 1), cached=(700, 0, 513), heads=14, kv_heads=2, dim=256, window=0),
    Batch(new=(130,), cached=(530,), heads=6, kv_heads=1, dim=40, value_dim=24, window=70),
    Batch(new=(0,), cached=(10,), heads=4, kv_heads=4, dim=64),
    Batch(new=(5, 1), cached=(300, 129), heads=5, kv_heads=1, dim=32, page_size=128),
)
# The variants, each alone and together: caches of codes, sinks, capped scores.
VARIANTS = tuple(
    replace(batch, **options)
    for batch in (
        Batch(new=(17, 1), cached=(80, 1030), heads=6, kv_heads=2, dim=48, value_dim=64),
        Batch(new=(70, 0, 1), cached=(130, 0, 513), heads=4, kv_heads=4, dim=128, window=40),
    )
    for options in (
        {"int8": True},
        {"sinks": True},
        {"softcap": 3.0},
        {"int8": True, "sinks": True, "softcap": 20.0},
    )
)
FULL_BATCHES = tuple(
    replace(batch, heads=heads, kv_heads=kv_heads, dim=dim, window=window)
    for batch in (
        Batch(new=(1, 3, 17), cached=(65, 3, 1041)),
        Batch(new=(65, 130), cached=(65, 640)),
    )
    for heads, kv_heads in ((1, 1), (4, 1), (9, 3), (8, 8), (7, 1), (12, 1))
    for dim in (16, 24, 64, 80, 128, 256)
    for window in (-1, 33)
)
BENCH = (
    Batch(new=(512,), cached=(512,), heads=9, kv_heads=3, dim=64),
    Batch(new=(2048,), cached=(2048,), heads=32, kv_heads=8, dim=128),
    Batch(new=(1,), cached=(256,), heads=9, kv_heads=3, dim=64),
    Batch(new=(1,), cached=(16384,), heads=32, kv_heads=8, dim=128),
)


def _attention_case(batch: Batch, dtype: torch.dtype, full: bool = False) -> Case:
    def make(g: torch.Generator) -> Args:
        cache = make_cache(g, batch, dtype)
        q = torch.randn(sum(batch.new), batch.heads, batch.dim, generator=g).to(dtype)
        sinks = torch.randn(batch.heads, generator=g) * 2 if batch.sinks else None
        return q, *cache, sinks, batch.dim**-0.5, batch.window, batch.softcap

    return Case(label=batch.label, make=make, full=full)


def _attention_cases(dtype: torch.dtype) -> Iterator[Case]:
    for batch in (*BATCHES, *VARIANTS):
        yield _attention_case(batch, dtype)
    for batch in FULL_BATCHES:
        yield _attention_case(batch, dtype, full=True)


def _dense(sdpa: Callable[..., Tensor], dtype: torch.dtype | None) -> Callable[..., Tensor]:
    """Attention of each sequence over its gathered values by `sdpa(q, k, v, visible, scale, sinks,
    softcap)`."""

    def attention(
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_table: Tensor,
        cu_seqlens_q: Tensor,
        cache_seqlens: Tensor,
        k_scales: Tensor | None,
        v_scales: Tensor | None,
        sinks: Tensor | None,
        scale: float,
        window: int = -1,
        softcap: float = 0.0,
    ) -> Tensor:
        group = q.shape[1] // k_cache.shape[1]
        out = torch.zeros(*q.shape[:2], v_cache.shape[3], dtype=dtype or q.dtype)
        starts = cu_seqlens_q.tolist()
        for s, length in enumerate(cache_seqlens.tolist()):
            rows = slice(starts[s], starts[s + 1])
            new = rows.stop - rows.start
            if length == 0 or new == 0:
                continue
            pages = block_table[s, : -(-length // k_cache.shape[2])]
            k, v = (
                _values(cache, of, pages, which)[:, :length].repeat_interleave(group, 0)
                for cache, of, which in ((k_cache, k_scales, "k"), (v_cache, v_scales, "v"))
            )
            key, query = torch.arange(length), torch.arange(length - new, length)[:, None]
            visible = key <= query
            if window >= 0:
                visible &= key >= query - window
            o = sdpa(q[rows].transpose(0, 1), k, v, visible, scale, sinks, softcap)
            out[rows] = o.transpose(0, 1)
        return out

    return attention


def _values(cache: Tensor, scales: Tensor | None, pages: Tensor, which: Any) -> Tensor:
    rows = read_pages(cache, pages, which)
    return rows if scales is None else rows.double() * read_scales(scales, pages)[..., None]


def _exact_sdpa(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, sinks: Tensor | None,
    softcap: float,
) -> Tensor:  # fmt: skip
    scores = q.double() @ k.double().transpose(-1, -2) * scale
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        sink = sinks.double()[:, None, None].expand(-1, q.shape[1], 1)
        scores = torch.cat((scores, sink), -1)
    return scores.softmax(-1)[..., : k.shape[1]] @ v.double()


def _torch_sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, *_: Any) -> Tensor:
    out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=visible, scale=scale)
    return out[0]


def _peer(*args: Any) -> Tensor:
    """Torch's attention where it has such a one and in a dtype that it is made for."""
    q, k_scales, sinks, softcap = args[0], args[6], args[8], args[11]
    if k_scales is None and sinks is None and not softcap and q.dtype != torch.float16:
        return _dense(_torch_sdpa, None)(*args)
    return paged_attention_ref(*args)


def _dense_inputs(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, *rest: Any
) -> Args:
    """One sequence as torch's attention likes it best: dense; heads repeated for a prompt (16 ms
    against 25 with enable_gqa, 512 tokens of 9/3 heads), not for one token (120 against 100)."""
    length = int(rest[1][0])
    pages = block_table[0, : -(-length // k_cache.shape[2])]
    k, v = read_pages(k_cache, pages, "k")[:, :length], read_pages(v_cache, pages, "v")[:, :length]
    if q.shape[0] > 1:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[0], 0) for t in (k, v))
    return q.transpose(0, 1)[None].contiguous(), k[None].contiguous(), v[None].contiguous(), rest[5]


def _causal_sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    grouped = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=q.shape[2] > 1, scale=scale, enable_gqa=grouped
    )


def _attention_flops(q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Tensor) -> int:
    _, starts, lengths = rest[:3]
    new = (starts[1:] - starts[:-1]).double()
    seen = (new * lengths - new * (new - 1) / 2).sum().item()  # scores of one head
    return int(2 * seen * q.shape[1] * (q.shape[2] + v_cache.shape[3]))


def _attention_bytes(q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Tensor) -> int:
    per_token = k_cache.shape[1] * (k_cache.shape[3] + v_cache.shape[3]) * k_cache.element_size()
    return int(rest[2].sum()) * per_token + 2 * q.nbytes


def _bench_cases(dtype: torch.dtype) -> Iterator[Case]:
    if dtype != torch.float16:  # torch's own products of halves take hundreds of times as long
        for batch in BENCH:
            yield _attention_case(batch, dtype)


INFOS = [
    OpInfo(
        name="paged_attention",
        cases=_attention_cases,
        exact=_dense(_exact_sdpa, torch.float64),
        dtypes=FLOATS,
        peer=_peer,
        bench_cases=_bench_cases,
        bench_peer=(_dense_inputs, _causal_sdpa),
        flops=_attention_flops,
        bytes_moved=_attention_bytes,
        variants=(FLOAT, INT8),
    ),
]
