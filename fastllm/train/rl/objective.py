"""The policy's loss from its parts: ratio, clip, KL, and the weight of every token.

Everything is a pure function of flat tensors: T tokens of S completions laid end to end, `lengths`
says how many each has. Nothing is padded.

    r      = exp(logp - old)                           by token, by sample, or not at all
    loss_t = -min(r A, clip(r, 1 - low, 1 + high) A)   + beta KL(policy || reference)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # exp(20) = 5e8: beyond it a ratio is that, without gradient, and no overflow


@dataclass(frozen=True, kw_only=True, slots=True)
class Surrogate:
    """What `policy_loss` gives for every token."""

    loss: Tensor  # [T] float32, differentiable
    low: Tensor  # [T] bool: the ratio was cut below, with an advantage under 0
    high: Tensor  # [T] bool: ... above, with an advantage over 0


def log_ratios(logp: Tensor, old: Tensor, lengths: Tensor, level: str) -> Tensor:
    """log(policy / sampling policy) for every token, `[T]`, differentiable in `logp`.

    level: "token"; "sequence": the mean over the sample's tokens (GSPO); "product": their sum, the
    ratio of whole samples. Raises ValueError for another.
    """
    delta = logp - old
    if level == "token":
        return delta
    if level not in ("sequence", "product"):
        raise ValueError(f"level must be token, sequence or product, got {level!r}")
    sums = torch.segment_reduce(delta, "sum", lengths=lengths, initial=0.0, unsafe=True)
    if level == "sequence":
        sums = sums / lengths.clamp(min=1)
    return sums.repeat_interleave(lengths, output_size=len(delta))


def policy_loss(
    logp: Tensor,
    old: Tensor,
    advantages: Tensor,
    lengths: Tensor,
    *,
    ratio: str = "token",
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
) -> Surrogate:
    """The clipped surrogate of every token (Schulman et al., 2017, arXiv 1707.06347, eq. 7).

    Args:
        logp: `[T]` log-probabilities by the policy; gradients go here alone.
        old: `[T]` by the policy that sampled.
        advantages: `[T]`.
        lengths: `[S]` int64, tokens of each sample, summing to T.
        ratio: see `log_ratios`; "none": -A logp, a weighted cross entropy, without ratio or clip.
        clip_low, clip_high: None: no clip on that side.
    """
    nowhere = torch.zeros_like(logp, dtype=torch.bool)
    if ratio == "none":
        return Surrogate(loss=-advantages * logp, low=nowhere, high=nowhere)
    r = log_ratios(logp, old, lengths, ratio).clamp(max=MAX_LOG_RATIO).exp()
    least = None if clip_low is None else 1 - clip_low
    most = None if clip_high is None else 1 + clip_high
    if least is None and most is None:
        return Surrogate(loss=-advantages * r, low=nowhere, high=nowhere)
    loss = -torch.minimum(r * advantages, r.clamp(least, most) * advantages)
    low = nowhere if least is None else (r < least) & (advantages < 0)
    high = nowhere if most is None else (r > most) & (advantages > 0)
    return Surrogate(loss=loss, low=low, high=high)


def kl_estimate(logp: Tensor, reference: Tensor, kind: str = "k3") -> Tensor:
    """KL(policy || reference) of every token, estimated from the token sampled: `[T]`.

    With d = log(reference / policy): k1 = -d, unbiased; k2 = d^2 / 2; k3 = exp(d) - 1 - d,
    unbiased and never negative (Schulman, 2020, "Approximating KL divergence"). Differentiable.
    Raises ValueError for another kind.
    """
    d = (reference - logp).clamp(max=MAX_LOG_RATIO)
    if kind == "k1":
        return -d
    if kind == "k2":
        return 0.5 * d * d
    if kind == "k3":
        return torch.expm1(d) - d
    raise ValueError(f"kind must be k1, k2 or k3, got {kind!r}")


def token_weights(lengths: Tensor, aggregation: str, longest: int) -> Tensor:
    """What each sample's tokens are multiplied with, `[S]` float64, for a step of these samples.

    The training loop divides the sum over a step by its number of tokens N; with these weights that
    gives

        token      sum over all tokens / N
        sequence   mean over samples of (sum over its tokens / its tokens)
        constant   sum over all tokens / (S longest)

    lengths: `[S]`, tokens of every sample of the step, over all its micro batches. longest: tokens
    that a completion may have. Raises ValueError for another aggregation.
    """
    sizes = lengths.double()
    total, count = sizes.sum(), len(sizes)
    if aggregation == "token":
        return torch.ones_like(sizes)
    if aggregation == "sequence":
        return total / (count * sizes.clamp(min=1))
    if aggregation == "constant":
        return (total / (count * longest)).expand(count).clone()
    raise ValueError(f"aggregation must be token, sequence or constant, got {aggregation!r}")
