"""Sorting the choices of a router by expert: a stable counting sort without a host sync.

Slot t * k + j is the j-th expert of token t. Rows of sorted order are slots, by expert and within
an expert ascending, so that an expert's tokens are `offsets[e] .. offsets[e + 1]` of `slots`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from .checks import values_readable
from .registry import Op


def moe_dispatch_ref(topk_ids: Tensor, n_experts: int, first_expert: int) -> tuple[Tensor, Tensor]:
    """Plain PyTorch definition of `moe_dispatch`."""
    ids = topk_ids.reshape(-1).long() - first_expert
    local = torch.where(
        (ids >= 0) & (ids < n_experts) & (topk_ids.reshape(-1) >= 0), ids, n_experts
    )
    order = torch.argsort(local, stable=True)
    counts = torch.zeros(n_experts + 1, dtype=torch.int64, device=ids.device)
    counts = counts.scatter_add_(0, local, torch.ones_like(local))[:n_experts]
    ends = counts.cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends]).int()
    rows = torch.arange(order.shape[0], device=ids.device)
    slots = torch.where(rows < offsets[-1], order, -1).int()
    return offsets, slots


def _fake(topk_ids: Tensor, n_experts: int, first_expert: int) -> tuple[Tensor, Tensor]:
    return topk_ids.new_empty(n_experts + 1), topk_ids.new_empty(topk_ids.numel())


_moe_dispatch = Op(
    "moe_dispatch(Tensor topk_ids, int n_experts, int first_expert) -> (Tensor, Tensor)",
    moe_dispatch_ref,
    fake=_fake,
)


def _contiguous(topk_ids: Tensor, *_: Any) -> bool:
    return topk_ids.is_contiguous()


@_moe_dispatch.impl("native", "cpu", dtypes=(torch.int32,), when=_contiguous)
def _moe_dispatch_cpu(topk_ids: Tensor, n_experts: int, first_expert: int) -> tuple[Tensor, Tensor]:
    offsets = topk_ids.new_empty(n_experts + 1)
    slots = topk_ids.new_empty(topk_ids.numel())
    counts = topk_ids.new_empty(_C.moe_dispatch_scratch(slots.numel(), n_experts))
    _C.moe_dispatch(offsets, slots, counts, topk_ids, first_expert)
    return offsets, slots


@_moe_dispatch.impl("triton", "cuda", dtypes=(torch.int32,))
def _moe_dispatch_triton(
    topk_ids: Tensor, n_experts: int, first_expert: int
) -> tuple[Tensor, Tensor]:
    from ..kernels import moe_dispatch as kernel

    return kernel.moe_dispatch(topk_ids, n_experts, first_expert)


def moe_dispatch(
    topk_ids: Tensor, n_experts: int, first_expert: int | None = None
) -> tuple[Tensor, Tensor]:
    """Sort a router's choices by expert, for the experts `[first_expert, first_expert + n)`.

    Args:
        topk_ids: int32 `[T, k]`, ids of experts; -1 chooses none.
        n_experts: n, how many experts are served here.
        first_expert: the id of the first one. None: these are all experts there are, and ids
            outside `[-1, n)` are an error; a number: ids of other experts are passed over.

    Returns:
        offsets int32 `[n + 1]`, where each expert's rows begin, and the end of the last; slots
        int32 `[T * k]`, the slot t * k + j of each row, -1 in the rows past `offsets[n]`.

    Raises:
        ValueError: on an argument of another shape, dtype or range, naming it.
    """
    check_choices(topk_ids, n_experts, first_expert)
    return sort_choices(topk_ids, n_experts, first_expert)


def sort_choices(
    topk_ids: Tensor, n_experts: int, first_expert: int | None
) -> tuple[Tensor, Tensor]:
    """`moe_dispatch` of choices that the caller has checked."""
    return _moe_dispatch(topk_ids.contiguous(), n_experts, first_expert or 0)


def check_choices(topk_ids: Tensor, n_experts: int, first_expert: int | None) -> None:
    """Raise ValueError unless `topk_ids` are choices among the experts; values where readable."""
    if topk_ids.dtype != torch.int32 or topk_ids.dim() != 2:
        raise ValueError(
            f"topk_ids must be int32 of shape [T, k], got {topk_ids.dtype} of "
            f"{tuple(topk_ids.shape)}"
        )
    if n_experts < 0 or (first_expert or 0) < 0:
        raise ValueError(
            f"n_experts and first_expert must not be negative, got {n_experts} and {first_expert}"
        )
    if topk_ids.numel() >= 2**31:
        raise ValueError(f"topk_ids holds {topk_ids.numel()} choices; a slot is an int32")
    if first_expert is None and topk_ids.shape[1] > n_experts and topk_ids.numel():
        raise ValueError(f"topk_ids chooses k = {topk_ids.shape[1]} experts a token of {n_experts}")
    if not topk_ids.numel() or not values_readable(topk_ids):
        return
    low, high = (int(v) for v in torch.aminmax(topk_ids))
    if low < -1 or (first_expert is None and high >= n_experts):
        last = f"{n_experts - 1}" if first_expert is None else "the last expert"
        raise ValueError(f"topk_ids must lie between -1 and {last}, got {low} .. {high}")


def check_dispatch(offsets: Tensor, slots: Tensor, n_experts: int, count: int) -> None:
    """Raise ValueError unless offsets and slots are `moe_dispatch`'s of `count` choices."""
    for name, tensor, size in (("offsets", offsets, n_experts + 1), ("slots", slots, count)):
        if tensor.dtype != torch.int32 or tuple(tensor.shape) != (size,):
            raise ValueError(
                f"dispatch: {name} must be int32 of shape [{size}], got {tensor.dtype} of "
                f"{tuple(tensor.shape)}"
            )
    if not values_readable(offsets):
        return
    if int(offsets[0]) != 0 or bool((offsets.diff() < 0).any()) or int(offsets[-1]) > count:
        raise ValueError(f"dispatch: offsets must ascend from 0 to at most {count} choices")
    used = slots[: int(offsets[-1])]
    if used.numel() and (int(used.min()) < 0 or int(used.max()) >= count):
        raise ValueError(f"dispatch: slots must lie in [0, {count}) where an expert has rows")
