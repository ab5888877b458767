"""torch's `scaled_dot_product_attention` on our attention, the same in signature and meaning."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import attention
from .registry import DEVICES, FLOATS, is_transformed


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled dot product attention, with the arguments, result and errors of torch's function.

    Our kernels serve every call without dropout whose mask is None or a boolean padding mask (the
    same keys hidden from all queries and heads of a sequence); dropout, dense and additive masks,
    nested tensors and calls under torch.func or in forward mode are handed to torch. Under autocast
    query, key and value are cast as torch casts them.

    Args:
        query: `[..., H, L, E]`.
        key: `[..., H, S, E]`; with `enable_gqa` its heads divide those of `query`.
        value: `[..., H, S, Ev]`.
        attn_mask: bool (True takes part) or additive, broadcastable to `[..., H, L, S]`.
        dropout_p: probability of dropping a weight.
        is_causal: query i sees keys up to i (torch aligns the starts), without `attn_mask`.
        scale: factor of q.k; default `E ** -0.5`.
        enable_gqa: let a key head serve several query heads.

    Returns:
        `[..., H, L, Ev]`.
    """
    device = query.device.type
    if device in DEVICES and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (_lowered(x, dtype) for x in (query, key, value))
    if is_transformed() or not _is_ours(
        query, key, value, attn_mask, dropout_p, is_causal, enable_gqa
    ):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    length = query.shape[-2]
    q, k, v = (_tokens_first(x) for x in (query, key, value))
    mask = None if attn_mask is None else _key_mask(attn_mask, query, key)
    right = -1
    if is_causal:  # keys past the last query are hidden; the ends are aligned in ours
        k, v = k[:, :length], v[:, :length]
        right = length - k.shape[1]
    o = attention(q, k, v, softmax_scale=scale, window_size=(-1, right), key_mask=mask)
    assert isinstance(o, Tensor)
    heads_first = o.transpose(1, 2)
    return heads_first.squeeze(1) if query.ndim == 3 else heads_first.unflatten(0, query.shape[:-3])


def _lowered(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as autocast gives it to torch's function, which is on its list of lower precision."""
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x


def _is_ours(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, causal: bool,
    enable_gqa: bool,
) -> bool:  # fmt: skip
    """Whether the call is well formed and needs nothing that our kernels lack."""
    if dropout_p != 0.0 or (causal and mask is not None):
        return False
    if any(x.is_nested or x.dtype != q.dtype or x.device != q.device for x in (q, k, v)):
        return False
    if q.dtype not in FLOATS or not 3 <= q.ndim == k.ndim == v.ndim:
        return False
    lead = q.shape[:-3] if q.ndim > 3 else q.shape[:1]
    for x in (k, v):
        if (x.shape[:-3] if x.ndim > 3 else x.shape[:1]) != lead:
            return False
    if (
        k.shape[:-1] != v.shape[:-1]
        or q.shape[-1] != k.shape[-1]
        or 0 in (q.shape[-1], v.shape[-1])
    ):
        return False
    if q.ndim > 3:
        heads, kv_heads = q.shape[-3], k.shape[-3]
        if (
            heads == 0
            or kv_heads == 0
            or (heads != kv_heads and not enable_gqa)
            or heads % kv_heads
        ):
            return False
    return mask is None or _is_padding(mask, q, k)


def _is_padding(mask: Tensor, q: Tensor, k: Tensor) -> bool:
    """Whether a mask hides the same keys from every head and query of a sequence, by its shape."""
    if mask.dtype != torch.bool or mask.device != q.device or mask.ndim > q.ndim:
        return False
    shape = (1,) * (q.ndim - mask.ndim) + tuple(mask.shape)
    strides = (0,) * (q.ndim - mask.ndim) + mask.stride()
    alike = [n == 1 or s == 0 for n, s in zip(shape, strides, strict=True)]
    fits = all(n in (1, m) for n, m in zip(shape, (*q.shape[:-1], k.shape[-2]), strict=True))
    return fits and alike[-2] and (q.ndim == 3 or alike[-3])


def _key_mask(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """`[B, S]` from a padding mask."""
    keys = k.shape[-2]
    mask = mask.expand(*q.shape[:-1], keys)
    mask = mask[..., 0, :] if q.ndim == 3 else mask[..., 0, 0, :]
    return mask.reshape(math.prod(mask.shape[:-1]), keys)


def _tokens_first(x: Tensor) -> Tensor:
    """`[..., H, T, D]` as `[B, T, H, D]`; `[B, T, D]` is one head."""
    if x.ndim == 3:
        return x.unsqueeze(2)
    return x.flatten(0, x.ndim - 4).transpose(1, 2)
