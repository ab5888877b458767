"""Policy-gradient algorithms as data: what each is made of, with its paper's values.

    rewards -> advantages (baseline, scale) -> ratio to the sampling policy -> clip
            -> sum over tokens and samples (aggregation) + KL to a reference

A preset is a choice of these parts; every part can be replaced: `replace(PRESETS["grpo"], beta=0)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Baseline = Literal["group", "leave_one_out", "keep"]
Scale = Literal["group", "batch", "none"]
Ratio = Literal["token", "sequence", "product", "none"]
Aggregation = Literal["token", "sequence", "constant"]
KlEstimator = Literal["k1", "k2", "k3"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Algorithm:
    """The parts of an algorithm. Raises ValueError naming the field.

    advantage: a sample's reward minus its group's mean ("group"), minus the mean of the others of
        its group ("leave_one_out"), or 1 from `keep_from` on and nothing below ("keep").
    scale: what advantages are divided by: the deviation of rewards in the group, in the batch, or
        nothing.
    ratio: how the policy is compared with the one that sampled: token by token, by the geometric
        mean over a sample's tokens ("sequence"), by the probability of the whole sample
        ("product"), or not at all: the log-probability itself is raised ("none").
    clip_low, clip_high: the ratio counts from 1 - clip_low to 1 + clip_high; None: no clip.
    aggregation: the mean over all tokens of a step; over samples of each sample's mean
        ("sequence"); or the sum over tokens, divided by samples and the longest completion that is
        allowed ("constant").
    beta, kl, kl_in: weight and estimator of the KL divergence from the reference policy, and
        whether it is added to the loss or taken from the reward. beta 0: there is no reference.
    mask_truncated: samples that were cut at the longest length train nothing.
    dynamic_sampling: groups whose rewards are all equal are replaced by other prompts' groups.
    keep_from: the reward from which "keep" keeps.
    """

    advantage: Baseline = "group"
    scale: Scale = "group"
    ratio: Ratio = "token"
    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    aggregation: Aggregation = "sequence"
    beta: float = 0.0
    kl: KlEstimator = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    mask_truncated: bool = False
    dynamic_sampling: bool = False
    keep_from: float = 1.0

    def __post_init__(self) -> None:
        for name in ("clip_low", "clip_high"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number from 0, or none, got {value}")
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta must be a number from 0, got {self.beta}")
        if self.beta and self.kl == "k1" and self.kl_in == "loss":
            raise ValueError(
                "kl k1 has no gradient on average when it is in the loss: take k2 or k3, or put it "
                "into the reward (kl_in reward)"
            )
        if self.advantage == "keep" and self.scale != "none":
            raise ValueError(f"scale must be none with advantage keep, got {self.scale}")
        if self.advantage == "keep" and self.dynamic_sampling:
            raise ValueError(
                "dynamic_sampling drops groups that are all right, which advantage keep trains on"
            )

    @property
    def least_group(self) -> int:
        """Samples of a prompt that the baseline needs."""
        return 1 if self.advantage == "keep" else 2


PRESETS: dict[str, Algorithm] = {
    # Shao et al., 2024, DeepSeekMath (arXiv 2402.03300), section 4.1: KL coefficient 0.04, one
    # update a rollout. It does not say its clip: PPO's 0.2. TRL's GRPOConfig has beta 0.
    "grpo": Algorithm(beta=0.04),
    # Liu et al., 2025, "Understanding R1-Zero-like training" (arXiv 2503.20783), section 3.2: no
    # deviation, no mean over a sample's own length; beta 0, clip 0.2.
    "dr_grpo": Algorithm(scale="none", aggregation="constant"),
    # Yu et al., 2025, DAPO (arXiv 2503.14476), sections 3.1 to 3.4 and 4.1. Its soft punishment of
    # overlong answers is a reward, to be named beside the others. TRL's loss_type dapo alone keeps
    # epsilon_high at 0.2 and neither masks nor resamples.
    "dapo": Algorithm(
        clip_high=0.28, aggregation="token", mask_truncated=True, dynamic_sampling=True
    ),
    # Zheng et al., 2025, GSPO (arXiv 2507.18071), section 5.1: clip 3e-4 and 4e-4, four
    # mini-batches a rollout; no KL. TRL's defaults stay at 0.2 unless they are given.
    "gspo": Algorithm(ratio="sequence", clip_low=3e-4, clip_high=4e-4),
    # Ahmadian et al., 2024, "Back to basics" (arXiv 2402.14740), section 3: the whole sample is one
    # action, the baseline the mean of the others, the KL inside the reward. The paper tunes beta by
    # task; 0.05 and the clip, which a first update never meets, are those of TRL's RLOOConfig.
    "rloo": Algorithm(
        advantage="leave_one_out", scale="none", ratio="product", beta=0.05, kl="k1",
        kl_in="reward",
    ),
    # Rejection fine-tuning: Yuan et al., 2023 (arXiv 2308.01825): keep the right answers, learn
    # them as in supervised fine-tuning; here with fresh samples every step.
    "rejection": Algorithm(
        advantage="keep", scale="none", ratio="none", clip_low=None, clip_high=None,
        aggregation="token",
    ),
}  # fmt: skip
