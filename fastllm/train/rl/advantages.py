"""How much better a sample is than its group: the advantages of critic-free algorithms."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

EPS = 1e-4  # beside the deviation, as in TRL


def group_advantages(
    rewards: Tensor, groups: Tensor, scale: str = "group", leave_one_out: bool = False
) -> Tensor:
    """Rewards against the mean of their group, over a deviation.

        A_i = (r_i - mean) / (deviation + 1e-4)

    Deviations are unbiased (divided by n - 1). A group whose rewards are all equal gets exactly 0,
    and so does a group of one sample, with a warning: there is nothing to compare it with.

    Args:
        rewards: `[N]`, finite.
        groups: `[N]` integers; samples of one prompt share theirs.
        scale: "group": the deviation of the group's rewards; "batch": of all rewards; "none": 1 is
            the divisor.
        leave_one_out: the mean of the others in place of the group's: n / (n - 1) times as much.

    Returns:
        Float32 `[N]`; sums are made in float64.

    Raises:
        ValueError: naming the argument.
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale must be group, batch or none, got {scale!r}")
    values, ids, sizes = _checked(rewards, groups)
    count = sizes[ids].double()
    centred = values - _sums(values, ids, len(sizes))[ids] / count
    centred = centred.masked_fill(equal_groups(rewards, groups), 0.0)
    if bool((sizes == 1).any()):
        warnings.warn(
            "groups of one sample have nothing to be compared with: their advantage is 0",
            stacklevel=2,
        )
    if leave_one_out:
        centred = centred * (count / (count - 1).clamp(min=1))
    if scale == "group":
        squares = _sums((values - _means(values, ids, sizes)[ids]) ** 2, ids, len(sizes))
        deviation = (squares / (sizes - 1).clamp(min=1)).sqrt()[ids]
        centred = centred / (deviation + EPS)
    elif scale == "batch" and len(values) > 1:
        centred = centred / (values.std() + EPS)
    return centred.float()


def kept(rewards: Tensor, keep_from: float) -> Tensor:
    """1 where the reward is at least `keep_from`, else 0: float32 `[N]`."""
    return (rewards >= keep_from).float()


def equal_groups(rewards: Tensor, groups: Tensor) -> Tensor:
    """Bool `[N]`: whether all rewards of the sample's group are the same number."""
    values, ids, sizes = _checked(rewards, groups)
    low = torch.full((len(sizes),), torch.inf, dtype=torch.float64, device=values.device)
    high = low.neg()
    low = low.scatter_reduce(0, ids, values, "amin")
    high = high.scatter_reduce(0, ids, values, "amax")
    return (low == high)[ids]


def _checked(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rewards in float64, group of each from 0, samples of each group)."""
    if rewards.dim() != 1 or groups.shape != rewards.shape:
        raise ValueError(
            f"rewards and groups must be [N], got {list(rewards.shape)} and {list(groups.shape)}"
        )
    values = rewards.double()
    bad = torch.nonzero(~values.isfinite())
    if len(bad):
        first = int(bad[0])
        raise ValueError(f"rewards[{first}] is {float(values[first])}, not a finite number")
    _, ids = torch.unique(groups, return_inverse=True)
    return values, ids, torch.bincount(ids)


def _sums(values: Tensor, ids: Tensor, count: int) -> Tensor:
    return values.new_zeros(count).index_add(0, ids, values)


def _means(values: Tensor, ids: Tensor, sizes: Tensor) -> Tensor:
    return _sums(values, ids, len(sizes)) / sizes
