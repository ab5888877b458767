"""Attention over the compressed cache of multi-head latent attention (DeepSeek-V2, 2405.04434).

A cached position is one row for all heads: the normed latent, of which every head's key and value
are linear maps, and behind it the rotated key that the heads share. With its part of the key map
absorbed into the query, a head's score is a product of rows, and its output the weighted sum of
latents, to which its value map is applied afterwards. So `mla_attention` is attention with one KV
head whose values are the first columns of its keys: a position is read once for all heads.

KV tiles of 64 positions and splits of 512 count from position 0, as in `paged_attention`: a row's
bits do not depend on chunking, paging or what else is in the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from .attention_ref import attend, visible_keys
from .checks import MAX_HEAD_DIM, laid_out
from .paged_cache import (
    PAGE_SIZE,
    TILE,
    check_index,
    check_page_size,
    index_laid_out,
    native_partials,
)
from .pages import lazy_zeros
from .registry import FLOATS, Op, batch_invariant


def new_mla_cache(
    num_pages: int,
    page_size: int = PAGE_SIZE,
    width: int = 576,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Zero-filled `[num_pages, page_size, width]`, in natural order on every device.

    Args:
        num_pages: pages in the pool.
        page_size: tokens of a page; a multiple of 64 on the CPU, of 16 elsewhere.
        width: columns of the latent and of the rotated key together.
        dtype: float32, bfloat16 or float16.
        device: where it lives; on the CPU memory is taken when it is first written.

    Raises:
        ValueError: on a page size or width that cannot be.
    """
    check_page_size("page_size", page_size, torch.device(device))
    if num_pages < 0:
        raise ValueError(f"num_pages must be 0 or more, got {num_pages}")
    if width <= 0:
        raise ValueError(f"width must be positive, got {width}")
    return lazy_zeros((num_pages, page_size, width), dtype, device)


def append_mla_ref(
    latent: Tensor,
    rope_key: Tensor,
    cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    cache_seqlens: Tensor,
) -> None:
    """Plain PyTorch definition of `append_mla`."""
    page_size = cache.shape[1]
    rows = torch.cat((latent, rope_key), dim=-1)
    starts = cu_seqlens_q.tolist()
    for s, length in enumerate(cache_seqlens.tolist()):
        begin, end = starts[s], starts[s + 1]
        if length == 0 or begin == end:
            continue
        position = torch.arange(length - (end - begin), length, device=cache.device)
        pages = block_table[s].long()[position // page_size]
        cache[pages, position % page_size] = rows[begin:end]


def mla_attention_ref(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    cache_seqlens: Tensor,
    value_dim: int,
    softmax_scale: float,
) -> Tensor:
    """Plain PyTorch definition of `mla_attention`: fp32, but P is rounded to the dtype of q."""
    page_size = cache.shape[1]
    out = q.new_zeros(q.shape[0], q.shape[1], value_dim)
    starts = cu_seqlens_q.tolist()
    for s, length in enumerate(cache_seqlens.tolist()):
        begin, end = starts[s], starts[s + 1]
        if length == 0 or begin == end:
            continue
        pages = block_table[s, : -(-length // page_size)].long()
        k = cache[pages].flatten(0, 1)[:length, None]  # [Tk, 1, R + P]
        visible = visible_keys(q[begin:end], k, None, -1, 0)
        out[begin:end], _ = attend(
            q[begin:end], k, k[..., :value_dim], visible, None, softmax_scale
        )
    return out


def _nothing(*_: Any) -> None:
    return None


def _mla_attention_fake(q: Tensor, *args: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], args[4])


_append_mla = Op(
    "append_mla(Tensor latent, Tensor rope_key, Tensor(a!) cache, Tensor block_table,"
    " Tensor cu_seqlens_q, Tensor cache_seqlens) -> ()",
    append_mla_ref,
    fake=_nothing,
)
_mla_attention = Op(
    "mla_attention(Tensor q, Tensor cache, Tensor block_table, Tensor cu_seqlens_q,"
    " Tensor cache_seqlens, int value_dim, float softmax_scale) -> Tensor",
    mla_attention_ref,
    fake=_mla_attention_fake,
)


@_append_mla.impl("native", "cpu", dtypes=FLOATS)
def _append_mla_cpu(
    latent: Tensor, rope_key: Tensor, cache: Tensor, block_table: Tensor, *lengths: Tensor
) -> None:
    rows = laid_out("latent", latent), laid_out("rope_key", rope_key)
    _C.append_mla(*rows, cache, laid_out("block_table", block_table), *lengths)


@_append_mla.impl("triton", "cuda", dtypes=FLOATS)
def _append_mla_triton(latent: Tensor, rope_key: Tensor, cache: Tensor, *index: Tensor) -> None:
    from ..kernels import mla_attention as kernel

    rows = laid_out("latent", latent), laid_out("rope_key", rope_key)
    kernel.append_mla(*rows, cache, *index_laid_out(*index))


def _triton_supports(q: Tensor, cache: Tensor, block_table: Tensor, *args: Any) -> bool:
    page_size, width, value_dim = cache.shape[1], cache.shape[2], args[2]
    return page_size & (page_size - 1) == 0 and value_dim < width


def _native_mla(q: Tensor, cache: Tensor, block_table: Tensor, *args: Any) -> bool:
    width, value_dim = cache.shape[2], args[2]
    return width % 8 == 0 and value_dim % 8 == 0 and width <= MAX_HEAD_DIM


@_mla_attention.impl("native", "cpu", dtypes=FLOATS, when=_native_mla)
def _mla_attention_cpu(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    cache_seqlens: Tensor,
    value_dim: int,
    softmax_scale: float,
) -> Tensor:
    q, block_table = laid_out("q", q), laid_out("block_table", block_table)
    tokens, heads, _ = q.shape
    o = q.new_empty(tokens, heads, value_dim)
    partials = native_partials(tokens, heads, value_dim, block_table, cache.shape[1])
    paging = (block_table, cu_seqlens_q, cache_seqlens)
    _C.mla_attention(o, q, cache, *paging, partials, value_dim, softmax_scale)
    return o


@_mla_attention.impl("triton", "cuda", dtypes=FLOATS, when=_triton_supports)
def _mla_attention_triton(q: Tensor, cache: Tensor, *args: Any) -> Tensor:
    from ..kernels import mla_attention as kernel

    lengths = index_laid_out(*args[:3])
    return kernel.mla_attention(
        laid_out("q", q), cache, *lengths, *args[3:], batch_invariant=batch_invariant()
    )


def append_mla(
    latent: Tensor,
    rope_key: Tensor,
    cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    cache_seqlens: Tensor,
) -> None:
    """Write this step's latents and shared keys into their pages.

    Token i of sequence s goes to position `cache_seqlens[s] - len_q(s) + i`; a dead slot writes
    nothing.

    Args:
        latent: `[T, R]` in the cache's dtype, already normed; any strides.
        rope_key: `[T, P]`, already rotated; any strides.
        cache: `[num_pages, page_size, R + P]` as `new_mla_cache` makes it; written.
        block_table: `[S, P]` int32, the pages of each sequence in order.
        cu_seqlens_q: `[S + 1]` int32, where each sequence's tokens begin.
        cache_seqlens: `[S]` int32, tokens of each sequence *including* these; 0 marks a dead slot.

    Raises:
        ValueError: on mismatched shapes or dtypes, pages outside the cache, lengths outside the
            table.
    """
    _check_cache(cache)
    for name, rows in (("latent", latent), ("rope_key", rope_key)):
        if rows.ndim != 2:
            raise ValueError(f"{name} must have shape [T, columns], got {tuple(rows.shape)}")
        if rows.dtype != cache.dtype:
            raise ValueError(f"{name} must be {cache.dtype} like cache, got {rows.dtype}")
    if rope_key.shape[0] != latent.shape[0]:
        raise ValueError(
            f"rope_key must have the {latent.shape[0]} tokens of latent, got {rope_key.shape[0]}"
        )
    if latent.shape[1] + rope_key.shape[1] != cache.shape[2]:
        raise ValueError(
            f"latent and rope_key must fill the {cache.shape[2]} columns of cache, they have "
            f"{latent.shape[1]} and {rope_key.shape[1]}"
        )
    _check_places(cache, block_table, cu_seqlens_q, cache_seqlens, latent.shape[0])
    _append_mla(latent, rope_key, cache, block_table, cu_seqlens_q, cache_seqlens)


def mla_attention(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    cache_seqlens: Tensor,
    value_dim: int,
    softmax_scale: float,
) -> Tensor:
    """Causal attention of each sequence's last tokens over its compressed pages.

    Args:
        q: `[T, H, R + P]` in the cache's dtype: the key map absorbed, then the rotated part.
        cache: `[num_pages, page_size, R + P]`, with this step's rows already appended.
        block_table: `[S, P]` int32.
        cu_seqlens_q: `[S + 1]` int32; the last `len_q(s)` positions of sequence s are its queries.
        cache_seqlens: `[S]` int32, this step's tokens included; rows of a dead slot (0) are 0.
        value_dim: R, how many leading columns of a row are its value.
        softmax_scale: factor of the scores. It has no default: it is that of the uncompressed head
            dim, which these shapes do not tell.

    Returns:
        `[T, H, value_dim]`, contiguous, in the dtype of `q`: the value map is still to be applied.

    Raises:
        ValueError: on mismatched shapes or dtypes, pages outside the cache, lengths outside the
            table.
    """
    _check_cache(cache)
    if q.ndim != 3 or q.shape[1] == 0 or q.shape[2] != cache.shape[2]:
        raise ValueError(
            f"q must have shape [T, H, {cache.shape[2]}] (the columns of cache) with at least one "
            f"head, got {tuple(q.shape)}"
        )
    if q.dtype != cache.dtype:
        raise ValueError(f"q must be {cache.dtype} like cache, got {q.dtype}")
    if not 1 <= value_dim <= cache.shape[2]:
        raise ValueError(
            f"value_dim must be from 1 to the {cache.shape[2]} columns of cache, got {value_dim}"
        )
    _check_places(cache, block_table, cu_seqlens_q, cache_seqlens, q.shape[0])
    return _mla_attention(
        q, cache, block_table, cu_seqlens_q, cache_seqlens, value_dim, softmax_scale
    )


def _check_cache(cache: Tensor) -> None:
    if cache.ndim != 3 or cache.dtype not in FLOATS or not cache.is_contiguous():
        raise ValueError(
            "cache must be contiguous float32, bfloat16 or float16 of shape "
            f"[num_pages, page_size, columns], got {cache.dtype} of {tuple(cache.shape)} with "
            f"strides {cache.stride()}"
        )
    if cache.shape[1] % TILE:
        check_page_size("the page_size of cache", cache.shape[1], cache.device)


def _check_places(
    cache: Tensor, block_table: Tensor, cu_seqlens_q: Tensor, cache_seqlens: Tensor, tokens: int
) -> None:
    check_index(block_table, cu_seqlens_q, cache_seqlens, tokens, cache.shape[0], cache.shape[1])
