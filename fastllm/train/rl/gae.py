"""Generalized advantage estimation (Schulman et al., 2016, arXiv 1506.02438) over packed samples.

    delta_t = r_t + gamma V_{t+1} - V_t
    A_t = delta_t + gamma lambda A_{t+1}           R_t = A_t + V_t, what V_t is to be

V_t is the value before token t is said; behind a sample's last token there is nothing to come, or
what `last` says.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float = 1.0, lam: float = 0.95,
    last: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(advantages, returns) of samples laid end to end.

    Args:
        rewards: `[N]`, of each token.
        values: `[N]`, before each token.
        lengths: `[S]` int64, tokens of each sample, at least one, summing to N.
        gamma, lam: the discount and the weight of longer sums, from 0 to 1.
        last: `[S]`, the value behind the last token; None: 0.

    Returns:
        Float32 `[N]` each; sums are made in float64.

    Raises:
        ValueError: naming the argument.
    """
    _check(rewards, values, lengths, gamma, lam)
    longest = int(lengths.max())
    inside = torch.arange(longest, device=lengths.device) < lengths[:, None]
    v = _rows(values, inside)
    following = torch.cat([v[:, 1:], v.new_zeros(len(lengths), 1)], 1)
    if last is not None:
        following.scatter_(1, lengths[:, None] - 1, last.double()[:, None])
    delta = _rows(rewards, inside) + gamma * following - v
    advantages = torch.empty_like(delta)
    running = delta.new_zeros(len(lengths))
    for t in reversed(range(longest)):  # places behind a sample's end hold 0 and leave 0
        running = torch.where(inside[:, t], delta[:, t] + gamma * lam * running, 0.0)
        advantages[:, t] = running
    found = advantages[inside]
    return found.float(), (found + values.double()).float()


def whiten(values: Tensor, shift: bool = True) -> Tensor:
    """`[N]` values with variance 1 and, unless `shift` is false, mean 0, as TRL's `masked_whiten`.

    (x - mean) / sqrt(variance + 1e-8), the variance divided by N - 1. One value becomes 0.
    """
    x = values.double()
    mean = x.mean()
    variance = x.var() if len(x) > 1 else x.new_zeros(())
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift else whitened + mean).float()


def _rows(flat: Tensor, inside: Tensor) -> Tensor:
    """Float64 `[S, longest]`, 0 behind each sample's end."""
    rows = torch.zeros(inside.shape, dtype=torch.float64, device=flat.device)
    rows[inside] = flat.double()
    return rows


def _check(rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float) -> None:
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be from 0 to 1, got {value}")
    if lengths.dim() != 1 or not len(lengths) or bool((lengths < 1).any()):
        raise ValueError("lengths must be [S], at least one token each")
    total = int(lengths.sum())
    for name, tensor in (("rewards", rewards), ("values", values)):
        if tensor.shape != (total,):
            raise ValueError(f"{name} must be [{total}], as lengths say, is {list(tensor.shape)}")
