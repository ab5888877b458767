"""Learning-rate schedules: the factor of a step, by which every group's own rate is multiplied.

warmup    linear: the first step already learns, the last warmup step has the full rate
cosine    half a cosine from 1 down to `final` (Loshchilov & Hutter 2017, arXiv:1608.03983)
wsd       warmup, stable, decay: 1 until the last `decay` of the steps, then down to `final`, by
          1 - sqrt(share) or linearly (Hu et al. 2024, arXiv:2404.06395; the root ends lower in
          loss than the line at equal length: Haegele et al. 2024, arXiv:2405.18392)
constant  1
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Which factor a step has. Raises ValueError for shares outside [0, 1]."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: int = 0  # steps
    final: float = 0.1  # the factor that cosine and wsd end at
    decay: float = 0.2  # wsd: the last share of the steps
    shape: Literal["sqrt", "linear"] = "sqrt"  # wsd: of the decay

    def __post_init__(self) -> None:
        if self.kind not in ("cosine", "wsd", "constant"):
            raise ValueError(f"kind must be cosine, wsd or constant, got {self.kind!r:.80}")
        if self.shape not in ("sqrt", "linear"):
            raise ValueError(f"shape must be sqrt or linear, got {self.shape!r:.80}")
        if self.warmup < 0:
            raise ValueError(f"warmup must be at least 0 steps, got {self.warmup}")
        for name in ("final", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")


def factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """What the rates of step `step` (from 0) of `steps` are multiplied with, in [0, 1].

    The last step, `steps - 1`, is the one nearest to `final`; steps beyond it stay there.
    """
    warmup = min(config.warmup, steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.kind == "constant":
        return 1.0
    start = warmup
    if config.kind == "wsd":
        start = max(warmup, steps - round(config.decay * steps))
    if step < start or steps <= start:
        return 1.0
    share = min((step + 1 - start) / (steps - start), 1.0)
    if config.kind == "cosine":
        kept = 0.5 * (1 + math.cos(math.pi * share))
    else:
        kept = 1 - (math.sqrt(share) if config.shape == "sqrt" else share)
    return config.final + (1 - config.final) * kept
