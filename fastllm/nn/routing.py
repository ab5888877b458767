"""How a router chooses experts."""

from __future__ import annotations

from dataclasses import dataclass


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
