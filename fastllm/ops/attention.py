"""Causal attention over a paged KV cache, for prompts, chunks of prompts and single tokens alike.

`append_kv` writes a step's keys and values, `paged_attention` attends to them; `rope_append_kv`
is the two rotations and the append of a decoder layer in one pass. The online softmax is that of
FlashAttention (Dao et al., 2022): KV tiles of 64 positions and splits of 512, both counted from a
sequence's position 0, so that a row's bits do not depend on how its prompt was cut, where its
pages lie, or what else is in the batch.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .. import _C
from .paged_cache import (
    PAGE_SIZE,
    check_paging,
    new_cache,
    pack_page,
    read_pages,
    unpack_page,
    write_pages,
)
from .registry import Op, batch_invariant
from .rope import check_rope, rope_ref, tables_contiguous

__all__ = [
    "PAGE_SIZE",
    "append_kv",
    "append_kv_ref",
    "new_cache",
    "pack_page",
    "paged_attention",
    "paged_attention_ref",
    "rope_append_kv",
    "rope_append_kv_ref",
    "unpack_page",
]


def append_kv_ref(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    cache_seqlens: Tensor,
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
        kinds: tuple[tuple[Tensor, Tensor, Literal["k", "v"]], ...]
        kinds = ((k, k_cache, "k"), (v, v_cache, "v"))
        for new, cache, which in kinds:
            rows = read_pages(cache, pages, which).clone()
            rows[:, at] = new[begin:end].transpose(0, 1)
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
) -> Tensor:
    """Plain PyTorch definition of `rope_append_kv`: the three ops in sequence."""
    rotated = rope_ref(k, positions, cos, sin)
    append_kv_ref(rotated, v, k_cache, v_cache, block_table, cu_seqlens_q, cache_seqlens)
    return rope_ref(q, positions, cos, sin)


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


def _nothing(*_: Any) -> None:
    return None


def _rope_append_kv_fake(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


def _paged_attention_fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v_cache.shape[3])


_append_kv = Op(
    "append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor block_table,"
    " Tensor cu_seqlens_q, Tensor cache_seqlens) -> ()",
    append_kv_ref,
    fake=_nothing,
)
_rope_append_kv = Op(
    "rope_append_kv(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor cos, Tensor sin,"
    " Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor block_table, Tensor cu_seqlens_q,"
    " Tensor cache_seqlens) -> Tensor",
    rope_append_kv_ref,
    fake=_rope_append_kv_fake,
)
_paged_attention = Op(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table,"
    " Tensor cu_seqlens_q, Tensor cache_seqlens, float softmax_scale,"
    " int window_left=-1) -> Tensor",
    paged_attention_ref,
    fake=_paged_attention_fake,
)


_TILE = 64  # positions the native kernel takes at once; a page holds a whole number of them
_SPLIT = 512  # positions of a split, the unit that decode may run on another thread
_MAX_HEAD_DIM = 512


def _native_cache(k_cache: Tensor, v_cache: Tensor, block_table: Tensor) -> bool:
    return (
        k_cache.shape[2] % _TILE == 0
        and k_cache.shape[3] % 2 == 0
        and max(k_cache.shape[3], v_cache.shape[3]) <= _MAX_HEAD_DIM
        and block_table.stride(-1) == 1
    )


def _native_append(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, *_: Tensor
) -> bool:
    last_contiguous = k.stride(-1) == 1 and v.stride(-1) == 1
    return last_contiguous and _native_cache(k_cache, v_cache, block_table)


@_append_kv.impl("native", "cpu", when=_native_append)
def _append_kv_cpu(*args: Tensor) -> None:
    _C.append_kv(*args)


def _native_rope_append(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, *cache: Tensor
) -> bool:
    return q.stride(-1) == 1 and tables_contiguous(cos, sin) and _native_append(k, v, *cache)


@_rope_append_kv.impl("native", "cpu", when=_native_rope_append)
def _rope_append_kv_cpu(q: Tensor, *args: Tensor) -> Tensor:
    rotated = torch.empty(q.shape, dtype=q.dtype)
    _C.rope_append_kv(rotated, q, *args)
    return rotated


def _native_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, *_: Any
) -> bool:
    dims_fit = k_cache.shape[3] % 8 == 0 and v_cache.shape[3] % 8 == 0
    return q.stride(-1) == 1 and dims_fit and _native_cache(k_cache, v_cache, block_table)


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


@_append_kv.impl("triton", "cuda")
def _append_kv_triton(*args: Any) -> None:
    from ..kernels import attention as kernel

    kernel.append_kv(*args)


@_rope_append_kv.impl("triton", "cuda")
def _rope_append_kv_triton(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, *cache: Tensor
) -> Tensor:
    from ..kernels import attention, rope

    attention.append_kv(rope.rope(k, positions, cos, sin), v, *cache)
    return rope.rope(q, positions, cos, sin)


def _triton_supports(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any) -> bool:
    page_size = k_cache.shape[2]
    return v_cache.shape == k_cache.shape and page_size & (page_size - 1) == 0 and page_size <= 512


@_paged_attention.impl("triton", "cuda", when=_triton_supports)
def _paged_attention_triton(*args: Any) -> Tensor:
    from ..kernels import attention as kernel

    return kernel.paged_attention(*args, batch_invariant=batch_invariant())


def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    cache_seqlens: Tensor,
) -> None:
    """Write this step's keys and values into their pages.

    Token i of sequence s goes to position `cache_seqlens[s] - len_q(s) + i`; a dead slot writes
    nothing.

    Args:
        k: `[T, Hk, D]` in the caches' dtype, already rotated; any strides of T and Hk.
        v: `[T, Hk, Dv]`.
        k_cache: `[num_pages, Hk, page_size, D]` as `new_cache` makes it; written.
        v_cache: `[num_pages, Hk, page_size, Dv]`; written.
        block_table: `[S, P]` int32, the pages of each sequence in order.
        cu_seqlens_q: `[S + 1]` int32, where each sequence's tokens begin in `k` and `v`.
        cache_seqlens: `[S]` int32, tokens of each sequence *including* these; 0 marks a dead slot.

    Raises:
        ValueError: on mismatched shapes or dtypes, pages outside the cache, lengths outside the
            table.
    """
    _check_new_kv(k, v, k_cache, v_cache)
    check_paging(k_cache, v_cache, block_table, cu_seqlens_q, cache_seqlens, k.shape[0])
    _append_kv(k, v, k_cache, v_cache, block_table, cu_seqlens_q, cache_seqlens)


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
) -> Tensor:
    """`rope` of q and k and `append_kv` in one pass over them, the same bits as the three ops.

    Args:
        q: `[T, H, D]`, any strides of T and H (q, k, v may be views of one fused projection).
        k: `[T, Hk, D]`, not yet rotated.
        v: `[T, Hk, Dv]`.
        positions, cos, sin: as in `rope`.
        k_cache, v_cache, block_table, cu_seqlens_q, cache_seqlens: as in `append_kv`.

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
    _check_new_kv(k, v, k_cache, v_cache)
    check_paging(k_cache, v_cache, block_table, cu_seqlens_q, cache_seqlens, k.shape[0])
    return _rope_append_kv(
        q, k, v, positions, cos, sin, k_cache, v_cache, block_table, cu_seqlens_q, cache_seqlens
    )


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


def _check_new_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    for name, new, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if new.ndim != 3 or cache.ndim != 4 or new.shape[1:] != (cache.shape[1], cache.shape[3]):
            raise ValueError(
                f"{name} must have shape [T, heads, head_dim] with the heads and head_dim of "
                f"{name}_cache {tuple(cache.shape)}, got {tuple(new.shape)}"
            )
        if new.dtype != cache.dtype:
            raise ValueError(f"{name} must be {cache.dtype} like {name}_cache, got {new.dtype}")
    if k.shape[0] != v.shape[0]:
        raise ValueError(f"v must have the {k.shape[0]} tokens of k, got {v.shape[0]}")
