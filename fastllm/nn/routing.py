"""How a router chooses experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """The rule of one layer; the meanings are those of `fastllm.ops.moe_gate`."""

    per_token: int
    scoring: str = "softmax"
    groups: int = 1
    kept_groups: int = 1
    group_score: str = "max"
    renormalize: bool = False
    scale: float = 1.0

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of `moe_gate` and `moe_route` that say so."""
        return {
            "scoring": self.scoring,
            "groups": self.groups,
            "kept_groups": self.kept_groups,
            "group_score": self.group_score,
            "renormalize": self.renormalize,
            "scale": self.scale,
        }
