"""The pairwise ranking loss of reward models, and how well scores order held-out pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

BINS = 5  # of reliability, over confidences from 0.5 to 1


def ranking_loss(
    scores: Tensor, better: Tensor, worse: Tensor, weights: Tensor, margins: Tensor | None = None,
    center: float = 0.0,
) -> Tensor:  # fmt: skip
    """Bradley and Terry's negative log-likelihood of comparisons, summed.

        sum over pairs p of  w_p (-log sigmoid(s_b - s_w - m_p) + center (s_b + s_w)^2)

    With w_p one over the pairs of a ranking it is, divided by the number of rankings, the mean over
    rankings of the mean over pairs (Ouyang et al., 2022, InstructGPT, equation 1). The term with
    `center` keeps scores around 0 (Eisenstein et al., 2023, "Helping or herding?").

    Args:
        scores: `[S]`.
        better, worse: `[P]` int64, places in `scores`.
        weights: `[P]`.
        margins: `[P]`, by how much the better one is to win; None: 0 (Touvron et al., 2023).
        center: coefficient; 0: scores may lie anywhere.

    Returns:
        0-dim, float32 (or float64 scores' dtype), differentiable.
    """
    high, low = scores[better], scores[worse]
    margin = high - low
    terms = -F.logsigmoid(margin if margins is None else margin - margins)
    if center:
        terms = terms + center * (high + low).square()
    return (weights * terms).sum()


@dataclass(frozen=True, kw_only=True, slots=True)
class Bin:
    """Comparisons whose winner was predicted with a confidence in [low, high)."""

    low: float
    high: float
    pairs: int
    confidence: float  # mean
    accuracy: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Ordering:
    """How scores order pairs whose better answer is known."""

    pairs: int
    accuracy: float  # share in the right order; a pair of equal scores counts half
    margin: float  # mean of better minus worse
    ece: float  # expected calibration error: mean |confidence - accuracy| over bins
    bins: tuple[Bin, ...]  # those that hold pairs

    def numbers(self) -> dict[str, float]:
        """For a line of metrics."""
        return {
            "eval_order": self.accuracy, "eval_margin": self.margin, "eval_ece": self.ece,
        }  # fmt: skip

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"{self.pairs} held-out pairs: {100 * self.accuracy:.1f}% in the right order, mean "
            f"margin {self.margin:.3f}, calibration error {100 * self.ece:.1f}%",
            *(
                f"  confidence {100 * b.low:.0f}-{100 * b.high:.0f}%: {b.pairs} pairs, said "
                f"{100 * b.confidence:.1f}%, right {100 * b.accuracy:.1f}%"
                for b in self.bins
            ),
        ]


def ordering(margins: Tensor, bins: int = BINS) -> Ordering:
    """The measure of `margins` [P], better minus worse; P at least 1.

    The winner by score is predicted with confidence sigmoid(|margin|), from 0.5 to 1.
    """
    values = margins.double()
    right = (values > 0).double() + 0.5 * (values == 0)
    confidence = torch.sigmoid(values.abs())
    place = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    found, ece = [], 0.0
    for number in range(bins):
        inside = place == number
        count = int(inside.sum())
        if not count:
            continue
        said, was = float(confidence[inside].mean()), float(right[inside].mean())
        ece += count / len(values) * abs(said - was)
        low, high = 0.5 + number / (2 * bins), 0.5 + (number + 1) / (2 * bins)
        found.append(Bin(low=low, high=high, pairs=count, confidence=said, accuracy=was))
    return Ordering(
        pairs=len(values), accuracy=float(right.mean()), margin=float(values.mean()), ece=ece,
        bins=tuple(found),
    )  # fmt: skip
