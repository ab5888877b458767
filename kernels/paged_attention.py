"""Causal attention over the paged KV cache, for prompts and single tokens alike.

The kernel is that of `attention`, with its order of operations and its guarantees; here a tile of
keys lies in a page. Decoding is bandwidth-bound: the heads of a GQA group are rows of one tile, so
that a decoded token reads each page once, and its splits run in parallel programs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import launch


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    cache_seqlens: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    sinks: Tensor | None,
    softmax_scale: float,
    window_left: int = -1,
    softcap: float = 0.0,
    *,
    batch_invariant: bool = True,
) -> Tensor:
    """o[T, H, Dv]: causal attention of each sequence's last tokens over its cache.

    q[T, H, D]: any strides of T and H; k_cache[pages, Hk, page_size, D], v_cache[pages, Hk,
    page_size, Dv]: contiguous, of q's dtype, or int8 with k_scales, v_scales[pages, Hk,
    page_size] in fp32; block_table[S, P], cu_seqlens_q[S + 1], cache_seqlens[S]: int32 in device
    memory, read there alone. cache_seqlens includes this step's tokens; 0 marks a dead slot, whose
    rows are 0, as are the rows past cu_seqlens_q[S]. Positions of a page that the cache has not,
    or past the block table, are not seen. window_left: keys further back than this are not seen; -1
    is no window. sinks[H] and softcap as in `attention`. Parallel splits are launched
    for P * page_size positions: a captured graph should carry a block table of its bucket's width.
    """
    o = torch.empty((*q.shape[:2], v_cache.shape[3]), dtype=q.dtype, device=q.device)
    launch(
        o,
        None,
        q,
        k_cache,
        v_cache,
        k_scales,
        v_scales,
        block_table,
        cu_seqlens_q,
        cache_seqlens,
        None,
        sinks,
        "paged",
        block_table.shape[1] * k_cache.shape[2],
        softmax_scale,
        window_left,
        0,
        softcap,
        batch_invariant,
    )
    return o
