"""Log-probabilities of logits: at chosen ids, and the largest of each row.

All statistics are fp32; the log-sum-exp runs over fixed tiles of 512 columns, merged in ascending
order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from .registry import Op

LSE_TILE = 512


def log_probs_ref(logits: Tensor, ids: Tensor) -> Tensor:
    """Plain PyTorch definition of `log_probs`."""
    vocab = logits.shape[1]
    picked = torch.log_softmax(logits.float(), 1).gather(1, ids.long().clamp(0, vocab - 1))
    return picked.masked_fill((ids < 0) | (ids >= vocab), float("nan"))


def top_log_probs_ref(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Plain PyTorch definition of `top_log_probs`."""
    order = logits.sort(dim=1, descending=True, stable=True).indices[:, :k]
    values = torch.log_softmax(logits.float(), 1).gather(1, order)
    invalid = ~torch.isfinite(logits.amax(1, keepdim=True))
    return values, order.int().masked_fill(invalid, -1)


def _log_probs_fake(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.new_empty(ids.shape, dtype=torch.float32)


def _top_log_probs_fake(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


def _save_log_probs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _log_probs_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    # d logp[id] / d logits = one_hot(id) - softmax(logits)
    logits, ids = ctx.saved_tensors
    dy = dy.masked_fill((ids < 0) | (ids >= logits.shape[1]), 0.0)
    dx = torch.softmax(logits.float(), 1) * -dy.sum(1, keepdim=True)
    return dx.scatter_add(1, ids.long().clamp(0, logits.shape[1] - 1), dy), None


_log_probs = Op(
    "log_probs(Tensor logits, Tensor ids) -> Tensor",
    log_probs_ref,
    fake=_log_probs_fake,
    backward=_log_probs_backward,
    setup_context=_save_log_probs,
)
_top_log_probs = Op(
    "top_log_probs(Tensor logits, int k) -> (Tensor, Tensor)",
    top_log_probs_ref,
    fake=_top_log_probs_fake,
)


def columns_contiguous(logits: Tensor, *_: Any) -> bool:
    """Whether a native kernel can read the rows of logits."""
    return logits.stride(1) == 1 or logits.shape[1] == 1


def _log_probs_native(logits: Tensor, ids: Tensor) -> bool:
    return columns_contiguous(logits) and ids.is_contiguous()


def tile_scratch(logits: Tensor, per_tile: int, per_row: int = 0) -> Tensor:
    """Floats for every tile of 512 columns of every row, and for every row."""
    tiles = -(-logits.shape[1] // LSE_TILE)
    return logits.new_empty(logits.shape[0] * (per_tile * tiles + per_row), dtype=torch.float32)


@_log_probs.impl("native", "cpu", dtypes=(torch.float32,), when=_log_probs_native)
def _log_probs_cpu(logits: Tensor, ids: Tensor) -> Tensor:
    out = logits.new_empty(ids.shape)
    _C.log_probs(out, tile_scratch(logits, 2), logits, ids)
    return out


@_top_log_probs.impl("native", "cpu", dtypes=(torch.float32,), when=columns_contiguous)
def _top_log_probs_cpu(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values = logits.new_empty(logits.shape[0], k)
    ids = logits.new_empty((logits.shape[0], k), dtype=torch.int32)
    _C.top_log_probs(values, ids, tile_scratch(logits, 2), logits)
    return values, ids


@_log_probs.impl("triton", "cuda", dtypes=(torch.float32,))
def _log_probs_cuda(logits: Tensor, ids: Tensor) -> Tensor:
    from ..kernels import log_probs as kernel

    return kernel.log_probs(logits, ids)


@_top_log_probs.impl("triton", "cuda", dtypes=(torch.float32,))
def _top_log_probs_cuda(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    from ..kernels import log_probs as kernel

    return kernel.top_log_probs(logits, k)


def log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-softmax of each row at chosen ids, without writing `[S, V]`; differentiable in logits.

    Args:
        logits: `[S, V]` float32.
        ids: `[S, J]` int32 or int64; an id outside [0, V) (padding) gives NaN.

    Returns:
        `[S, J]` float32.

    Raises:
        ValueError: on a shape or dtype other than these.
    """
    check_logits(logits)
    if ids.ndim != 2 or ids.shape[0] != logits.shape[0]:
        raise ValueError(f"ids must have shape [{logits.shape[0]}, J], got {tuple(ids.shape)}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids must be int32 or int64, got {ids.dtype}")
    return _log_probs(logits, ids)


def top_log_probs(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row's log-softmax, descending; not differentiable.

    Ties go to the lower id.

    Args:
        logits: `[S, V]` float32.
        k: 0 <= k <= V.

    Returns:
        `(values, ids)`: `[S, k]` float32 and int32. A row without a distribution (NaN, +inf, or no
        finite logit) gives NaN and -1.

    Raises:
        ValueError: on a shape or dtype other than these, or k outside [0, V].
    """
    check_logits(logits)
    if not 0 <= k <= logits.shape[1]:
        raise ValueError(f"k must be in [0, {logits.shape[1]}] (the columns of logits), got {k}")
    return _top_log_probs(logits, k)


def check_logits(logits: Tensor) -> None:
    """Raise ValueError unless logits are float32 `[S, V]` with V > 0."""
    if logits.ndim != 2 or logits.shape[1] == 0 or logits.dtype != torch.float32:
        raise ValueError(
            "logits must be float32 of shape [S, V] with V > 0, "
            f"got {logits.dtype} of {list(logits.shape)}"
        )
