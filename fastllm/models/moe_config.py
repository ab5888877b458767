"""What a configuration says of a mixture of experts: sizes, routing, which layers have none."""

from __future__ import annotations

from dataclasses import dataclass

from fastllm.nn.routing import Routing

_BOUNDS = {
    "num_experts": (1, 4096),
    "per_token": (1, 128),
    "moe_intermediate_size": (1, 1 << 20),
    "shared": (0, 64),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeConfig:
    """A router sends each token through `per_token` of `num_experts` gated MLPs.

    Raises ValueError if a value is out of range or values contradict each other.
    """

    num_experts: int
    per_token: int
    moe_intermediate_size: int  # columns between gate, up and down of one expert
    shared: int = 0  # experts that all tokens take: one MLP of `shared` times that width
    scoring: str = "softmax"  # of the router's logits, or "sigmoid"
    groups: int = 1  # of experts; a token takes experts of its best `kept_groups` alone
    kept_groups: int = 1
    group_score: str = "max"  # of a group's choices, or "top2": the sum of the two best
    renormalize: bool = False  # a token's weights are divided by their sum
    scale: float = 1.0  # what they are multiplied with then
    bias_correction: bool = False  # a bias an expert decides who is chosen, and weighs nothing
    dense_layers: tuple[int, ...] = ()  # layers with a plain MLP, ascending

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} must be from {low} to {high}, is {value}")
        if self.per_token > self.num_experts:
            raise ValueError(
                f"per_token {self.per_token} is more than the num_experts {self.num_experts}"
            )
        if self.scoring not in ("softmax", "sigmoid"):
            raise ValueError(f"scoring must be softmax or sigmoid, is {self.scoring!r:.80}")
        if not 0 < self.scale < 1e6:
            raise ValueError(f"scale must be positive and below 1e6, is {self.scale}")
        self._check_groups()
        if list(self.dense_layers) != sorted({n for n in self.dense_layers if n >= 0}):
            raise ValueError(f"dense_layers must ascend from 0, are {self.dense_layers!s:.200}")

    def _check_groups(self) -> None:
        if self.group_score not in ("max", "top2"):
            raise ValueError(f"group_score must be max or top2, is {self.group_score!r:.80}")
        if self.groups < 1 or self.num_experts % self.groups:
            raise ValueError(
                f"num_experts {self.num_experts} is not a multiple of groups {self.groups}"
            )
        if self.groups == 1:  # nothing to choose from: one spelling
            object.__setattr__(self, "group_score", "max")
        if not 1 <= self.kept_groups <= self.groups:
            raise ValueError(f"kept_groups must be from 1 to {self.groups}, is {self.kept_groups}")
        size = self.num_experts // self.groups
        if self.per_token > self.kept_groups * size:
            raise ValueError(
                f"per_token {self.per_token} is more than {self.kept_groups} groups of {size} hold"
            )
        if self.groups > 1 and self.group_score == "top2" and size < 2:
            raise ValueError(f"group_score top2 needs two experts a group, there are {self.groups}")

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the MLP that all tokens take; 0: there is none."""
        return self.shared * self.moe_intermediate_size

    @property
    def routing(self) -> Routing:
        """How the router chooses."""
        return Routing(
            per_token=self.per_token,
            scoring=self.scoring,
            groups=self.groups,
            kept_groups=self.kept_groups,
            group_score=self.group_score,
            renormalize=self.renormalize,
            scale=self.scale,
        )
