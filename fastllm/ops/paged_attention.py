"""Causal attention over a paged KV cache, for prompts, chunks of prompts and single tokens alike.

`append_kv` writes a step's keys and values, `paged_attention` attends to them; `rope_append_kv`
is the two rotations and the append of a decoder layer in one pass. The online softmax is that of
FlashAttention (Dao et al., 2022): KV tiles of 64 positions and splits of 512, both counted from a
sequence's position 0, so that a row's bits do not depend on how its prompt was cut, where its
pages lie, or what else is in the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from .paged_cache import check_paging, native_cache, read_pages
from .registry import Op, batch_invariant


def paged_attention_ref(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    cache_seqlens: Tensor,
    softmax_scale: float,
    window_left: int = -1,
) -> Tensor:
    """Plain PyTorch definition of `paged_attention`: fp32, but P is rounded to the dtype of q."""
    page_size = k_cache.shape[2]
    out = q.new_zeros(q.shape[0], q.shape[1], v_cache.shape[3])
    starts = cu_seqlens_q.tolist()
    for s, length in enumerate(cache_seqlens.tolist()):
        begin, end = starts[s], starts[s + 1]
        if length == 0 or begin == end:
            continue
        pages = block_table[s, : -(-length // page_size)]
        k = read_pages(k_cache, pages, "k")[:, :length].float()
        v = read_pages(v_cache, pages, "v")[:, :length].float()
        out[begin:end] = _attend(q[begin:end], k, v, softmax_scale, window_left)
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, window_left: int) -> Tensor:
    """q `[Tq, H, D]` over fp32 k, v `[Hk, Tk, D]`, causal, aligned at the ends: `[Tq, H, Dv]`."""
    tokens, heads, dim = q.shape
    rows = q.float().transpose(0, 1).reshape(k.shape[0], -1, dim)  # [Hk, group * Tq, D]
    # Not q times a broadcast k: torch gives that to a product without blocked sums (3.6 times the
    # error of its own attention with D = 256).
    scores = (rows @ k.transpose(-1, -2)).unflatten(1, (-1, tokens)) * softmax_scale
    key = torch.arange(k.shape[1], device=q.device)
    query = key[k.shape[1] - tokens :, None]
    visible = key <= query
    if window_left >= 0:
        visible &= key >= query - window_left
    scores = scores.masked_fill(~visible, float("-inf"))
    p = (scores - scores.amax(-1, keepdim=True)).exp()
    out = (p.to(q.dtype).float().flatten(1, 2) @ v).unflatten(1, (-1, tokens))
    out = out / p.sum(-1, keepdim=True)
    return out.reshape(heads, tokens, -1).transpose(0, 1).to(q.dtype)


def _paged_attention_fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v_cache.shape[3])


_paged_attention = Op(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table,"
    " Tensor cu_seqlens_q, Tensor cache_seqlens, float softmax_scale,"
    " int window_left=-1) -> Tensor",
    paged_attention_ref,
    fake=_paged_attention_fake,
)


_SPLIT = 512  # positions of a split, the unit that decode may run on another thread


def _native_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, *_: Any
) -> bool:
    dims_fit = k_cache.shape[3] % 8 == 0 and v_cache.shape[3] % 8 == 0
    return q.stride(-1) == 1 and dims_fit and native_cache(k_cache, v_cache, block_table)


@_paged_attention.impl("native", "cpu", when=_native_attention)
def _paged_attention_cpu(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    cache_seqlens: Tensor,
    softmax_scale: float,
    window_left: int = -1,
) -> Tensor:
    tokens, heads, _ = q.shape
    value_dim = v_cache.shape[3]
    o = torch.empty(tokens, heads, value_dim, dtype=q.dtype)
    # With few tokens a sequence there are few tasks: let its splits run on several threads. The
    # bits are the same either way, and what the system has not mapped costs nothing.
    partials = None
    positions = block_table.shape[1] * k_cache.shape[2]
    if tokens <= 4 * block_table.shape[0] and positions > _SPLIT:
        row = -(-value_dim // 16) * 16 + 16
        partials = torch.empty(-(-positions // _SPLIT) * tokens * heads * row)
    _C.paged_attention(
        o,
        q,
        k_cache,
        v_cache,
        block_table,
        cu_seqlens_q,
        cache_seqlens,
        partials,
        softmax_scale,
        window_left,
    )
    return o


@_paged_attention.impl("triton", "cuda")
def _paged_attention_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    cache_seqlens: Tensor,
    *numbers: Any,
) -> Tensor:
    from ..kernels import paged_attention as kernel

    cache = k_cache, v_cache, block_table, cu_seqlens_q, cache_seqlens, None, None, None
    return kernel.paged_attention(q, *cache, *numbers, batch_invariant=batch_invariant())


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    cache_seqlens: Tensor,
    softmax_scale: float | None = None,
    window_left: int = -1,
) -> Tensor:
    """Causal attention of each sequence's last tokens over its pages, themselves included.

    Args:
        q: `[T, H, D]` in the caches' dtype, rotated; H is a multiple of the caches' heads (GQA).
        k_cache: `[num_pages, Hk, page_size, D]`, with this step's keys already appended.
        v_cache: `[num_pages, Hk, page_size, Dv]`.
        block_table: `[S, P]` int32.
        cu_seqlens_q: `[S + 1]` int32; the last `len_q(s)` positions of sequence s are its queries.
        cache_seqlens: `[S]` int32, this step's tokens included; rows of a dead slot (0) are 0.
        softmax_scale: factor of the scores; default `D ** -0.5`.
        window_left: a query sees itself and this many positions before it; -1 is no window.

    Returns:
        `[T, H, Dv]`, contiguous, in the dtype of `q`.

    Raises:
        ValueError: on mismatched shapes or dtypes, pages outside the cache, lengths outside the
            table.
    """
    if q.ndim != 3 or k_cache.ndim != 4 or q.shape[2] != k_cache.shape[3]:
        raise ValueError(
            f"q must have shape [T, H, D] with the D of k_cache {tuple(k_cache.shape)}, "
            f"got {tuple(q.shape)}"
        )
    if q.dtype != k_cache.dtype:
        raise ValueError(f"q must be {k_cache.dtype} like k_cache, got {q.dtype}")
    kv_heads = k_cache.shape[1]
    if kv_heads == 0 or q.shape[1] == 0 or q.shape[1] % kv_heads:
        raise ValueError(
            f"the heads of q must be a positive multiple of the {kv_heads} of k_cache, "
            f"got {q.shape[1]}"
        )
    if window_left < -1:
        raise ValueError(f"window_left must be -1 (no window) or at least 0, got {window_left}")
    check_paging(k_cache, v_cache, block_table, cu_seqlens_q, cache_seqlens, q.shape[0])
    if softmax_scale is None:
        softmax_scale = q.shape[2] ** -0.5
    return _paged_attention(
        q, k_cache, v_cache, block_table, cu_seqlens_q, cache_seqlens, softmax_scale, window_left
    )
