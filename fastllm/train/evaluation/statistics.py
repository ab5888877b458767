"""Shares of problems, how sure they are, and pass@k."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

Z95 = 1.959963984540054  # half of the 95% interval of a standard normal


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Chance that one of k of the samples is right: 1 - C(samples - right, k) / C(samples, k).

    The unbiased estimator of Chen et al. 2021 (arXiv 2107.03374).

    Args:
        samples: of the problem.
        right: of them.
        k: drawn without putting back, at most `samples`.

    Raises:
        ValueError: if the numbers do not fit each other.
    """
    if not 0 <= right <= samples:
        raise ValueError(f"right must be from 0 to the {samples} samples, got {right}")
    if not 1 <= k <= samples:
        raise ValueError(f"k must be from 1 to the {samples} samples, got {k}")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def wilson(share: float, count: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's interval of a share of `count` problems; (0, 1) of none."""
    if count == 0:
        return 0.0, 1.0
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = share * (1 - share) / count + z * z / (4 * count * count)
    half = z * math.sqrt(spread) / (1 + z * z / count)
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True, slots=True)
class Share:
    """A mean over problems of numbers from 0 to 1.

    error: its standard error, from the problems' spread (0 of a single problem). low, high:
    Wilson's 95% interval as if each problem were right or wrong, which is exact for one sample each
    and wider than it need be for several.
    """

    value: float
    error: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Share:
        """Of one number a problem. Raises ValueError if there is none."""
        if not values:
            raise ValueError("a share of no problems is asked for")
        mean = statistics.fmean(values)
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(mean, spread / math.sqrt(len(values)), *wilson(mean, len(values)))

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.value:.1%} ± {100 * self.error:.1f} (95%: {self.low:.1%} to {self.high:.1%})"
