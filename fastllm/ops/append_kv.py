"""Writing new keys and values into the paged cache, with or without their rotation."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .. import _C
from .checks import check_tensors, laid_out
from .paged_cache import (
    FLOAT,
    INT8,
    KvCache,
    cache_variant,
    check_device,
    check_paging,
    index_laid_out,
    native_cache,
    quantize_rows,
    read_pages,
    read_scales,
    write_pages,
    write_scales,
)
from .registry import FLOATS, Op
from .rope import check_rope, rope_ref, tables_contiguous


def append_kv_ref(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    cache_seqlens: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Plain PyTorch definition of `append_kv`."""
    page_size = k_cache.shape[2]
    starts = cu_seqlens_q.tolist()
    for s, length in enumerate(cache_seqlens.tolist()):
        begin, end = starts[s], starts[s + 1]
        if length == 0 or begin == end:
            continue
        first = length - (end - begin)
        first_page = first // page_size
        pages = block_table[s, first_page : -(-length // page_size)]
        at = slice(first - first_page * page_size, length - first_page * page_size)
        kinds: tuple[tuple[Tensor, Tensor, Tensor | None, Literal["k", "v"]], ...]
        kinds = ((k, k_cache, k_scales, "k"), (v, v_cache, v_scales, "v"))
        for source, cache, scales, which in kinds:
            new = source[begin:end].transpose(0, 1)
            if scales is not None:
                new, new_scales = quantize_rows(new)
                scale_rows = read_scales(scales, pages).clone()
                scale_rows[:, at] = new_scales
                write_scales(scales, pages, scale_rows)
            rows = read_pages(cache, pages, which).clone()
            rows[:, at] = new
            write_pages(cache, pages, rows, which)


def rope_append_kv_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    cache_seqlens: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch definition of `rope_append_kv`: the three ops in sequence."""
    rotated = rope_ref(k, positions, cos, sin)
    places = (block_table, cu_seqlens_q, cache_seqlens)
    append_kv_ref(rotated, v, k_cache, v_cache, *places, k_scales, v_scales)
    return rope_ref(q, positions, cos, sin)


def _nothing(*_: Any) -> None:
    return None


def _rope_append_kv_fake(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


def _append_variant(k: Tensor, v: Tensor, k_cache: Tensor, *_: Any) -> str:
    return cache_variant(k_cache)


def _rope_append_variant(*args: Any) -> str:
    return cache_variant(args[6])


_append_kv = Op(
    "append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor block_table,"
    " Tensor cu_seqlens_q, Tensor cache_seqlens, Tensor(c!)? k_scales=None,"
    " Tensor(d!)? v_scales=None) -> ()",
    append_kv_ref,
    fake=_nothing,
    variant=_append_variant,
)
_rope_append_kv = Op(
    "rope_append_kv(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor cos, Tensor sin,"
    " Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor block_table, Tensor cu_seqlens_q,"
    " Tensor cache_seqlens, Tensor(c!)? k_scales=None, Tensor(d!)? v_scales=None) -> Tensor",
    rope_append_kv_ref,
    fake=_rope_append_kv_fake,
    variant=_rope_append_variant,
)


def _native_append(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any) -> bool:
    return native_cache(k_cache, v_cache)


@_append_kv.impl("native", "cpu", dtypes=FLOATS, variants=(FLOAT, INT8), when=_native_append)
def _append_kv_cpu(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    cache_seqlens: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    k, v, block_table = laid_out("k", k), laid_out("v", v), laid_out("block_table", block_table)
    places = (block_table, cu_seqlens_q, cache_seqlens)
    _C.append_kv(k, v, k_cache, v_cache, *places, k_scales, v_scales)


def _native_rope_append(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, *cache: Any
) -> bool:
    return tables_contiguous(cos, sin) and _native_append(k, v, *cache)


@_rope_append_kv.impl(
    "native", "cpu", dtypes=FLOATS, variants=(FLOAT, INT8), when=_native_rope_append
)
def _rope_append_kv_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    cache_seqlens: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    q, k, v = laid_out("q", q), laid_out("k", k), laid_out("v", v)
    block_table = laid_out("block_table", block_table)
    rotated = q.new_empty(q.shape)
    turns, caches = (positions, cos, sin), (k_cache, v_cache)
    places = (block_table, cu_seqlens_q, cache_seqlens)
    _C.rope_append_kv(rotated, q, k, v, *turns, *caches, *places, k_scales, v_scales)
    return rotated


@_append_kv.impl("triton", "cuda", dtypes=FLOATS, variants=(FLOAT, INT8))
def _append_kv_triton(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *args: Any) -> None:
    from ..kernels import append_kv as kernel

    lengths = index_laid_out(*args[:3])
    kernel.append_kv(laid_out("k", k), laid_out("v", v), k_cache, v_cache, *lengths, *args[3:])


@_rope_append_kv.impl("triton", "cuda", dtypes=FLOATS, variants=(FLOAT, INT8))
def _rope_append_kv_triton(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, *cache: Any
) -> Tensor:
    from ..kernels import rope

    _append_kv_triton(rope.rope(laid_out("k", k), positions, cos, sin), v, *cache)
    return rope.rope(laid_out("q", q), positions, cos, sin)


def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    cache_seqlens: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Write this step's keys and values into their pages.

    Token i of sequence s goes to position `cache_seqlens[s] - len_q(s) + i`; a dead slot writes
    nothing.

    Args:
        k: `[T, Hk, D]` in the caches' dtype, already rotated. Into int8 caches float32, bfloat16 or
            float16. Any strides, as v and block_table (the kernels want a contiguous last
            dimension, others are copied, which a graph capture on the CPU refuses).
        v: `[T, Hk, Dv]`, of the dtype of `k`.
        k_cache: `[num_pages, Hk, page_size, D]` as `new_cache` makes it; written.
        v_cache: `[num_pages, Hk, page_size, Dv]`; written.
        block_table: `[S, P]` int32, the pages of each sequence in order.
        cu_seqlens_q: `[S + 1]` int32, where each sequence's tokens begin in `k` and `v`.
        cache_seqlens: `[S]` int32, tokens of each sequence *including* these; 0 marks a dead slot.
        k_scales, v_scales: `[num_pages, Hk, page_size]` float32, of int8 caches; written.

    Raises:
        TypeError: naming the argument, on what is no tensor.
        ValueError: on mismatched shapes, dtypes or devices, pages outside the cache, lengths
            outside the table.
    """
    cache = KvCache(k_cache, v_cache, k_scales, v_scales)
    _check_append(k, v, cache, block_table, cu_seqlens_q, cache_seqlens)
    _append_kv(k, v, k_cache, v_cache, block_table, cu_seqlens_q, cache_seqlens, k_scales, v_scales)


def rope_append_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    cache_seqlens: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """`rope` of q and k and `append_kv` in one pass over them, the same bits as the three ops.

    Args:
        q: `[T, H, D]`, any strides (q, k, v may be views of one fused projection).
        k: `[T, Hk, D]`, not yet rotated.
        v: `[T, Hk, Dv]`.
        positions, cos, sin: as in `rope`.
        k_cache, v_cache, block_table, cu_seqlens_q, cache_seqlens, k_scales, v_scales: as in
            `append_kv`.

    Returns:
        Rotated q, `[T, H, D]`, contiguous.

    Raises:
        ValueError: as `rope` and `append_kv` do.
    """
    check_rope(q, positions, cos, sin, "q")
    if k.shape[0] != q.shape[0] or k.shape[-1] != q.shape[-1] or k.dtype != q.dtype:
        raise ValueError(
            f"k must be {q.dtype} with the {q.shape[0]} tokens and head dim {q.shape[2]} of q, "
            f"got {k.dtype} of {tuple(k.shape)}"
        )
    cache = KvCache(k_cache, v_cache, k_scales, v_scales)
    _check_append(k, v, cache, block_table, cu_seqlens_q, cache_seqlens)
    places = (block_table, cu_seqlens_q, cache_seqlens)
    return _rope_append_kv(
        q, k, v, positions, cos, sin, k_cache, v_cache, *places, k_scales, v_scales
    )


def _check_append(
    k: Tensor,
    v: Tensor,
    cache: KvCache,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    cache_seqlens: Tensor,
) -> None:
    try:
        check_paging(cache, block_table, cu_seqlens_q, cache_seqlens, _check_new_kv(k, v, cache))
    except AttributeError:
        check_tensors(
            k=k, v=v, k_cache=cache.k, v_cache=cache.v, block_table=block_table,
            cu_seqlens_q=cu_seqlens_q, cache_seqlens=cache_seqlens, k_scales=cache.k_scales,
            v_scales=cache.v_scales,
        )  # fmt: skip
        raise


def _check_new_kv(k: Tensor, v: Tensor, cache: KvCache) -> int:
    """The tokens of k and v."""
    for name, new, pages in (("k", k, cache.k), ("v", v, cache.v)):
        if new.ndim != 3 or pages.ndim != 4 or new.shape[1:] != (pages.shape[1], pages.shape[3]):
            raise ValueError(
                f"{name} must have shape [T, heads, head_dim] with the heads and head_dim of "
                f"{name}_cache {tuple(pages.shape)}, got {tuple(new.shape)}"
            )
        if pages.dtype == torch.int8:
            if new.dtype not in FLOATS or new.dtype != k.dtype:
                raise ValueError(
                    "k and v must be float32, bfloat16 or float16, both the same, got "
                    f"{k.dtype} and {v.dtype}"
                )
        elif new.dtype != pages.dtype:
            raise ValueError(f"{name} must be {pages.dtype} like {name}_cache, got {new.dtype}")
        check_device(name, new, cache.k)
    if k.shape[0] != v.shape[0]:
        raise ValueError(f"v must have the {k.shape[0]} tokens of k, got {v.shape[0]}")
    return k.shape[0]
