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
from .attention_checks import check_softcap, check_window
from .attention_ref import attend, visible_keys
from .checks import check_tensors, laid_out
from .paged_cache import (
    FLOAT,
    INT8,
    SPLIT,
    KvCache,
    cache_variant,
    check_device,
    check_paging,
    index_laid_out,
    native_cache,
    native_partials,
    read_pages,
    read_scales,
)
from .registry import FLOATS, Op, batch_invariant


def paged_attention_ref(
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
) -> Tensor:
    """Plain PyTorch definition of `paged_attention`: `attend` over every sequence's pages."""
    page_size = k_cache.shape[2]
    out = q.new_zeros(q.shape[0], q.shape[1], v_cache.shape[3])
    starts = cu_seqlens_q.tolist()
    for s, length in enumerate(cache_seqlens.tolist()):
        begin, end = starts[s], starts[s + 1]
        if length == 0 or begin == end:
            continue
        pages = block_table[s, : -(-length // page_size)]
        k = read_pages(k_cache, pages, "k")[:, :length].transpose(0, 1)
        v = read_pages(v_cache, pages, "v")[:, :length].transpose(0, 1)
        ks = None if k_scales is None else read_scales(k_scales, pages)[:, :length]
        vs = None if v_scales is None else read_scales(v_scales, pages)[:, :length]
        rows = q[begin:end]
        visible = visible_keys(rows, k, None, window_left, 0)
        out[begin:end], _ = attend(rows, k, v, visible, sinks, softmax_scale, softcap, ks, vs)
    return out


def _paged_attention_fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v_cache.shape[3])


def _variant(q: Tensor, k_cache: Tensor, *_: Any) -> str:
    return cache_variant(k_cache)


_paged_attention = Op(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table,"
    " Tensor cu_seqlens_q, Tensor cache_seqlens, Tensor? k_scales, Tensor? v_scales,"
    " Tensor? sinks, float softmax_scale, int window_left=-1, float softcap=0.0) -> Tensor",
    paged_attention_ref,
    fake=_paged_attention_fake,
    variant=_variant,
)


def _native_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any) -> bool:
    dims_fit = k_cache.shape[3] % 8 == 0 and v_cache.shape[3] % 8 == 0
    return dims_fit and native_cache(k_cache, v_cache)


@_paged_attention.impl(
    "native", "cpu", dtypes=FLOATS, variants=(FLOAT, INT8), when=_native_attention
)
def _paged_attention_cpu(
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
) -> Tensor:
    q, block_table = laid_out("q", q), laid_out("block_table", block_table)
    tokens, heads, _ = q.shape
    value_dim = v_cache.shape[3]
    o = q.new_empty(tokens, heads, value_dim)
    partials = native_partials(tokens, heads, value_dim, block_table, k_cache.shape[2])
    _C.paged_attention(
        o,
        q,
        k_cache,
        v_cache,
        block_table,
        cu_seqlens_q,
        cache_seqlens,
        k_scales,
        v_scales,
        sinks,
        partials,
        softmax_scale,
        window_left,
        softcap,
    )
    return o


def cuda_shared_bytes(dim: int, value_dim: int, codes: bool) -> int:
    """Shared memory of a block of the CUDA kernel (`shared_layout`, paged_attention_params.h).

    Two slots of K and two of V of 64 positions, whose rows are multiples of 32 bytes (of int8, with
    fp32 scales), 16 rows of q, and 2,944 bytes of probabilities, sums, pages and row numbers.
    """
    element = 1 if codes else 2
    rows = sum(-(-d * element // 32) * 32 for d in (dim, value_dim))
    step = 32 if codes else 16
    return 2 * 64 * rows + (4 * 64 * 4 if codes else 0) + -(-dim // step) * step * 32 + 2944


def _cuda_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, *_: Any
) -> bool:
    # A kernel for few new tokens a sequence. Prompts are Triton's, in whose batch-invariant mode
    # both must have the same bits.
    step = 16 if k_cache.dtype == torch.int8 else 8
    dims = k_cache.shape[3], v_cache.shape[3]
    dims_fit = all(dim % step == 0 and dim <= 256 for dim in dims)
    few = q.shape[0] <= 4 * block_table.shape[0]
    strides_fit = q.stride(-1) == 1 and block_table.stride(-1) == 1
    if not (dims_fit and strides_fit and few) or batch_invariant():
        return False
    # 256/256 in bf16 takes 139 KiB: too much for sm_86, sm_89 and sm_12x, which have 99.
    device: Any = torch.cuda.get_device_properties(q.device)  # the stub lacks the attribute
    size = cuda_shared_bytes(*dims, k_cache.dtype == torch.int8)
    return bool(size <= device.shared_memory_per_block_optin)


if hasattr(_C, "paged_attention_cuda"):  # the extension was built with CUDA

    @_paged_attention.impl(
        "cuda",
        "cuda",
        dtypes=(torch.bfloat16, torch.float16),
        variants=(FLOAT, INT8),
        when=_cuda_attention,
        opt_in=True,  # no result of a real device is committed yet
    )
    def _paged_attention_cuda(
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
    ) -> Tensor:
        tokens, heads, _ = q.shape
        value_dim = v_cache.shape[3]
        o = q.new_empty(tokens, heads, value_dim)
        splits = -(-block_table.shape[1] * k_cache.shape[2] // SPLIT)
        partials = None  # of every split: its output, maximum and sum
        if splits > 1:
            size = splits * tokens * heads * (value_dim + 2)
            partials = torch.empty(size, dtype=torch.float32, device=q.device)
        with torch.cuda.device(q.device):
            _C.paged_attention_cuda(
                o,
                q,
                k_cache,
                v_cache,
                block_table,
                cu_seqlens_q,
                cache_seqlens,
                k_scales,
                v_scales,
                None if sinks is None else sinks.float().contiguous(),
                partials,
                softmax_scale,
                window_left,
                softcap,
                torch.cuda.current_stream().cuda_stream,
            )
        return o


@_paged_attention.impl("triton", "cuda", dtypes=FLOATS, variants=(FLOAT, INT8))
def _paged_attention_triton(q: Tensor, k_cache: Tensor, v_cache: Tensor, *args: Any) -> Tensor:
    from ..kernels import paged_attention as kernel

    lengths = index_laid_out(*args[:3])
    return kernel.paged_attention(
        laid_out("q", q), k_cache, v_cache, *lengths, *args[3:], batch_invariant=batch_invariant()
    )


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    cache_seqlens: Tensor,
    softmax_scale: float | None = None,
    *,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Causal attention of each sequence's last tokens over its pages, themselves included.

    Args:
        q: `[T, H, D]` in the caches' dtype (over int8 caches float32, bfloat16 or float16),
            rotated; H is a multiple of the caches' heads (GQA).
        k_cache: `[num_pages, Hk, page_size, D]`, with this step's keys already appended.
        v_cache: `[num_pages, Hk, page_size, Dv]`.
        block_table: `[S, P]` int32.
        cu_seqlens_q: `[S + 1]` int32; the last `len_q(s)` positions of sequence s are its queries.
        cache_seqlens: `[S]` int32, this step's tokens included; rows of a dead slot (0) are 0.
        softmax_scale: factor of the scores; default `D ** -0.5`.
        window_size: `(left, right)`: a query sees itself and `left` positions before it, -1 is no
            window; `right` may be -1 or 0, which are the same here, attention being causal.
        softcap: above 0, scores become `softcap * tanh(scores / softcap)`.
        sinks: `[H]`, one more logit of each head, which takes probability and has no value.
        k_scales, v_scales: `[num_pages, Hk, page_size]` float32, of int8 caches.

    Returns:
        `[T, H, Dv]`, contiguous, in the dtype of `q`.

    Float32's edge, NaN and infinity are as in `attention`.

    Raises:
        TypeError: naming the argument, on what is no tensor.
        ValueError: on mismatched shapes, dtypes or devices, pages outside the cache, lengths
            outside the table.
    """
    cache = KvCache(k_cache, v_cache, k_scales, v_scales)
    try:
        _check_query(q, cache, sinks)
        check_paging(cache, block_table, cu_seqlens_q, cache_seqlens, q.shape[0])
    except AttributeError:
        check_tensors(
            q=q, k_cache=k_cache, v_cache=v_cache, block_table=block_table,
            cu_seqlens_q=cu_seqlens_q, cache_seqlens=cache_seqlens, sinks=sinks,
            k_scales=k_scales, v_scales=v_scales,
        )  # fmt: skip
        raise
    if softmax_scale is None:
        softmax_scale = q.shape[2] ** -0.5
    check_softcap(softcap)
    window_left = _checked_window(window_size)
    lengths = (block_table, cu_seqlens_q, cache_seqlens)
    if sinks is not None:
        sinks = laid_out("sinks", sinks.float())
    scores = (sinks, float(softmax_scale), window_left, float(softcap))
    return _paged_attention(q, k_cache, v_cache, *lengths, k_scales, v_scales, *scores)


def _check_query(q: Tensor, cache: KvCache, sinks: Tensor | None) -> None:
    k = cache.k
    if q.ndim != 3 or k.ndim != 4 or q.shape[2] != k.shape[3] or q.shape[2] == 0:
        raise ValueError(
            f"q must have shape [T, H, D] with the D of k_cache {tuple(k.shape)}, at least 1, "
            f"got {tuple(q.shape)}"
        )
    if k.dtype == torch.int8:
        if q.dtype not in FLOATS:
            raise ValueError(f"q must be float32, bfloat16 or float16, got {q.dtype}")
    elif q.dtype != k.dtype:
        raise ValueError(f"q must be {k.dtype} like k_cache, got {q.dtype}")
    check_device("q", q, k)
    heads, kv_heads = q.shape[1], k.shape[1]
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(
            f"the heads of q must be a positive multiple of the {kv_heads} of k_cache, got {heads}"
        )
    if sinks is None:
        return
    if sinks.shape != (heads,) or not sinks.is_floating_point():
        raise ValueError(
            f"sinks must hold a floating number for each of the {heads} heads of q, "
            f"got {sinks.dtype} of {tuple(sinks.shape)}"
        )
    check_device("sinks", sinks, k)


def _checked_window(window_size: tuple[int, int]) -> int:
    check_window(window_size)
    left, right = window_size
    if right > 0:
        raise ValueError(
            "window_size must be (left, right) with right -1 or 0, as attention over a cache is "
            f"causal, got {window_size}"
        )
    return left
