"""Launches attention of dense batches, packed documents and paged caches."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import tuning
from .attention_forward import attention_kernel, combine_splits_kernel
from .attention_tuning import AttentionShape, attention_tile, column_blocks
from .online_softmax import LOG2_E, SPLIT_POSITIONS


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    *,
    batch_invariant: bool = True,
) -> tuple[Tensor, Tensor]:
    """(o, lse) of softmax(softmax_scale * q k^T) v: o contiguous in q's dtype, lse fp32.

    q[B, T, H, D], k[B, Tk, Hk, D], v[B, Tk, Hk, Dv] -> o[B, T, H, Dv], lse[B, H, T]; or, with
    cu_seqlens_q, cu_seqlens_k (int32 [S + 1] in device memory, read there alone), q[T, H, D],
    k[Tk, Hk, D], v[Tk, Hk, Dv] -> o[T, H, Dv], lse[H, T]. The last dimension contiguous, other
    strides any. Query i of a document stands at key position i + len_k - len_q and sees
    window_left keys before and window_right after it (-1: all). key_mask[B, Tk] or [Tk]: bool,
    False hides a key. sinks[H]: fp32, one more logit per head, without a value. softcap > 0:
    logits become softcap * tanh(logit / softcap). A row that sees nothing is 0 and lse -inf (its
    sink, if there is one); rows past cu_seqlens_q[S] are 0 and -inf.
    """
    batch = cu_seqlens_q is None
    lse_shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    o = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
    lse = torch.empty(lse_shape, dtype=torch.float32, device=q.device)
    launch(
        o,
        lse,
        q,
        k,
        v,
        None,
        None,
        None,
        cu_seqlens_q,
        cu_seqlens_k,
        None if key_mask is None else key_mask.contiguous().view(torch.uint8),
        sinks,
        "batch" if batch else "varlen",
        k.shape[-3],
        softmax_scale,
        window_left,
        window_right,
        softcap,
        batch_invariant,
    )
    return o, lse


def launch(
    o: Tensor,
    lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    pages: Tensor | None,
    cu_seqlens_q: Tensor | None,
    lengths_k: Tensor | None,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    layout: str,
    max_keys: int,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    batch_invariant: bool,
) -> None:
    """Launches the kernel (and the merge of its splits) for a layout of `locate`.

    A sequence has at most max_keys keys; the rest as in `attention` and `paged_attention`.
    """
    if o.numel() == 0:
        return
    entries, n_tokens = (1, *q.shape)[-4], q.shape[-3]
    n_heads, dim, value_dim = q.shape[-2], q.shape[-1], v.shape[-1]
    kv_heads = k.shape[1] if layout == "paged" else k.shape[-2]
    group, n_rows = n_heads // kv_heads, entries * n_tokens * n_heads
    n_seqs = entries if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    page = k.shape[2] if layout == "paged" else 0
    n_splits = max(1, triton.cdiv(max_keys, SPLIT_POSITIONS))
    plain = key_mask is None and k_scales is None and softcap <= 0
    shape = AttentionShape(
        entries * n_tokens,
        n_seqs,
        n_splits,
        n_heads,
        group,
        dim,
        value_dim,
        q.dtype,
        layout == "paged",
        plain,
        k_scales is not None,
    )
    tile = attention_tile(shape, tuning.architecture(q.device), batch_invariant)
    m = total = partial = None
    parallel = n_splits if tile.merge == "kernel" else 1
    if tile.merge == "kernel":
        stats = torch.empty((2, n_splits, n_rows), dtype=torch.float32, device=q.device)
        m, total = stats[0], stats[1]
        partial = torch.empty((n_splits, n_rows, value_dim), dtype=torch.float32, device=q.device)
    word, strides, stride_kt, stride_vt = _strides(q, k, v, layout)
    factor, softcap_scale, sign = abs(softmax_scale) * LOG2_E, 0.0, 1
    if softcap > 0:
        factor, softcap_scale = softcap * LOG2_E, softmax_scale / softcap
    elif softmax_scale <= 0:  # the running maximum is of scores before their factor
        factor, sign = factor or LOG2_E, -1 if softmax_scale < 0 else 0
    window = {"LEFT": 0 <= window_left < max_keys, "RIGHT": 0 <= window_right < n_tokens}
    left, right = min(window_left, max_keys), min(window_right, n_tokens)
    block_s = triton.next_power_of_2(n_seqs + 1)
    block_dv = max(16, triton.next_power_of_2(value_dim))
    block_d, block_rest = column_blocks(dim)
    n_tiles = entries * triton.cdiv(n_tokens * group, tile.m)
    if layout != "batch":
        # At least the tiles of all sequences and of the tokens that belong to none.
        n_tiles = n_tokens * group // tile.m + n_seqs + 1
    attention_kernel[(n_tiles, kv_heads, parallel)](
        o, lse, partial, m, total, q, k, v, k_scales, v_scales, pages, cu_seqlens_q, lengths_k,
        key_mask, sinks, *strides, n_tokens, max_keys, n_rows, n_seqs,
        0 if pages is None else pages.shape[1], 0 if pages is None else k.shape[0],
        factor, softcap_scale, left, right,
        STRIDE_KT=stride_kt,
        STRIDE_VT=stride_vt,
        LAYOUT=layout,
        WORD=word,
        SIGN=sign,
        **window,
        SOFTCAP=softcap > 0,
        HALF_CODES=k_scales is not None and q.dtype == torch.float32,
        KV_HEADS=kv_heads,
        GROUP=group,
        D=dim,
        DV=value_dim,
        PAGE=page,
        SPLIT=SPLIT_POSITIONS,
        MERGE=tile.merge,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_D=block_d,
        BLOCK_REST=block_rest,
        BLOCK_DV=block_dv,
        BLOCK_S=block_s,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
    if tile.merge == "kernel":
        combine_splits_kernel[(entries * n_tokens if layout == "batch" else n_tokens, n_heads)](
            o, lse, partial, m, total, cu_seqlens_q, lengths_k, sinks,
            n_tokens, max_keys, n_rows, n_seqs, left, right,
            LAYOUT=layout,
            **window,
            H=n_heads,
            DV=value_dim,
            SPLIT=SPLIT_POSITIONS,
            BLOCK_DV=block_dv,
            BLOCK_S=block_s,
            num_warps=1,
        )  # fmt: skip


def _strides(q: Tensor, k: Tensor, v: Tensor, layout: str) -> tuple[int, list[int], int, int]:
    """(word, the kernel's run-time strides / word, token stride of k, of v).

    word is 8 elements, 16 bytes of bf16, where all strides are multiples of it. The token strides
    of k and v, which a model's shapes fix, are compiled in: as arguments their multiples take 32
    registers of the loop over keys.
    """
    batched = [(x.stride(0) if x.ndim == 4 else 0, x.stride(-2)) for x in (k, v)]
    strides = [q.stride(0) if q.ndim == 4 else 0, q.stride(-3), q.stride(-2), *sum(batched, ())]
    word = 8 if all(stride % 8 == 0 for stride in strides) else 1
    token = -2 if layout == "paged" else -3
    return word, [stride // word for stride in strides], k.stride(token), v.stride(token)
