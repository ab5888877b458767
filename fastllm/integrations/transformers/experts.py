"""Experts of transformers' mixtures on `fastllm.ops.moe`: forward and backward in one kernel each.

transformers hands every mixture's experts to one function that reads the layer's stacked weights:

    fn(layer, hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K]) -> [T, H]

`experts_forward` is that function. Sums are those of `ops.moe`: fp32 products, weighted in fp32 and
added in the order of the slots, rounded once; gradients of frozen weights are not made. A layer
that `ops.moe` does not know goes to the function that served it before; `refusal` says why.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import activations
from transformers.integrations import moe as transformers_moe

from fastllm.ops.gated_activation import LIMIT, SLOPE
from fastllm.ops.moe import moe

from . import implementations, registry
from .parts import Offer

NAME = "experts"

_DTYPES = (torch.float32, torch.bfloat16)
_GATED = {  # what act_fn(gate) * up is to ops.moe
    nn.SiLU: "silu",
    activations.SiLUActivation: "silu",
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
}
# The names that `_apply_gate` of a clamped SwiGLU uses, with `chunk` where gate and up are halves.
_CLAMPED = ("clamp", "limit", "torch", "sigmoid", "alpha")


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts of a layer, for transformers' `ExpertsInterface`; differentiable.

    Args:
        self: the layer, a class under transformers' `use_experts_implementation`.
        hidden_states: `[T, H]`; taken in the dtype of the weights, as `grouped_mm` does.
        top_k_index: `[T, K]` ids; in an expert-parallel layer, ids of other ranks' experts
            (`num_experts` and above) contribute nothing.
        top_k_weights: `[T, K]` of any float dtype.

    Returns:
        `[T, H]` in the dtype of hidden_states.
    """
    if refusal(self) is not None or not _served(hidden_states):
        original = registry.original("experts")
        return original(self, hidden_states, top_k_index, top_k_weights)
    return _run(self, hidden_states, top_k_index, top_k_weights)


def offer(name: str, module: nn.Module, model: nn.Module) -> Offer | None:
    """The answer of this part (see `parts`): our function for every experts layer it can serve."""
    if not is_experts(module):
        return None
    reason = refusal(module)
    if reason is not None:
        return Offer(reason=reason)
    config = getattr(module, "config", None)
    if getattr(config, "_experts_implementation", None) == implementations.NAME:
        return Offer(replaced=True, reason="already replaced")
    return Offer(replaced=True, install=partial(implementations.choose, model, "experts"))


def _served(hidden_states: Tensor) -> bool:
    return hidden_states.dtype in _DTYPES and hidden_states.dim() == 2


def _run(layer: Any, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    gate_up, down = layer.gate_up_proj, layer.down_proj
    transposed = layer.is_transposed  # [E, H, 2 I] and [E, I, H]: read where they lie
    return moe(
        x.to(gate_up.dtype),
        gate_up.mT if transposed else gate_up,
        down.mT if transposed else down,
        top_k_index.int(),
        top_k_weights.float(),
        gate_up_bias=layer.gate_up_proj_bias if layer.has_bias else None,
        down_bias=layer.down_proj_bias if layer.has_bias else None,
        activation=gating(layer) or "",
        first_expert=0 if layer._is_expert_parallel else None,
        out_dtype=x.dtype,
        interleaved=not layer.is_concatenated,
    )


def is_experts(module: nn.Module) -> bool:
    """Whether a module is a layer that transformers' experts functions serve."""
    return hasattr(module, "_is_expert_parallel") and hasattr(type(module), "_apply_gate")


def refusal(layer: Any) -> str | None:
    """Why `ops.moe` cannot serve a layer for which `is_experts` holds, or None if it can."""
    if not layer.has_gate:
        return "its experts have no gate: fastllm's have gate and up"
    if layer.has_post_expert_norm:
        return "it normalizes the output of each expert before the weighted sum"
    if gating(layer) is None:
        return f"its gate ({_gate_name(layer)}) is none of fastllm's gated activations"
    for name in _weights(layer):
        weight = getattr(layer, name)
        if type(weight) not in (Tensor, nn.Parameter):
            return f"{name} is a {type(weight).__name__}, not a plain tensor"
        if weight.dtype not in _DTYPES:
            return f"{name} is {weight.dtype}: fastllm's experts are float32 or bfloat16"
    return None


def _weights(layer: Any) -> tuple[str, ...]:
    if layer.has_bias:
        return "gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"
    return "gate_up_proj", "down_proj"


def gating(layer: Any) -> str | None:
    """The activation of `ops.moe` that is the layer's `_apply_gate`, or None."""
    gate = type(layer)._apply_gate
    if gate is transformers_moe._default_apply_gate:
        return _GATED.get(type(layer.act_fn)) if layer.is_concatenated else None
    names = set(gate.__code__.co_names)
    halves = {"chunk"} if layer.is_concatenated else set()
    if names == {*_CLAMPED, *halves} and (layer.limit, layer.alpha) == (LIMIT, SLOPE):
        return "swiglu_oai"
    return None


def _gate_name(layer: Any) -> str:
    act_fn = getattr(layer, "act_fn", None)
    return type(layer)._apply_gate.__qualname__ if act_fn is None else type(act_fn).__name__
