"""How much a step away from the reference policy costs: a fixed or an adaptive coefficient."""

from __future__ import annotations

import math
from typing import Any

LIMIT = 0.2  # of the relative error that one update sees


class KlControl:
    """The coefficient of the per-token KL penalty in the reward.

    With a target it follows Ziegler et al., 2019 (arXiv 1909.08593), section 2.2, as published with
    it: after every rollout

        coefficient *= 1 + clip(kl / target - 1, -0.2, 0.2) * samples / horizon

    where kl is the mean over samples of the KL divergence of a whole sample, in nats.

    Args:
        coefficient: at the start, from 0.
        target: nats a sample; None: the coefficient stays.
        horizon: samples over which a constant error of 100% would double it, were it not clipped.

    Raises ValueError naming the argument.
    """

    def __init__(
        self, coefficient: float, target: float | None = None, horizon: float = 10_000
    ) -> None:
        if not 0 <= coefficient < math.inf:
            raise ValueError(f"the KL coefficient must be a number from 0, got {coefficient}")
        for name, value in (("target", target), ("horizon", horizon)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"the KL {name} must be above 0, got {value}")
        if target is not None and not coefficient:
            raise ValueError("a KL coefficient of 0 cannot be adapted: give one above 0")
        self.coefficient = coefficient
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, samples: int) -> None:
        """Follow the divergence of a rollout of `samples` samples."""
        if self.target is None:
            return
        error = min(max(kl / self.target - 1, -LIMIT), LIMIT)
        self.coefficient *= 1 + error * samples / self.horizon

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A coefficient that adapts goes on from where it was; a fixed one is the new run's."""
        if self.target is not None:
            self.coefficient = float(state["coefficient"])
