"""Balance of experts: what routers choose is counted, and pushed towards even loads.

Of one layer, in a step of T tokens (of all micro batches and processes), E experts, k of them a
token, with the router's scores summed to one for each token:

    load_e = E (slots of e) / (k T)        1 is the mean
    P_e    = mean score of e
    aux    = sum_e load_e P_e              1 where either is even (arXiv 2101.03961, equation 4)
    z      = mean of lse(logits)^2         keeps logits small (arXiv 2202.08906, equation 5)
    bias_e += rate * sign(1 - load_e)      of selection alone, no gradient (arXiv 2408.15664)

The first two are losses: `aux_loss * aux + z_loss * z` of every layer is added to the mean loss of
a token. `aux` has its gradient through P alone. There `load` is that of the step before: a sum over
tokens of fixed coefficients does not depend on how the step is cut into micro batches and
processes, and no process waits for the counts of another inside a layer. The numbers that are shown
are those of the formulas. A run's reported loss is the cross entropy alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastllm.models.decoder import Decoder
from fastllm.nn.moe import MoE
from fastllm.train import distributed

SHOWN_DIGITS = 4  # of the loads in a line of metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class BalanceConfig:
    """How experts are kept busy; None: what suits the model's family (`presets.balance`).

    Raises ValueError for a value that is negative or not a number.
    """

    aux_loss: float | None = None  # times the sum over experts of load and mean score
    z_loss: float | None = None  # times the mean of the squared log-sum-exp of the logits
    bias_update: float | None = None  # a step moves each selection bias by this; needs such biases

    def __post_init__(self) -> None:
        for name in ("aux_loss", "z_loss", "bias_update"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number from 0, got {value}")


class Routed(Protocol):
    """What a gate gives, as `fastllm.ops.moe_gate` does; T tokens, E experts, k a token."""

    @property
    def topk_weights(self) -> Tensor:
        """float32 `[T, k]`."""

    @property
    def counts(self) -> Tensor:
        """int32 `[E]`: slots of each expert."""

    @property
    def score_sum(self) -> Tensor:
        """float32 `[E]`, differentiable: sum over tokens of scores that are one for each token."""

    @property
    def z_sum(self) -> Tensor:
        """float32 `[]`, differentiable: sum over tokens of the squared log-sum-exp."""


class Balance:
    """Counts of all layers of a model, their losses' gradients, the biases' updates.

    layers: number of each layer that has experts. biases: float32 `[E]` of each, updated in place;
    empty: the model has none. Counts are kept on `device`, and nothing waits for it before
    `numbers`.

    Raises ValueError if `bias_update` is asked of a model without biases.
    """

    def __init__(
        self, layers: Sequence[int], experts: int, config: BalanceConfig, *,
        biases: Sequence[Tensor] = (), device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.rate = config.bias_update or 0.0
        if self.rate and len(biases) != len(layers):
            raise ValueError(
                "balance.bias_update needs a selection bias in every router, which this model's "
                "family does not have: give balance.aux_loss, or model.family=deepseek_v3"
            )
        self.layers = tuple(layers)
        self.experts = experts
        self.aux_loss, self.z_loss = config.aux_loss or 0.0, config.z_loss or 0.0
        self._biases = list(biases)
        # Columns: slots of each expert, scores of each, z, tokens. Of this step and process; of all
        # steps since the last line of metrics and all processes.
        size = (len(self.layers), 2 * experts + 2)
        self._step = torch.zeros(size, dtype=torch.float64, device=device)
        self._window = torch.zeros_like(self._step)
        # Even loads have no gradient: each token's scores sum to one.
        self.load = torch.ones(len(self.layers), experts, dtype=torch.float32, device=device)
        self.hooks = [LayerBalance(self, index) for index in range(len(self.layers))]

    def begin(self) -> None:
        """A micro batch begins: each layer is counted once in it, however often it is computed."""
        for hook in self.hooks:
            hook.counted = False

    @torch.no_grad()
    def after_step(self) -> None:
        """Once after each step of the optimizer; every process calls it."""
        distributed.sum_(self._step)
        counts = self._step[:, : self.experts]
        total = counts.sum(dim=1, keepdim=True)
        self.load.copy_(counts * self.experts / total.clamp(min=1))
        if self.rate:
            signs = torch.sign(total - self.experts * counts)  # of whole numbers: exact
            for bias, sign in zip(self._biases, signs, strict=True):
                bias.add_(sign.to(bias.dtype), alpha=self.rate)
        self._window += self._step
        self._step.zero_()

    def state(self) -> dict[str, Tensor]:
        """Live tensors that a resumed run needs; the biases are among the model's weights."""
        return {"balance.load": self.load, "balance.window": self._window}

    def numbers(self, *, loads: bool = False) -> dict[str, Any]:
        """What was counted since the last call, for a line of metrics; {} before the first step.

        Single numbers are those of the worst layer (`expert_load`: most over mean, `expert_entropy`
        of the loads, over that of even ones), or means over layers; `experts` holds a list of each
        with a value for each layer. loads: with the load of every expert.
        """
        rows = self._window.tolist()
        self._window.zero_()
        if not rows or not all(row[-1] for row in rows):
            return {}
        found = [self._layer(row) for row in rows]
        worst = max(range(len(found)), key=lambda i: found[i]["load"])
        by_layer: dict[str, Any] = {"layer": list(self.layers)}
        by_layer |= {key: [round(layer[key], 6) for layer in found] for key in found[0]}
        if loads:
            by_layer["loads"] = [self._loads(row) for row in rows]

        def mean(key: str) -> float:
            return float(sum(layer[key] for layer in found) / len(found))

        return {
            "expert_load": found[worst]["load"],
            "expert_load_layer": self.layers[worst],
            "expert_unused": mean("unused"),
            "expert_entropy": min(layer["entropy"] for layer in found),
            "aux_loss": mean("aux"),
            "z_loss": mean("z"),
            "experts": by_layer,
        }

    def _layer(self, row: Sequence[float]) -> dict[str, float]:
        """One layer's numbers from its counts."""
        experts, tokens = self.experts, row[-1]
        counts, scores = row[:experts], row[experts : 2 * experts]
        total = sum(counts)
        shares = [count / total for count in counts]
        entropy = -sum(share * math.log(share) for share in shares if share)
        return {
            "load": max(counts) * experts / total,
            "unused": counts.count(0.0) / experts,
            "entropy": entropy / math.log(experts) if experts > 1 else 1.0,
            "aux": experts * sum(s * p / tokens for s, p in zip(shares, scores, strict=True)),
            "z": row[2 * experts] / tokens,
        }

    def _loads(self, row: Sequence[float]) -> list[float]:
        counts = row[: self.experts]
        mean = sum(counts) / self.experts
        return [round(count / mean, SHOWN_DIGITS) for count in counts]

    # for the hooks

    def count(self, index: int, gate: Routed) -> None:
        """Add a layer's micro batch."""
        row, experts = self._step[index], self.experts
        with torch.no_grad():
            row[:experts] += gate.counts
            row[experts : 2 * experts] += gate.score_sum
            row[-2] += gate.z_sum
            row[-1] += gate.topk_weights.shape[0]


class LayerBalance:
    """What one layer calls with each result of its gate, where gradients are recorded."""

    def __init__(self, owner: Balance, index: int) -> None:
        self._owner, self._index = owner, index
        self.counted = False  # in this micro batch; activation checkpointing computes it again

    def record(self, gate: Routed) -> Tensor:
        """The gate's weights `[T, k]`, whose backward adds the gradients of the losses."""
        owner = self._owner
        if not self.counted:
            owner.count(self._index, gate)
            self.counted = True
        if not (owner.aux_loss or owner.z_loss):
            return gate.topk_weights
        load = owner.load[self._index]
        return with_losses(
            gate.topk_weights, gate.score_sum, gate.z_sum, owner.aux_loss * load, owner.z_loss
        )


def with_losses(
    topk_weights: Tensor, score_sum: Tensor, z_sum: Tensor, d_score: Tensor, d_z: float
) -> Tensor:
    """`topk_weights`, whose backward also sends `d_score` to `score_sum` and `d_z` to `z_sum`.

    The loss `(d_score * score_sum).sum() + d_z * z_sum` is thus added to whatever loss is made of
    the weights, if that is the sum of the losses of tokens: both are divided by the same number of
    tokens later.

    Args:
        topk_weights: `[T, k]`.
        score_sum: `[E]`.
        z_sum: `[]`.
        d_score: `[E]`, the gradient of `score_sum`.
        d_z: the gradient of `z_sum`.
    """
    weights: Tensor = _WithLosses.apply(topk_weights, score_sum, z_sum, d_score, d_z)  # type: ignore[no-untyped-call]
    return weights


class _WithLosses(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, topk_weights: Tensor, score_sum: Tensor, z_sum: Tensor, d_score: Tensor,
        d_z: float,
    ) -> Tensor:  # fmt: skip
        ctx.d_score, ctx.d_z, ctx.like = d_score, d_z, z_sum.detach()
        return topk_weights.view_as(topk_weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return grad, ctx.d_score, torch.full_like(ctx.like, ctx.d_z), None, None


def describe(numbers: Mapping[str, Any]) -> str:
    """`experts 1.31x (layer 3)`: the busiest expert of the worst layer, over the mean."""
    return f"experts {numbers['expert_load']:.2f}x (layer {numbers['expert_load_layer']})"


def attach_balance(model: Decoder, config: BalanceConfig) -> Balance | None:
    """Watch every router of a model; None: it has none. Raises ValueError as `Balance` does."""
    experts = model.config.experts
    if experts is None:
        return None
    layers = {
        number: layer.mlp
        for number, layer in enumerate(model.model.layers)
        if isinstance(layer.mlp, MoE)
    }
    biases = [mlp.gate.e_score_correction_bias for mlp in layers.values()]
    balance = Balance(
        list(layers),
        experts.num_experts,
        config,
        biases=[bias for bias in biases if bias is not None],
        device=model.device,
    )
    for mlp, hook in zip(layers.values(), balance.hooks, strict=True):
        mlp.balance = hook
    return balance
