"""LoRA and QLoRA: low-rank adapters on a frozen model (arXiv 2106.09685, 2305.14314).

The base may be plain parameters, packed caches of them, or packed weights alone: of a quantized
file, of a model that was quantized as it was loaded, or of the `QuantLinear`s of any model.
`add_lora` freezes it and gives the adapter's parameters, which start as no change: B is zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from fastllm.errors import did_you_mean
from fastllm.nn.linear import Linear
from fastllm.nn.low_rank import Factor, LowRank
from fastllm.nn.moe import Experts
from fastllm.nn.quant_linear import QuantLinear
from fastllm.nn.scalar_head import scalar_head

ALL_LINEAR = "all-linear"
Layer = Linear | QuantLinear  # what takes an adapter
_CONFIG = "_lora_config"  # of a model with an adapter
DEFAULT_TARGETS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """What an adapter is; names and meanings are PEFT's.

    r: rank. alpha: the term is scaled by alpha / r, or by alpha / sqrt(r) with rslora (2312.03732).
    dropout: share of A's inputs dropped in training. target_modules: layers by the end of their
    name ("q_proj", "self_attn.q_proj", "layers.0.mlp.up_proj"), or "all-linear". Of the default
    ones a model of experts needs to have only some: experts and routers take no adapter.
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: Sequence[str] | str = DEFAULT_TARGETS
    rslora: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"r (the rank of an adapter) must be an integer from 1, got {self.r}")
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha must be a finite number, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be from 0 to below 1, got {self.dropout}")
        if isinstance(self.target_modules, str):
            if self.target_modules != ALL_LINEAR:
                object.__setattr__(self, "target_modules", (self.target_modules,))
        elif not self.target_modules:
            raise ValueError("target_modules is empty: name at least one layer, or 'all-linear'")
        else:
            object.__setattr__(self, "target_modules", tuple(self.target_modules))

    @property
    def scale(self) -> float:
        """What B(A x) is multiplied with."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


def add_lora(model: nn.Module, config: LoraConfig, seed: int = 0) -> list[nn.Parameter]:
    """Freeze `model` and put an adapter on every target layer.

    A is drawn uniformly from +-1/sqrt(in) (torch's Kaiming default) by `seed` alone, layer after
    layer in the order of names; B is zero. Parameters are in the model's compute dtype, and named
    `<layer>.lora_A.weight` and `<layer>.lora_B.weight`.

    Args:
        model: a `Decoder`, or any module made of `fastllm.nn.linear.Linear` or `QuantLinear`.
        config: rank, scale, dropout, targets.
        seed: of A.

    Returns:
        The parameters to be trained.

    Raises:
        ValueError: if the model has adapters, or a target names none of its layers.
    """
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, layer in target_layers(model, config.target_modules):
        bound = layer.in_features**-0.5
        a = torch.empty(config.r, layer.in_features, device="cpu")
        b = torch.zeros(layer.out_features, config.r, device="cpu")
        factors[name] = a.uniform_(-bound, bound, generator=generator), b
    return attach_all(model, config, factors)


def attach_all(
    model: nn.Module, config: LoraConfig, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> list[nn.Parameter]:
    """Freeze `model`, all but a scalar head, and give its layers the adapters A `[r, in]` and B
    `[out, r]` by name.

    Returns:
        The adapter's parameters, copies in the compute dtype.

    Raises:
        ValueError: if the model has adapters already.
    """
    if next(adapted(model), None) is not None:
        raise ValueError("the model has an adapter: merge it or load the model anew")
    model.requires_grad_(False)
    if (head := scalar_head(model)) is not None:  # no base has it: it is trained whole
        head.train_weight()
    for name, (a, b) in factors.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, Layer), "callers take names from target_layers"
        dtype, device = _compute_type(model, layer)
        first = layer.lora_A = Factor(a.to(device, dtype, copy=True))
        second = layer.lora_B = Factor(b.to(device, dtype, copy=True))
        layer.train(layer.training)
        layer.low_rank = LowRank(first, second, scale=config.scale, dropout=config.dropout)
    vars(model)[_CONFIG] = config
    return list(lora_parameters(model).values())


def _compute_type(model: nn.Module, layer: Layer) -> tuple[torch.dtype, torch.device]:
    """The dtype that `layer` computes in, and where it lies."""
    if isinstance(layer, QuantLinear):
        return layer.compute_dtype, layer.weight_codes.device
    if layer.weight is not None and not layer.weight.is_meta:
        return layer.weight.dtype, layer.weight.device
    dtype, device = getattr(model, "dtype", None), getattr(model, "device", None)
    if not isinstance(dtype, torch.dtype) or not isinstance(device, torch.device):
        raise ValueError("a model of packed weights must say its dtype and device, as Decoder does")
    return dtype, device


def target_layers(model: nn.Module, targets: Sequence[str] | str) -> list[tuple[str, Layer]]:
    """The layers that `targets` name, in the order of the model.

    Layers whose weight others read (the LM head, which losses multiply with themselves, and latent
    attention's kv_b_proj) take no adapter.

    Raises:
        ValueError: for a target that names no layer, with the names that there are.
    """
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if (type(module) is Linear or isinstance(module, QuantLinear))
        and name.rpartition(".")[2] != "lm_head"
    ]
    if targets == ALL_LINEAR:
        return layers
    sparse = any(isinstance(module, Experts) for module in model.modules())
    if sparse and tuple(targets) == DEFAULT_TARGETS:
        targets = [t for t in targets if any(_ends_with(name, t) for name, _ in layers)]
    for target in targets:
        if not any(_ends_with(name, target) for name, _ in layers):
            known = list(dict.fromkeys(name.rpartition(".")[2] for name, _ in layers))
            hint = did_you_mean(target, known)
            rule = " Experts and routers take none." if sparse else ""
            raise ValueError(
                f"target_modules: {target!r} names no layer that can take an adapter"
                f"{f'; {hint}' if hint else '.'}{rule} Known: {', '.join(known)}, or 'all-linear'"
            )
    return [(name, m) for name, m in layers if any(_ends_with(name, t) for t in targets)]


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def adapted(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    """Every layer with an adapter, with its name."""
    for name, module in model.named_modules():
        if isinstance(module, Layer) and module.low_rank is not None:
            yield name, module


def lora_config(model: nn.Module) -> LoraConfig | None:
    """What the model's adapter is; None if it has none."""
    return vars(model).get(_CONFIG)


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name; empty without one."""
    found = {}
    for name, layer in adapted(model):
        assert layer.low_rank is not None, "adapted yields such layers"
        found[f"{name}.lora_A.weight"] = layer.low_rank.a.weight
        found[f"{name}.lora_B.weight"] = layer.low_rank.b.weight
    return found


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, `model` computes what its base does: the reference policy of a preference loss.

    Steps that were captured before replay what was captured: use it around `log_probs`, `loss` and
    other forwards, not around generation.
    """
    before = []
    for _, layer in adapted(model):
        assert layer.low_rank is not None, "adapted yields such layers"
        before.append((layer.low_rank, layer.low_rank.enabled))
        layer.low_rank.enabled = False
    try:
        yield
    finally:
        for low_rank, enabled in before:
            low_rank.enabled = enabled


def remove_lora(model: nn.Module) -> None:
    """Take the adapters away; the base is as it was, still frozen."""
    for _, layer in list(adapted(model)):
        del layer.lora_A, layer.lora_B
        layer.low_rank = None
    vars(model).pop(_CONFIG, None)


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add the adapters to plain weights, W + scale * B A, rounded once, and take them away.

    For export: rollouts never merge. The model's packed caches are stale afterwards: call
    `Decoder.weights_changed`.

    Raises:
        ValueError: if an adapted layer holds a packed weight alone, naming it.
    """
    layers = list(adapted(model))
    for name, layer in layers:
        if layer.weight is None or isinstance(layer, QuantLinear):
            raise ValueError(
                f"{name} holds a packed weight alone, and quantized values cannot take an adapter "
                "in: export merges into dequantized weights, or load the unquantized model"
            )
    for _, layer in layers:
        assert layer.weight is not None and layer.low_rank is not None, "checked above"
        layer.weight.copy_(layer.weight.float() + layer.low_rank.delta())
    remove_lora(model)
