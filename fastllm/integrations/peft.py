"""Adapters of PEFT on packed layers, with nothing to ask for: `get_peft_model` finds them.

A `QuantLinear` is an `nn.Linear`, so every method of PEFT that wraps those works on it. LoRA gets a
layer of its own, whose sum of base and B(A x) is rounded once and recorded as one operation, as in
fastllm's own training; what that does not cover (dropout in training, DoRA and other variants,
several adapters, mixed batches) goes to PEFT's forward.

A model that was loaded with the default activation leaves "int8" when adapters go on, for all its
layers: training and use of adapters have one arithmetic. PEFT has no registry for this, so
`register` puts one function and one method of PEFT 0.21 in front of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.nn.low_rank import LowRank
from fastllm.nn.packed_matrix import PackedMatrix
from fastllm.nn.quant_linear import QuantLinear, compute_dtype_of

try:
    from peft.tuners import tuners_utils
    from peft.tuners.lora import layer as peft_layers
    from peft.tuners.lora import model as peft_model
except ModuleNotFoundError as error:
    raise ImportError("peft is needed for this: pip install 'fastllm-engine[trl]'") from error

_MERGE = (
    "adapters cannot be merged into packed weights: make the model plain first with "
    "fastllm.dequantize_model(model) (a packed embedding with transformers' model.dequantize()), "
    "then merge, then quantize the merged model again"
)


class QuantLoraLinear(peft_layers.Linear):  # type: ignore[misc]
    """LoRA on a `QuantLinear`: y = round(x W^T + b + scale * B(A x)), everything else PEFT's."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in_features] -> [..., out_features] in the dtype of x."""
        low_rank = None if args or kwargs else self._term(x)
        if low_rank is None:
            made: Tensor = super().forward(x, *args, **kwargs)
            return made
        base: Any = self.get_base_layer()
        summed: Tensor = base.with_term(x, low_rank)
        return summed

    def _term(self, x: Tensor) -> LowRank | None:
        """The one plain adapter that is active, its factors in the dtype of the product."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        name = self.active_adapters[0]
        base: Any = self.get_base_layer()
        if not isinstance(base, QuantLinear):  # `dequantize_model` has been called
            return None
        if name not in self.lora_A or name in self.lora_variant or self.lora_bias[name]:
            return None
        dropout = self.lora_dropout[name]
        if isinstance(dropout, nn.Dropout) and dropout.p and dropout.training:
            return None
        if base.low_rank is not None or (base.bias is not None and base.bias.requires_grad):
            return None
        if x.dtype not in (torch.float32, torch.bfloat16):
            return None
        dtype = compute_dtype_of(base.activation, x.dtype)
        a: Any = self.lora_A[name]
        b: Any = self.lora_B[name]
        return _CastTerm(a.weight, b.weight, self.scaling[name], dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's, of a layer that is plain by now; else raises RuntimeError naming the remedy."""
        if isinstance(self.get_base_layer(), QuantLinear):
            raise RuntimeError(_MERGE)
        super().merge(safe_merge, adapter_names)


class _CastTerm(LowRank):
    """PEFT keeps factors in float32 beside a bfloat16 model; products are in the model's dtype.

    They are cast in each call, in evaluation too: what writes through `.data` (copies that follow a
    trained model, optimizers with flat buffers) changes neither a factor's identity nor its
    version, so a cast that is kept could be an old one. Of one token at rank 16 it is 6 of 35 us at
    576 x 576 (Zen 5, one thread).
    """

    def __init__(self, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> None:
        self.a, self.b = _Cast(a, dtype), _Cast(b, dtype)  # type: ignore[assignment]
        self.scale, self.dropout, self.enabled = scale, 0.0, True


class _Cast:
    """What `LowRank` reads of a `Factor`."""

    training = False

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.weight = weight if weight.dtype == dtype else weight.to(dtype)


def use_own_dtype(model: nn.Module) -> int:
    """Take layers whose activation nobody chose from "int8" to their dtype; returns how many."""
    changed = 0
    for module in model.modules():
        if getattr(module, "activation_is_default", False) and module.activation == "int8":
            module.activation = "fp32" if module.dtype == torch.float32 else "bf16"  # type: ignore[assignment]
            changed += 1
    return changed


def _check_saved(model: nn.Module, saved: Sequence[str] | None) -> None:
    """Raise ValueError if a packed module is among those that would be trained whole."""
    for name, module in model.named_modules():
        packed = isinstance(module, PackedMatrix)
        if packed and any(name == part or name.endswith(f".{part}") for part in saved or ()):
            raise ValueError(
                f"modules_to_save names {name}, whose weight is packed ({module.format}), not to "
                "be trained: load it plain (QuantConfig's modules_to_not_convert, "
                "no embeddings), or put an adapter on it"
            )


def register() -> None:
    """Let PEFT put `QuantLoraLinear` on packed layers; idempotent."""
    if not hasattr(peft_model.dispatch_default, "fastllm_original"):
        peft_model.dispatch_default = _dispatching(peft_model.dispatch_default)
    if not hasattr(tuners_utils.BaseTuner.inject_adapter, "fastllm_original"):
        inject = _injecting(tuners_utils.BaseTuner.inject_adapter)
        setattr(tuners_utils.BaseTuner, "inject_adapter", inject)  # noqa: B010  # mypy forbids =
    if not hasattr(tuners_utils.BaseTuner._check_merge_allowed, "fastllm_original"):
        check = _refusing_merges(tuners_utils.BaseTuner._check_merge_allowed)
        setattr(tuners_utils.BaseTuner, "_check_merge_allowed", check)  # noqa: B010


def _dispatching(original: Any) -> Any:
    @functools.wraps(original)
    def dispatch_default(
        target: Any, adapter_name: str, config: Any, parameter_name: str | None = None,
        **kwargs: Any,
    ) -> nn.Module | None:  # fmt: skip
        wrapped = isinstance(target, tuners_utils.BaseTunerLayer)
        base = target.get_base_layer() if wrapped else target
        if parameter_name is None and isinstance(base, QuantLinear):
            config.fan_in_fan_out = False
            return QuantLoraLinear(target, adapter_name, config=config, **kwargs)
        made: nn.Module | None = original(
            target, adapter_name, config=config, parameter_name=parameter_name, **kwargs
        )
        return made

    dispatch_default.fastllm_original = original  # type: ignore[attr-defined]
    return dispatch_default


def _injecting(original: Any) -> Any:
    @functools.wraps(original)
    def inject_adapter(
        self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        _check_saved(model, getattr(self.peft_config[adapter_name], "modules_to_save", None))
        use_own_dtype(model)
        return original(self, model, adapter_name, *args, **kwargs)

    inject_adapter.fastllm_original = original  # type: ignore[attr-defined]
    return inject_adapter


def _refusing_merges(original: Any) -> Any:
    """PEFT merges layer by layer: it is asked before the first, so that no half is merged."""

    @functools.wraps(original)
    def _check_merge_allowed(self: Any) -> None:
        for module in self.model.modules():
            if isinstance(module, tuners_utils.BaseTunerLayer):
                if isinstance(module.get_base_layer(), PackedMatrix):
                    raise RuntimeError(_MERGE)
        original(self)

    _check_merge_allowed.fastllm_original = original  # type: ignore[attr-defined]
    return _check_merge_allowed


register()  # where this file is what imports PEFT, on_import finds it incomplete
