"""Losses over pairs of answers, from log-probabilities of whole answers.

    d = (chosen - reference chosen) - (rejected - reference rejected)

    sigmoid  -(1 - s) log sigmoid(beta d) - s log sigmoid(-beta d)    arXiv 2305.18290, s: the share
                                                                      of labels taken to be wrong
    ipo      (d' - 1 / (2 beta))^2, d' from means over tokens         arXiv 2310.12036
    hinge    max(0, 1 - beta d)                                       arXiv 2305.10425

`normalize` takes means over an answer's tokens, not sums, for sigmoid and hinge too: long answers
then weigh as short ones. A reward is beta (log-probability - reference).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

MEASURES = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
    "logps/chosen", "logps/rejected",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferenceConfig:
    """Which loss. Raises ValueError naming the field."""

    kind: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    beta: float = 0.1  # how near to the reference the model stays
    label_smoothing: float = 0.0  # of sigmoid
    normalize: bool = False  # by the number of tokens; ipo always does

    def __post_init__(self) -> None:
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"beta must be above 0, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"label_smoothing must be from 0 to below 0.5, got {self.label_smoothing}"
            )
        if self.label_smoothing and self.kind != "sigmoid":
            raise ValueError(f"label_smoothing is for kind sigmoid, not {self.kind}")


def preference_loss(
    logps: Tensor, reference: Tensor, lengths: Tensor, config: PreferenceConfig
) -> Tensor:
    """The loss of each pair.

    logps, reference: `[P, 2]` sums of log-probabilities of the chosen and the rejected answer.
    lengths: `[P, 2]` tokens of the answers. Returns `[P]` in the dtype of `logps`; differentiable.
    """
    ratios = logps - reference
    if config.normalize or config.kind == "ipo":
        ratios = ratios / lengths
    difference = ratios[:, 0] - ratios[:, 1]
    if config.kind == "ipo":
        return (difference - 1 / (2 * config.beta)) ** 2
    if config.kind == "hinge":
        return torch.relu(1 - config.beta * difference)
    right, wrong = logsigmoid(config.beta * difference), logsigmoid(-config.beta * difference)
    return -(1 - config.label_smoothing) * right - config.label_smoothing * wrong


def measures(logps: Tensor, reference: Tensor, beta: float) -> dict[str, Tensor]:
    """`MEASURES`: sums over pairs, whose means are reported, under TRL's names.

    Arguments as of `preference_loss`. A pair of equal rewards counts as wrong.
    """
    rewards = beta * (logps - reference)
    chosen, rejected = rewards.unbind(1)
    return {
        "rewards/chosen": chosen.sum(),
        "rewards/rejected": rejected.sum(),
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype).sum(),
        "rewards/margins": (chosen - rejected).sum(),
        "logps/chosen": logps[:, 0].sum(),
        "logps/rejected": logps[:, 1].sum(),
    }
