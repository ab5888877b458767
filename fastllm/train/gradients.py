"""Gradients between backward and step: their norm, how clipping scales them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from fastllm.ops.sum_of_squares import sum_of_squares


def grad_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients as one vector, of all shards of FSDP2's.

    Args:
        parameters: those without a gradient count nothing.

    Returns:
        0-dim float32 on the device of the gradients; the same on every process of a mesh. The
        CPU's zero if there are no gradients.

    Raises:
        ValueError: if a gradient holds partial sums, or gradients are on different devices.
    """
    sums: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
    for p in parameters:
        if p.grad is not None:
            shard, groups = _local_part(p.grad)
            sums.setdefault(groups, []).append(sum_of_squares(shard.detach()))
    devices = {t.device for parts in sums.values() for t in parts}
    if len(devices) > 1:
        raise ValueError(f"gradients are on several devices: {sorted(map(str, devices))}")
    total = torch.zeros((), dtype=torch.float64, device=devices.pop() if devices else "cpu")
    for groups, parts in sums.items():
        part = torch.stack(parts).sum(dtype=torch.float64)
        for group in groups:
            dist.all_reduce(part, group=group)
        total = total + part
    return total.sqrt().float()


def _local_part(grad: Tensor) -> tuple[Tensor, tuple[dist.ProcessGroup, ...]]:
    # What this process holds, and the groups over which the parts add up to the whole.
    if not isinstance(grad, DTensor):
        return grad, ()
    groups = []
    for dim, placement in enumerate(grad.placements):
        if placement.is_partial():
            raise ValueError("a gradient holds partial sums: reduce it before its norm is taken")
        if isinstance(placement, Shard):
            groups.append(grad.device_mesh.get_group(dim))
    return grad.to_local(), tuple(groups)


def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float, grad_scale: Tensor) -> Tensor:
    """Scale down the step where the gradient is long; the gradients themselves are not rewritten.

    The gradient meant is `grad_scale * p.grad`. `grad_scale` is multiplied in place by
    `min(1, max_norm / norm)` and then goes to the optimizer's `step(grad_scale=...)`: one pass over
    the gradients instead of three, and nothing waits for the device.

    Args:
        parameters: as in `grad_norm`.
        max_norm: infinity to measure only.
        grad_scale: 0-dim float32, for example one over the number of tokens; written.

    Returns:
        The norm before clipping, 0-dim float32. NaN or infinity where a gradient has one; then
        `grad_scale` is useless too, and the caller does not step.

    Raises:
        ValueError: if `max_norm` is not positive, `grad_scale` is not as said, or as `grad_norm`.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be positive, got {max_norm}")
    if grad_scale.shape or grad_scale.dtype != torch.float32:
        raise ValueError(
            "grad_scale must be a 0-dim float32 tensor, "
            f"got {grad_scale.dtype} of {tuple(grad_scale.shape)}"
        )
    norm = grad_norm(parameters) * grad_scale.abs()
    # 1e-6 as torch's: a zero gradient divides nothing by zero.
    grad_scale.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
