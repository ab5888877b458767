"""The argument checks of `attention`: each error names the argument and what it should be."""

from __future__ import annotations

from itertools import pairwise
from numbers import Integral

import torch
from torch import Tensor

from .checks import values_readable
from .registry import FLOATS

_DTYPES = (*FLOATS, torch.float64)  # float64: the definition, for gradcheck


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    window_size: tuple[int, int],
    softcap: float,
) -> None:
    """Raise ValueError, naming the argument, unless these are arguments of `attention`."""
    packed = cu_seqlens_q is not None
    _check_tensors(q, k, v, packed)
    for name, cu, tokens in (
        ("cu_seqlens_q", cu_seqlens_q, q.shape[0]), ("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    ):  # fmt: skip
        if cu is not None:
            _check_cu_seqlens(name, cu, tokens, q)
    if packed != (cu_seqlens_k is not None) or (
        cu_seqlens_q is not None
        and cu_seqlens_k is not None
        and cu_seqlens_q.shape != cu_seqlens_k.shape
    ):
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must be given together and count the same documents"
        )
    if key_mask is not None:
        want = k.shape[:-2]
        if key_mask.dtype != torch.bool or key_mask.shape != want or key_mask.device != q.device:
            raise ValueError(
                f"key_mask must be bool of shape {list(want)} (the tokens of k) on {q.device}, got "
                f"{key_mask.dtype} of {list(key_mask.shape)} on {key_mask.device}"
            )
    if sinks is not None and (
        sinks.shape != (q.shape[-2],) or not sinks.is_floating_point() or sinks.device != q.device
    ):
        raise ValueError(
            f"sinks must hold a floating number for each of the {q.shape[-2]} heads of q on "
            f"{q.device}, got {sinks.dtype} of {list(sinks.shape)} on {sinks.device}"
        )
    check_window(window_size)
    check_softcap(softcap)


def check_softcap(softcap: float) -> None:
    """Raise ValueError unless this is 0 (none) or a positive number."""
    try:
        fits = 0.0 <= softcap < float("inf")
    except TypeError:
        fits = False
    if not fits:
        raise ValueError(f"softcap must be 0 (none) or a positive number, got {softcap}")


def check_window(window_size: tuple[int, int]) -> None:
    """Raise ValueError unless this is `(left, right)`, each -1 (all) or a number of keys."""
    if isinstance(window_size, (tuple, list)) and len(window_size) == 2:
        left, right = window_size
        if (
            isinstance(left, (int, Integral))
            and isinstance(right, (int, Integral))
            and -1 <= left < 2**63
            and -1 <= right < 2**63
        ):
            return
    raise ValueError(
        "window_size must be (left, right), each -1 (no limit) or a number of keys, got "
        f"{window_size!r}"
    )


def _tensors_fit(q: Tensor, k: Tensor, v: Tensor, ndim: int) -> bool:
    """What `_check_tensors` wants, in one look: it runs in every layer of every decoding step."""
    q_shape, k_shape, v_shape, dtype = q.shape, k.shape, v.shape, q.dtype
    return (
        len(q_shape) == len(k_shape) == len(v_shape) == ndim
        and dtype in _DTYPES
        and dtype is k.dtype
        and dtype is v.dtype
        and (ndim == 3 or q_shape[0] == k_shape[0])
        and k_shape[:-1] == v_shape[:-1]
        and q_shape[-1] == k_shape[-1] > 0
        and v_shape[-1] > 0
        and q_shape[-2] > 0
        and k_shape[-2] > 0
        and q_shape[-2] % k_shape[-2] == 0
        and q.device == k.device == v.device
    )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, packed: bool) -> None:
    if _tensors_fit(q, k, v, 3 if packed else 4):
        return
    form = "[total, H, D] with cu_seqlens_q" if packed else "[B, T, H, D] without cu_seqlens_q"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != (3 if packed else 4):
            raise ValueError(f"{name} must have shape {form}, got {list(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} must be {q.dtype} on {q.device} like q, got {x.dtype} on {x.device}"
            )
    if q.dtype not in _DTYPES:
        raise ValueError(f"q must be float32, bfloat16 or float16, got {q.dtype}")
    if k.shape[:-3] != q.shape[:-3]:
        raise ValueError(f"k must have the batch of q, {q.shape[0]}, got {k.shape[0]}")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"v must have the tokens and heads of k, {list(k.shape[:-1])}, got {list(v.shape[:-1])}"
        )
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if heads == 0 or kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"the heads of q must be a positive multiple of those of k, got {heads} and {kv_heads}"
        )
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"k must have the head dim of q, {q.shape[-1]}, got {k.shape[-1]}")
    if q.shape[-1] == 0 or v.shape[-1] == 0:
        raise ValueError("the head dims of q, k and v must be positive")


def _check_cu_seqlens(name: str, cu: Tensor, tokens: int, q: Tensor) -> None:
    if cu.dtype != torch.int32 or cu.ndim != 1 or cu.shape[0] < 1 or cu.device != q.device:
        raise ValueError(
            f"{name} must be int32 of shape [documents + 1] on {q.device}, got {cu.dtype} of "
            f"{list(cu.shape)} on {cu.device}"
        )
    if values_readable(cu):
        starts = cu.tolist()
        ascending = all(a <= b for a, b in pairwise(starts))
        if starts[0] != 0 or starts[-1] > tokens or not ascending:
            raise ValueError(
                f"{name} must ascend from 0 to at most the {tokens} tokens it indexes, got {starts}"
            )
