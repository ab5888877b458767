"""Calls that launch attention, paged or not, with every tile that it ships, for `ahead_of_time`.

Meta tensors in the shapes of a layer of 32 heads over 8: 4,096 tokens, or 8 sequences' next ones.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from . import append_kv, attention, attention_backward, paged_attention

HEADS, KV_HEADS, PAGE = 32, 8, 64
DIMS = ((64, 64), (128, 128), (192, 128), (256, 256), (512, 512))
# variant -> what differs from causal attention. "all" takes the most registers.
DENSE_VARIANTS: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"window_right": -1},
    "window": {"window_left": 1000},
    "mask": {"window_right": -1, "masked": True},
    "all": {"window_left": 1000, "masked": True, "softcap": 30.0, "sinks": True},
}
PAGED_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window_left": 1000, "softcap": 30.0, "sinks": True},
    "int8": {"int8": True},
    "int8 all": {"int8": True, "window_left": 1000, "softcap": 30.0, "sinks": True},
}
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


def attention_launches() -> dict[str, Callable[[], Any]]:
    """`attention DIM DTYPE VARIANT [fast]`, `attention_backward ...`, `paged_attention ...`, ..."""
    calls: dict[str, Callable[[], Any]] = {}

    def add(name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        calls[name] = lambda: call(*args, **kwargs)

    for dims in DIMS:
        dim = str(dims[0]) if dims[0] == dims[1] else f"{dims[0]}/{dims[1]}"
        for dtype in DTYPES:
            # fp32 has the same tiles in both modes
            for invariant in (True, False) if dtype == "bf16" else (True,):
                mode = "" if invariant else " fast"
                for variant, options in DENSE_VARIANTS.items():
                    if dtype == "f32" and variant not in ("causal", "all"):
                        continue
                    name = f"attention {dim} {dtype} {variant}{mode}"
                    add(name, _dense, dims, DTYPES[dtype], invariant, **options)
                for phase, n_tokens in (("prefill", 4096), ("decode", 8)):
                    for variant, options in PAGED_VARIANTS.items():
                        if dtype == "f32" and variant not in ("plain", "int8 all"):
                            continue
                        name = f"paged_attention {phase} {dim} {dtype} {variant}{mode}"
                        add(name, _paged, dims, DTYPES[dtype], invariant, n_tokens, **options)
    for dims, dtype, (variant, options) in product(
        (*DIMS, (96, 96), (160, 160)), DTYPES, DENSE_VARIANTS.items()
    ):
        if dtype == "bf16" or variant in ("causal", "all"):
            name = f"attention_backward {dims[0]}/{dims[1]} {dtype} {variant}"
            add(name, _backward, dims, DTYPES[dtype], **options)
    add("attention_backward batch", _backward, (128, 128), torch.float16, packed=False)
    add("attention 96 bf16 causal fast", _dense, (96, 96), torch.bfloat16, False)
    add("attention 128 f16 batch", _dense, (128, 128), torch.float16, True, packed=False)
    for group in (1, 7, 16):
        options = {"heads": 2 * group, "kv_heads": 2}
        name = f"paged_attention decode 128 bf16 group {group} fast"
        add(name, _paged, (128, 128), torch.bfloat16, False, 8, **options)
    add("append_kv", _append, torch.bfloat16)
    add("append_kv int8", _append, torch.int8)
    return calls


def _meta(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _dense(
    dims: tuple[int, int],
    dtype: torch.dtype,
    invariant: bool,
    window_left: int = -1,
    window_right: int = 0,
    softcap: float = 0.0,
    masked: bool = False,
    sinks: bool = False,
    packed: bool = True,
) -> None:
    lead = (4096,) if packed else (2, 2048)
    q = _meta(*lead, HEADS, dims[0], dtype=dtype)
    k, v = (_meta(*lead, KV_HEADS, dim, dtype=dtype) for dim in dims)
    attention.attention(
        q,
        k,
        v,
        _meta(9) if packed else None,
        _meta(9) if packed else None,
        _meta(*lead, dtype=torch.bool) if masked else None,
        _meta(HEADS, dtype=torch.float32) if sinks else None,
        dims[0] ** -0.5,
        window_left,
        window_right,
        softcap,
        batch_invariant=invariant,
    )


def _backward(
    dims: tuple[int, int],
    dtype: torch.dtype,
    window_left: int = -1,
    window_right: int = 0,
    softcap: float = 0.0,
    masked: bool = False,
    sinks: bool = False,
    packed: bool = True,
) -> None:
    lead = (4096,) if packed else (2, 2048)
    q, o = (_meta(*lead, HEADS, dim, dtype=dtype) for dim in dims)
    k, v = (_meta(*lead, KV_HEADS, dim, dtype=dtype) for dim in dims)
    lse = _meta(*lead[:-1], HEADS, lead[-1], dtype=torch.float32)
    attention_backward.attention_backward(
        o,
        lse,
        q,
        k,
        v,
        o,
        lse,
        _meta(9) if packed else None,
        _meta(9) if packed else None,
        _meta(*lead, dtype=torch.bool) if masked else None,
        _meta(HEADS, dtype=torch.float32) if sinks else None,
        dims[0] ** -0.5,
        window_left,
        window_right,
        softcap,
    )


def _paged(
    dims: tuple[int, int],
    dtype: torch.dtype,
    invariant: bool,
    n_tokens: int,
    window_left: int = -1,
    softcap: float = 0.0,
    sinks: bool = False,
    int8: bool = False,
    heads: int = HEADS,
    kv_heads: int = KV_HEADS,
) -> None:
    pages = (64, kv_heads, PAGE)
    caches = (_meta(*pages, dim, dtype=torch.int8 if int8 else dtype) for dim in dims)
    scales = (_meta(*pages, dtype=torch.float32) if int8 else None for _ in dims)
    paged_attention.paged_attention(
        _meta(n_tokens, heads, dims[0], dtype=dtype),
        *caches,
        _meta(8, 64),
        _meta(9),
        _meta(8),
        *scales,
        _meta(heads, dtype=torch.float32) if sinks else None,
        dims[0] ** -0.5,
        window_left,
        softcap,
        batch_invariant=invariant,
    )


def _append(cache_dtype: torch.dtype) -> None:
    cache, rows = _meta(64, 8, PAGE, 128, dtype=cache_dtype), _meta(8, 8, 128, dtype=torch.bfloat16)
    scales = _meta(64, 8, PAGE, dtype=torch.float32) if cache_dtype == torch.int8 else None
    append_kv.append_kv(rows, rows, cache, cache, _meta(8, 64), _meta(9), _meta(8), scales, scales)
