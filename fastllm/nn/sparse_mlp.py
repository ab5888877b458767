"""A mixture of experts for models that others define: made with weights, called with any shape."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from fastllm.nn import moe as parts
from fastllm.nn.autocast import autocasting
from fastllm.nn.routing import Routing
from fastllm.ops.moe_route import moe_route


class RouterOutput(NamedTuple):
    """What the router of a layer decided, for T tokens and E experts of which k serve a token."""

    logits: Tensor  # float32 [T, E]
    topk_ids: Tensor  # int32 [T, k]
    topk_weights: Tensor  # float32 [T, k]
    load_balancing_loss: Tensor  # float32 []: E * sum over experts of (slots / T) * mean score
    z_loss: Tensor  # float32 []: mean over tokens of logsumexp(logits)^2


class MoE(parts.MoE):
    """A sparse feed-forward: each token passes through `top_k` of `num_experts` gated MLPs.

        y = sum over a token's experts of weight * down(silu(gate(x)) * up(x))   (+ shared expert)

    No capacity, no token dropped. State under the names and in the layout of Hugging Face:
    `gate.weight` [E, H], `experts.gate_up_proj` [E, 2 I, H] (gate first), `experts.down_proj`
    [E, H, I], and `shared_experts.{gate,up,down}_proj.weight`. Values are drawn as `nn.Linear`'s.

    Args:
        hidden: H, width of inputs and outputs.
        intermediate: I, width inside an expert.
        num_experts: E.
        top_k: experts a token.
        scoring: "softmax" over all experts or the "sigmoid" of each.
        renormalize: whether a token's weights add up to one (Mixtral, Qwen3-MoE).
        groups, kept_groups, group_score, scale: see `fastllm.ops.moe_gate` (DeepSeek).
        bias_correction: a float32 buffer `gate.e_score_correction_bias`, zeros, added to the scores
            for the choice alone; whoever trains moves it.
        shared_intermediate: width of an MLP that all tokens pass through; 0: none.
        device, dtype: of the parameters; float32 or bfloat16, as the inputs will be.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    def __init__(
        self, hidden: int, intermediate: int, num_experts: int, top_k: int, *,
        scoring: str = "softmax", renormalize: bool = True, groups: int = 1, kept_groups: int = 1,
        group_score: str = "max", scale: float = 1.0, bias_correction: bool = False,
        shared_intermediate: int = 0, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
        _check_sizes(hidden, intermediate, num_experts, top_k, shared_intermediate)
        routing = Routing(
            per_token=top_k, scoring=scoring, groups=groups, kept_groups=kept_groups,
            group_score=group_score, renormalize=renormalize, scale=scale,
        )  # fmt: skip
        super().__init__(
            hidden, intermediate, num_experts, routing, shared_inner=shared_intermediate,
            bias_correction=bias_correction,
            activation="fp32" if dtype == torch.float32 else "bf16",
        )  # fmt: skip
        # An impossible rule is refused now and not in the first forward.
        with torch.no_grad(), torch.device("cpu"):
            moe_route(torch.zeros(1, num_experts), top_k, **routing.options)
        self._materialize(torch.empty(0, device=device).device, dtype)
        self.reset_parameters()

    def _materialize(self, device: torch.device, dtype: torch.dtype) -> None:
        for owner in list(self.modules()):
            for name, empty in list(owner.named_parameters(recurse=False)):
                setattr(
                    owner, name, nn.Parameter(torch.empty_like(empty, device=device, dtype=dtype))
                )
        bias = self.gate.e_score_correction_bias
        if bias is not None:
            self.gate.e_score_correction_bias = torch.zeros(bias.shape, device=device)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every matrix uniformly from +-1/sqrt(columns), as `nn.Linear` does."""
        for parameter in self.parameters():
            bound = 1 / math.sqrt(parameter.shape[-1])
            parameter.uniform_(-bound, bound)

    @overload  # type: ignore[override]
    def forward(self, x: Tensor, return_router: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, return_router: Literal[True]) -> tuple[Tensor, RouterOutput]: ...
    def forward(
        self, x: Tensor, return_router: bool = False
    ) -> Tensor | tuple[Tensor, RouterOutput]:
        """x [..., H] -> [..., H] in its dtype; differentiable.

        Under torch.autocast x is taken in the dtype of the parameters, and so is y.

        return_router: give `(y, RouterOutput)`. Its `load_balancing_loss` is transformers' (k where
        experts are used evenly) of this layer; add it, times a small factor, to the loss.

        Raises ValueError if x has another width or dtype than the parameters.
        """
        hidden, dtype = self.experts.hidden, self.gate.weight.dtype  # type: ignore[union-attr]
        if x.is_floating_point() and autocasting(x):
            x = x.to(dtype)
        if x.ndim < 1 or x.shape[-1] != hidden or x.dtype != dtype:
            raise ValueError(
                f"x must be {dtype} of shape [..., {hidden}] like the parameters, got {x.dtype} of "
                f"{list(x.shape)}"
            )
        rows = x.reshape(-1, hidden)
        if not return_router:
            return super().forward(rows).view(x.shape)
        logits = self.gate(rows, torch.float32)
        gate, dispatch = self.gate.assign(logits)
        base = None if self.shared_experts is None else self.shared_experts(rows)
        y = self.experts(rows, gate.topk_ids, gate.topk_weights, base, dispatch=dispatch)
        count = max(rows.shape[0], 1)
        balance = (gate.counts / count * (gate.score_sum / count)).sum() * logits.shape[1]
        router = RouterOutput(logits, gate.topk_ids, gate.topk_weights, balance, gate.z_sum / count)
        return y.view(x.shape), router


def _check_sizes(
    hidden: int, intermediate: int, num_experts: int, top_k: int, shared_intermediate: int
) -> None:
    sizes = {"hidden": hidden, "intermediate": intermediate, "num_experts": num_experts}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be positive, got {size}")
    if shared_intermediate < 0:
        raise ValueError(f"shared_intermediate must not be negative, got {shared_intermediate}")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must be from 1 to num_experts ({num_experts}), got {top_k}")
