"""The paged KV cache: its shape, the byte order inside a page, the checks of what indexes it.

A cache is `[num_pages, kv_heads, page_size, head_dim]`. On the GPU a (page, head) is in natural
order. On the CPU it is interleaved so that a vector register holds one dimension (narrow types: a
pair) of 16 tokens of K, or one token (narrow types: a pair) of V, and attention runs without
shuffles:

    K bf16, f16, int8 [page/16][D/2][16][2]   K f32 [page/16][D][16]
    V bf16, f16, int8 [page/2][D][2]          V f32 [page][D] (natural)

An int8 cache holds codes of -127 to 127; a row (one token of one head) has one float32 scale, kept
beside it in `[num_pages, kv_heads, page_size]`, natural order on every device.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .. import _C
from .checks import MAX_HEAD_DIM, laid_out, values_readable
from .pages import lazy_zeros
from .registry import FLOATS

PAGE_SIZE = 64
CHUNK = 16  # tokens interleaved in K
TILE = 64  # positions the native kernel takes at once; a page holds a whole number of them
SPLIT = 512  # positions of a split, the unit that decode may run on another thread
CACHE_DTYPES = (*FLOATS, torch.int8)
FLOAT, INT8 = "float-cache", "int8-cache"  # the variants of ops on a cache
_LARGEST_CODE = 127

Which = Literal["k", "v"]


class KvCache(NamedTuple):
    """The pages of one layer; the scales are None unless the cache is int8."""

    k: Tensor  # [num_pages, kv_heads, page_size, head_dim]
    v: Tensor  # [num_pages, kv_heads, page_size, value_dim]
    k_scales: Tensor | None = None  # float32 [num_pages, kv_heads, page_size]
    v_scales: Tensor | None = None


def new_cache(
    num_pages: int,
    kv_heads: int,
    page_size: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    value_dim: int | None = None,
) -> KvCache:
    """Zero-filled pages; on the CPU memory is taken when it is first written.

    Args:
        num_pages: pages in the pool.
        kv_heads: heads of K and V.
        page_size: tokens of a page; a multiple of 64 on the CPU, of 16 elsewhere.
        head_dim: dimensions of a K head, even.
        dtype: of both: float32, bfloat16, float16, or int8, which brings scales.
        device: where they live.
        value_dim: dimensions of a V head; default `head_dim`.

    Raises:
        ValueError: naming the argument: on another dtype, on a page size or head dim that the
            kernels cannot take, on counts that cannot be.
    """
    if dtype not in CACHE_DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16, float16 or int8, got {dtype}")
    check_page_size("page_size", page_size, torch.device(device))
    value_dim = head_dim if value_dim is None else value_dim
    if num_pages < 0:
        raise ValueError(f"num_pages must be 0 or more, got {num_pages}")
    for name, count in (("kv_heads", kv_heads), ("value_dim", value_dim)):
        if count <= 0:
            raise ValueError(f"{name} must be positive, got {count}")
    if head_dim <= 0 or head_dim % 2:
        raise ValueError(f"head_dim must be positive and even, got {head_dim}")
    shape = (num_pages, kv_heads, page_size)
    k = lazy_zeros((*shape, head_dim), dtype, device)
    v = lazy_zeros((*shape, value_dim), dtype, device)
    if dtype != torch.int8:
        return KvCache(k, v)
    k_scales, v_scales = (lazy_zeros(shape, torch.float32, device) for _ in range(2))
    return KvCache(k, v, k_scales, v_scales)


def check_page_size(name: str, page_size: int, device: torch.device) -> None:
    """Raise ValueError unless kernels take pages of this size (`name` says whose it is)."""
    unit = TILE if device.type == "cpu" else CHUNK
    if page_size <= 0 or page_size % unit:
        raise ValueError(
            f"{name} must be a positive multiple of {unit} on {device.type}, got {page_size}"
        )


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 `[..., D]` and scales float32 `[...]` of the rows of `x`: x ~ code * scale.

    scale = amax(|x|) / 127, code = x / scale rounded to nearest, ties to even. A row whose scale
    is 0 has codes 0; NaN or infinity makes the scale so, hence every score with the row.
    """
    x = x.float()
    top = x.abs().amax(-1)
    scale = top / torch.full_like(top, _LARGEST_CODE)  # by a number, CUDA multiplies by 1 / 127
    codes = (x / scale[..., None]).clamp(-_LARGEST_CODE, _LARGEST_CODE).round()
    return codes.nan_to_num(nan=0.0).mul(scale[..., None] != 0).to(torch.int8), scale


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
    return 2 if page.element_size() <= 2 else 1


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


def read_scales(scales: Tensor, pages: Tensor) -> Tensor:
    """The scales of the rows of `pages` `[n]`: `[kv_heads, n * page_size]`."""
    return scales[pages.long()].transpose(0, 1).flatten(1)


def write_scales(scales: Tensor, pages: Tensor, rows: Tensor) -> None:
    """The inverse of `read_scales`."""
    scales[pages.long()] = rows.unflatten(1, (-1, scales.shape[2])).transpose(0, 1)


def cache_variant(k_cache: Tensor) -> str:
    """Which variant of an op serves this cache."""
    return INT8 if k_cache.dtype == torch.int8 else FLOAT


def native_cache(k_cache: Tensor, v_cache: Tensor) -> bool:
    """Whether the native kernels take this cache."""
    return max(k_cache.shape[3], v_cache.shape[3]) <= MAX_HEAD_DIM


def index_laid_out(
    block_table: Tensor, cu_seqlens_q: Tensor, cache_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The three contiguous, as the Triton kernels read them."""
    return (
        block_table.contiguous(),
        laid_out("cu_seqlens_q", cu_seqlens_q),
        laid_out("cache_seqlens", cache_seqlens),
    )


def native_partials(
    tokens: int, heads: int, value_dim: int, block_table: Tensor, page_size: int
) -> Tensor | None:
    """Where the native kernels keep splits that run on several threads; None: they do not.

    With few tokens a sequence there are few tasks. The bits are the same either way, and what the
    system has not mapped costs nothing.
    """
    positions = block_table.shape[1] * page_size
    if tokens > 4 * block_table.shape[0] or positions <= SPLIT:
        return None
    row = -(-value_dim // 16) * 16 + 16
    return block_table.new_empty(-(-positions // SPLIT) * tokens * heads * row, dtype=torch.float32)


def check_paging(
    cache: KvCache, block_table: Tensor, cu_seqlens_q: Tensor, cache_seqlens: Tensor, tokens: int
) -> None:
    """Raise ValueError, naming the argument, unless these tensors index a paged cache.

    Shapes, dtypes and devices are always checked, values where they can be read. Kernels stay
    inside the cache whatever the values are.
    """
    _check_cache(cache)
    check_device("block_table", block_table, cache.k)
    num_pages, _, page_size, _ = cache.k.shape
    check_index(block_table, cu_seqlens_q, cache_seqlens, tokens, num_pages, page_size)


def check_index(
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    cache_seqlens: Tensor,
    tokens: int,
    num_pages: int,
    page_size: int,
) -> None:
    """Raise ValueError, naming the argument, unless these index `num_pages` pages.

    Shapes, dtypes and devices are always checked, values where they can be read
    (`values_readable`).
    """
    for name, index in (
        ("block_table", block_table),
        ("cu_seqlens_q", cu_seqlens_q),
        ("cache_seqlens", cache_seqlens),
    ):
        if index.dtype != torch.int32:
            raise ValueError(f"{name} must be int32, got {index.dtype}")
        if index.device != block_table.device:
            raise ValueError(
                f"{name} must be on {block_table.device} like block_table, is on {index.device}"
            )
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


def check_device(name: str, tensor: Tensor, k_cache: Tensor) -> None:
    """Raise ValueError unless `tensor`, called `name`, is where the cache is."""
    if tensor.device != k_cache.device:
        raise ValueError(f"{name} must be on {k_cache.device} like k_cache, is on {tensor.device}")


def _check_cache(cache: KvCache) -> None:
    k, v, k_scales, v_scales = cache
    if k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3]:
        raise ValueError(
            "k_cache and v_cache must have shape [num_pages, kv_heads, page_size, head_dim] and "
            f"differ in head_dim at most, got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if k.dtype not in CACHE_DTYPES:
        raise ValueError(f"k_cache must be float32, bfloat16, float16 or int8, got {k.dtype}")
    if v.dtype != k.dtype:
        raise ValueError(f"v_cache must be {k.dtype} like k_cache, got {v.dtype}")
    _, heads, page_size, dim = k.shape
    if heads == 0 or dim % 2:
        raise ValueError(f"k_cache must have heads and an even head_dim, got {tuple(k.shape)}")
    if page_size == 0 or page_size % TILE:
        check_page_size("the page_size of k_cache", page_size, k.device)
    check_device("v_cache", v, k)
    if not (k.is_contiguous() and v.is_contiguous()):
        raise ValueError("k_cache and v_cache must be contiguous")
    for name, scales in (("k_scales", k_scales), ("v_scales", v_scales)):
        if (scales is None) == (k.dtype == torch.int8):
            raise ValueError(
                f"{name} is for an int8 cache, which needs it; k_cache is {k.dtype} and {name} is "
                f"{'missing' if scales is None else 'given'}"
            )
        if scales is None:
            continue
        if scales.shape != k.shape[:3] or scales.dtype != torch.float32:
            raise ValueError(
                f"{name} must be float32 of shape {tuple(k.shape[:3])} (k_cache without head_dim), "
                f"got {scales.dtype} of {tuple(scales.shape)}"
            )
        check_device(name, scales, k)
        if not scales.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
