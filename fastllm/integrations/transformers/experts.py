"""Experts of transformers' mixtures on `fastllm.ops.moe`: forward and backward in one kernel each.

transformers hands every mixture's experts to one function that reads the layer's stacked weights:

    fn(layer, hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K]) -> [T, H]

`experts_forward` is that function. Sums are those of `ops.moe`: fp32 products, weighted in fp32 and
added in the order of the slots, rounded once; gradients of frozen weights are not made. A layer
that `ops.moe` does not know goes to the function that served it before; `refusal` says why.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from transformers import activations
from transformers.integrations import moe as transformers_moe

from fastllm.ops.expert_layout import split_pairs
from fastllm.ops.gated_activation import LIMIT, SLOPE, gated_activation
from fastllm.ops.moe import moe
from fastllm.ops.registry import is_transformed

from . import implementations, registry
from .parts import Offer, hooked
from .probe import agrees, answer, normal

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
    layer: Any = self
    activation = None if structure_refusal(layer) else gating(layer)
    weights = None if activation is None else _weights(layer)
    if (
        activation is None
        or weights is None
        or weights_refusal(weights) is not None
        or not _served(hidden_states)
    ):
        original = registry.original("experts")
        return original(self, hidden_states, top_k_index, top_k_weights)
    gate_up, down = weights["gate_up_proj"], weights["down_proj"]
    transposed = layer.is_transposed  # [E, H, 2 I] and [E, I, H]: read where they lie
    return moe(
        hidden_states.to(gate_up.dtype),
        gate_up.mT if transposed else gate_up,
        down.mT if transposed else down,
        top_k_index.int(),
        top_k_weights.float(),
        gate_up_bias=weights.get("gate_up_proj_bias"),
        down_bias=weights.get("down_proj_bias"),
        activation=activation,
        first_expert=0 if is_parallel(layer) else None,
        out_dtype=hidden_states.dtype,
        interleaved=not layer.is_concatenated,
        allow_nan=True,
    )


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
    return Offer(replaced=True, install=functools.partial(implementations.choose, model, "experts"))


def _served(hidden_states: Tensor) -> bool:
    return hidden_states.dtype in _DTYPES and hidden_states.dim() == 2 and not is_transformed()


def is_experts(module: nn.Module) -> bool:
    """Whether a module is a layer that transformers' experts functions serve."""
    return hasattr(module, "is_concatenated") and hasattr(type(module), "_apply_gate")


def is_parallel(layer: Any) -> bool:
    """Whether a layer holds a rank's slice of the experts; transformers 5.17 does not say."""
    return bool(getattr(layer, "_is_expert_parallel", False))


def refusal(layer: Any) -> str | None:
    """Why `ops.moe` cannot serve a layer for which `is_experts` holds, or None if it can."""
    return structure_refusal(layer) or weights_refusal(_weights(layer))


def structure_refusal(layer: Any) -> str | None:
    """The part of `refusal` that asks what the layer computes."""
    if not layer.has_gate:
        return "its experts have no gate: fastllm's have gate and up"
    if getattr(layer, "has_post_expert_norm", False):  # came after 5.17
        return "it normalizes the output of each expert before the weighted sum"
    if hooked(getattr(layer, "act_fn", None)):
        return "its activation has hooks, which a kernel would not run"
    if gating(layer) is None:
        return f"its gate ({_gate_name(layer)}) is none of fastllm's gated activations"
    return None


def weights_refusal(weights: dict[str, Tensor]) -> str | None:
    """The part of `refusal` that asks in what its weights are stored."""
    for name, weight in weights.items():
        if type(weight) not in (Tensor, nn.Parameter):
            return f"{name} is a {type(weight).__name__}, not a plain tensor"
        if weight.dtype not in _DTYPES:
            return f"{name} is {weight.dtype}: fastllm's experts are float32 or bfloat16"
    if weights["gate_up_proj"].dtype != weights["down_proj"].dtype:
        return "gate_up_proj and down_proj have different dtypes"
    return None


def _weights(layer: Any) -> dict[str, Tensor]:
    # Read once a call: an adapter on them makes the sum of weight and update at every reading.
    names = ["gate_up_proj", "down_proj"]
    if layer.has_bias:
        names += ["gate_up_proj_bias", "down_proj_bias"]
    return {name: getattr(layer, name) for name in names}


def gating(layer: Any) -> str | None:
    """The activation of `ops.moe` that is the layer's `_apply_gate`, or None."""
    gate = type(layer)._apply_gate
    if "_apply_gate" in layer.__dict__:  # somebody's own
        return None
    if gate is transformers_moe._default_apply_gate:
        return _GATED.get(type(layer.act_fn)) if layer.is_concatenated else None
    names = set(gate.__code__.co_names)
    halves = {"chunk"} if layer.is_concatenated else set()
    if names == {*_CLAMPED, *halves} and (layer.limit, layer.alpha) == (LIMIT, SLOPE):
        # A graph that is being traced cannot hold the trial.
        if is_compiling() or _is_clamped_swiglu(gate, layer.is_concatenated):
            return "swiglu_oai"
    return None


@functools.cache
def _is_clamped_swiglu(gate: Callable[..., Tensor], halves: bool) -> bool:
    """Whether a class's `_apply_gate` is GPT-OSS's, tried on a few numbers (see `probe`)."""
    pre = 6 * normal(8, 16, seed=1)
    gate_up = pre.double() if halves else split_pairs(pre.double())
    gates, values = gate_up.chunk(2, dim=-1)
    exact = gated_activation(gates, values, "swiglu_oai")
    constants = SimpleNamespace(limit=LIMIT, alpha=SLOPE)
    return agrees(answer(gate, constants, pre), exact, torch.float32)


def _gate_name(layer: Any) -> str:
    act_fn = getattr(layer, "act_fn", None)
    return type(layer)._apply_gate.__qualname__ if act_fn is None else type(act_fn).__name__
