"""Attention and its gradients in plain PyTorch: the definition of right for every kernel.

Scores, statistics and sums are fp32 (float64 for float64 inputs, so that `gradcheck` can speak);
P and dS are rounded to the dtype of q where a product takes them. Keys that no query of a document
sees are cleared before the products: 0 * NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

NO_KEYS = float("-inf")  # lse of a row that sees nothing


def attention_ref(
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
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch definition of `attention`: `(o, lse)`."""
    o = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.full(lse_shape(q), NO_KEYS, dtype=wide_dtype(q), device=q.device)
    for rows, keys, lse_rows in documents(q, k, cu_seqlens_q, cu_seqlens_k):
        mask = None if key_mask is None else key_mask[keys]
        visible = visible_keys(q[rows], k[keys], mask, window_left, window_right)
        o[rows], lse[lse_rows] = attend(
            q[rows], k[keys], v[keys], visible, sinks, softmax_scale, softcap
        )
    return o, lse


def attention_backward_ref(
    grad_o: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Plain PyTorch definition of `attention_backward`: `(dq, dk, dv, dsinks)`."""
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dsinks = q.new_zeros(0 if sinks is None else sinks.shape[0], dtype=wide_dtype(q))
    for rows, keys, lse_rows in documents(q, k, cu_seqlens_q, cu_seqlens_k):
        mask = None if key_mask is None else key_mask[keys]
        visible = visible_keys(q[rows], k[keys], mask, window_left, window_right)
        seen_k, seen_v = _seen(k[keys], visible), _seen(v[keys], visible)
        s, slope = _scores(q[rows], seen_k, visible, softmax_scale, softcap)
        alive = lse[lse_rows] != NO_KEYS
        row_lse = lse[lse_rows].where(alive, 0.0)
        delta = (_wide(grad_o[rows]) * _wide(o[rows])).sum(-1).T
        if grad_lse is not None:
            delta = delta - grad_lse[lse_rows]
        if sinks is not None:
            p_sink = (sinks[:, None] - row_lse).exp().where(alive, 0.0)
            dsinks -= (p_sink * delta).sum(-1)
        p = (s - row_lse[..., None]).exp()
        do, rows_q = _wide(grad_o[rows]).transpose(0, 1), _wide(q[rows]).transpose(0, 1)
        dp = (_by_kv_head(grad_o[rows], v) @ _wide(seen_v).permute(1, 2, 0)).view(p.shape)
        ds = (p * (dp - delta[..., None])).where(visible, 0.0) * slope
        p, ds = (x.to(q.dtype).to(s.dtype) for x in (p, ds))
        grouped = ds.reshape(k.shape[-2], ds.shape[0] // k.shape[-2] * ds.shape[1], ds.shape[2])
        of_q = grouped @ _wide(seen_k).transpose(0, 1)
        dq[rows] = (softmax_scale * of_q).view(rows_q.shape).transpose(0, 1).to(q.dtype)
        # A head at a time, then the group's heads: the short sums of torch's own backward.
        dk[keys] = _of_group(softmax_scale * (ds.mT @ rows_q), k).to(k.dtype)
        dv[keys] = _of_group(p.mT @ do, v).to(v.dtype)
    return dq, dk, dv, dsinks


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    sinks: Tensor | None,
    softmax_scale: float,
    softcap: float = 0.0,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One document: q `[Tq, H, D]` over k, v `[Tk, Hk, D]`: `(o [Tq, H, Dv], lse [H, Tq])`.

    With scales `[Hk, Tk]` k and v are codes, which are never turned into values: a key's scale
    multiplies its score, a value's scale its P, before the rounding.
    """
    s, _ = _scores(q, _seen(k, visible), visible, softmax_scale, softcap, k_scales)
    heads, tokens, keys = s.shape
    top = s.amax(-1) if keys else s.new_full((heads, tokens), NO_KEYS)
    shift = top.where(top != NO_KEYS, 0.0)
    p = (s - shift[..., None]).exp()
    total = p.sum(-1)
    p = p.view(v.shape[1], heads // v.shape[1] * tokens, keys)
    p = (p if v_scales is None else p * v_scales[:, None]).to(q.dtype).to(s.dtype)
    o = (p @ _wide(_seen(v, visible)).transpose(0, 1)).view(heads, tokens, v.shape[2])
    if sinks is not None:
        with_sink = torch.maximum(top, sinks[:, None].to(s.dtype))
        keep = (top - with_sink).exp()
        total, shift = total * keep + (sinks[:, None] - with_sink).exp(), with_sink
        o = o * keep[..., None]
    o = o / total.where(total != 0, 1.0)[..., None]
    return o.transpose(0, 1).to(q.dtype), total.log() + shift


def lse_shape(q: Tensor) -> tuple[int, ...]:
    """`[H, T]` for q `[T, H, D]`, `[B, H, T]` for q `[B, T, H, D]`."""
    return (*q.shape[:-3], q.shape[-2], q.shape[-3])


def documents(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> Iterator[tuple[Any, Any, Any]]:
    """Where each document's rows of q, keys, and columns of lse are, as indices."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        yield from ((b, b, b) for b in range(q.shape[0]))
        return
    starts, key_starts = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for s in range(len(starts) - 1):
        rows = slice(starts[s], starts[s + 1])
        yield rows, slice(key_starts[s], key_starts[s + 1]), (slice(None), rows)


def visible_keys(
    q: Tensor, k: Tensor, key_mask: Tensor | None, window_left: int, window_right: int
) -> Tensor:
    """Which keys each row of one document sees: bool `[Tq, Tk]`; q and k are aligned at the end."""
    key = torch.arange(k.shape[0], device=q.device)
    position = torch.arange(q.shape[0], device=q.device)[:, None] + (k.shape[0] - q.shape[0])
    visible = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool, device=q.device)
    if window_left >= 0:
        visible &= key >= position - window_left
    if window_right >= 0:
        visible &= key <= position + window_right
    return visible if key_mask is None else visible & key_mask


def _seen(x: Tensor, visible: Tensor) -> Tensor:
    """Rows of k or v `[Tk, Hk, D]`, zero where no query sees them."""
    return x.where(visible.any(0)[:, None, None], 0.0)


def _scores(
    q: Tensor,
    k: Tensor,
    visible: Tensor,
    softmax_scale: float,
    softcap: float,
    k_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor | float]:
    """Logits `[H, Tq, Tk]` (-inf where hidden) and their derivative by scale * q.k."""
    # Not q times a broadcast k: torch gives that to a product without blocked sums (3.6 times the
    # error of its own attention with D = 256).
    s = _by_kv_head(q, k) @ _wide(k).permute(1, 2, 0)
    if k_scales is not None:
        s = s * k_scales[:, None]
    s = s.view(q.shape[1], q.shape[0], k.shape[0]) * softmax_scale
    slope: Tensor | float = 1.0
    if softcap > 0:
        t = torch.tanh(s / softcap)
        s, slope = softcap * t, 1 - t * t
    return s.masked_fill(~visible, float("-inf")), slope


def _by_kv_head(x: Tensor, k: Tensor) -> Tensor:
    """Rows `[T, H, D]` as `[Hk, group * T, D]` in the dtype of sums."""
    group = x.shape[1] // k.shape[-2]
    return _wide(x).transpose(0, 1).reshape(k.shape[-2], group * x.shape[0], x.shape[-1])


def _of_group(grad: Tensor, k: Tensor) -> Tensor:
    """`[H, Tk, D]` summed over the heads that share a kv head: `[Tk, Hk, D]`."""
    return grad.unflatten(0, (k.shape[-2], -1)).sum(1).transpose(0, 1)


def _wide(x: Tensor) -> Tensor:
    return x.to(wide_dtype(x))


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of scores, statistics and sums."""
    return torch.promote_types(x.dtype, torch.float32)
