"""The paged KV cache: its shape, the byte order inside a page, the checks of what indexes it.

A cache is `[num_pages, kv_heads, page_size, head_dim]`. On the GPU a (page, head) is in natural
order. On the CPU it is interleaved so that a vector register holds one dimension (bf16: a pair)
of 16 tokens of K, or one token (bf16: a pair) of V, and attention runs without shuffles:

    K bf16 [page/16][D/2][16][2]   K f32 [page/16][D][16]
    V bf16 [page/2][D][2]          V f32 [page][D] (natural)
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .. import _C
from .checks import values_readable
from .pages import lazy_zeros

PAGE_SIZE = 64
CHUNK = 16  # tokens interleaved in K
_TILE = 64  # positions the native kernel takes at once; a page holds a whole number of them
_MAX_HEAD_DIM = 512

Which = Literal["k", "v"]


def new_cache(
    num_pages: int,
    kv_heads: int,
    page_size: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    value_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Zero-filled `(k_cache, v_cache)`; on the CPU memory is taken when it is first written.

    Args:
        num_pages: pages in the pool.
        kv_heads: heads of K and V.
        page_size: tokens of a page; a multiple of 16 (the kernels want a multiple of 64).
        head_dim: dimensions of a K head, even.
        dtype: dtype of both.
        device: where they live.
        value_dim: dimensions of a V head; default `head_dim`.

    Raises:
        ValueError: on a page size or head dim that the CPU's interleaved order cannot hold.
    """
    if page_size <= 0 or page_size % CHUNK:
        raise ValueError(f"page_size must be a positive multiple of {CHUNK}, got {page_size}")
    if head_dim <= 0 or head_dim % 2:
        raise ValueError(f"head_dim must be positive and even, got {head_dim}")
    shape = (num_pages, kv_heads, page_size)
    k_cache = lazy_zeros((*shape, head_dim), dtype, device)
    return k_cache, lazy_zeros((*shape, value_dim or head_dim), dtype, device)


def pack_page(page: Tensor, which: Which) -> Tensor:
    """`[..., page_size, D]` in natural order -> the CPU's interleaved order, same shape."""
    tokens, dim = page.shape[-2:]
    lead = page.shape[:-2]
    width = _tokens_or_dims_in_a_word(page)
    if which == "k":
        words = page.reshape(*lead, tokens // CHUNK, CHUNK, dim // width, width)
        return words.transpose(-3, -2).reshape(page.shape)
    return page.reshape(*lead, tokens // width, width, dim).transpose(-2, -1).reshape(page.shape)


def unpack_page(page: Tensor, which: Which) -> Tensor:
    """The inverse of `pack_page`."""
    tokens, dim = page.shape[-2:]
    lead = page.shape[:-2]
    width = _tokens_or_dims_in_a_word(page)
    if which == "k":
        words = page.reshape(*lead, tokens // CHUNK, dim // width, CHUNK, width)
        return words.transpose(-3, -2).reshape(page.shape)
    return page.reshape(*lead, tokens // width, dim, width).transpose(-2, -1).reshape(page.shape)


def _tokens_or_dims_in_a_word(page: Tensor) -> int:
    return 2 if page.element_size() == 2 else 1


def read_pages(cache: Tensor, pages: Tensor, which: Which) -> Tensor:
    """The tokens of `pages` `[n]` in natural order: `[kv_heads, n * page_size, D]`, any device."""
    rows = cache[pages.long()]
    if cache.device.type == "cpu":
        rows = unpack_page(rows, which)
    return rows.transpose(0, 1).flatten(1, 2)


def write_pages(cache: Tensor, pages: Tensor, rows: Tensor, which: Which) -> None:
    """The inverse of `read_pages`: store `rows` `[kv_heads, n * page_size, D]` into `pages`."""
    page_rows = rows.unflatten(1, (-1, cache.shape[2])).transpose(0, 1)
    if cache.device.type == "cpu":
        page_rows = pack_page(page_rows, which)
    cache[pages.long()] = page_rows


def native_cache(k_cache: Tensor, v_cache: Tensor, block_table: Tensor) -> bool:
    """Whether the native kernels take this cache."""
    return (
        k_cache.shape[2] % _TILE == 0
        and k_cache.shape[3] % 2 == 0
        and max(k_cache.shape[3], v_cache.shape[3]) <= _MAX_HEAD_DIM
        and block_table.stride(-1) == 1
    )


def check_paging(
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    cache_seqlens: Tensor,
    tokens: int,
) -> None:
    """Raise ValueError, naming the argument, unless these tensors index a paged cache.

    Shapes and dtypes are always checked, values where they can be read. Kernels stay inside the
    cache whatever the values are.
    """
    if k_cache.ndim != 4 or v_cache.ndim != 4 or k_cache.shape[:3] != v_cache.shape[:3]:
        raise ValueError(
            "k_cache and v_cache must have shape [num_pages, kv_heads, page_size, head_dim] and "
            f"differ in head_dim at most, got {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
        )
    if k_cache.dtype != v_cache.dtype:
        raise ValueError(f"v_cache must be {k_cache.dtype} like k_cache, got {v_cache.dtype}")
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("k_cache and v_cache must be contiguous")
    check_index(
        block_table, cu_seqlens_q, cache_seqlens, tokens, k_cache.shape[0], k_cache.shape[2]
    )


def check_index(
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    cache_seqlens: Tensor,
    tokens: int,
    num_pages: int,
    page_size: int,
) -> None:
    """Raise ValueError, naming the argument, unless these index `num_pages` pages.

    Shapes and dtypes are always checked, values where they can be read (`values_readable`).
    """
    for name, index in (
        ("block_table", block_table),
        ("cu_seqlens_q", cu_seqlens_q),
        ("cache_seqlens", cache_seqlens),
    ):
        if index.dtype != torch.int32:
            raise ValueError(f"{name} must be int32, got {index.dtype}")
    sequences = cache_seqlens.shape[0] if cache_seqlens.ndim == 1 else -1
    if sequences < 0:
        raise ValueError(f"cache_seqlens must have shape [S], got {tuple(cache_seqlens.shape)}")
    if block_table.ndim != 2 or block_table.shape[0] != sequences:
        raise ValueError(
            f"block_table must have shape [{sequences}, pages] (a row per entry of cache_seqlens), "
            f"got {tuple(block_table.shape)}"
        )
    if cu_seqlens_q.shape != (sequences + 1,):
        raise ValueError(
            f"cu_seqlens_q must have shape [{sequences + 1}] (entries of cache_seqlens + 1), "
            f"got {tuple(cu_seqlens_q.shape)}"
        )
    if values_readable(block_table):
        _C.check_paging_values(
            block_table, cu_seqlens_q, cache_seqlens, tokens, num_pages, page_size
        )
