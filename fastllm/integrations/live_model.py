"""A transformers model's live weights under our decoder: what rollouts and evaluation run on.

The decoder holds the model's own parameters, not copies: an optimizer step is seen by the next
generation. Adapters of PEFT's LoRA stay adapters, beside the base, and are never merged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.errors import ModelFileError
from fastllm.models.config import MODEL_TYPES, ModelConfig
from fastllm.models.decoder import Decoder
from fastllm.models.mla_config import half_split_index
from fastllm.nn.embedding import Embedding
from fastllm.nn.linear import Linear
from fastllm.nn.low_rank import Factor, LowRank
from fastllm.nn.moe import Experts
from fastllm.nn.packed_matrix import PackedMatrix
from fastllm.nn.quant_linear import QuantLinear

try:
    from fastllm.integrations.transformers.quant_linear import QuantExperts
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ImportError(
        "live models and rollouts need transformers: pip install 'fastllm-engine[trl]'"
    ) from error

_COMPUTE = (torch.float32, torch.bfloat16)
Packed = PackedMatrix | QuantExperts


class LiveModel:
    """`decoder` on the parameters of `model`, a transformers causal language model or a PEFT model
    with one LoRA adapter around one.

    Parameters are shared: float32 or bfloat16, whole, on one device. Layers that we have quantized
    (`QuantConfig`, `load_gguf`, `quantize_model`) stay packed, with their activation. LoRA factors
    of another dtype than the base are copied by `refresh`.

    Args:
        model: as it is trained; DDP and torch.compile are unwrapped by the caller.
        max_positions: longest prompt and answer; default the model's.

    Raises:
        ValueError: naming the family, layer or option that our decoder does not represent.
    """

    def __init__(self, model: nn.Module, max_positions: int | None = None) -> None:
        self.model = model
        base = base_model(model)
        # Heads are looked up like any weight: PEFT unties those that it trains whole.
        config = replace(decoder_config(base), tie_word_embeddings=False)
        most = config.max_position_embeddings
        self._copied: list[tuple[nn.Parameter, nn.Parameter]] = []  # (ours, theirs)
        found = list(_weights(base, config))
        dtype, device = _one_kind(found)
        self.decoder = Decoder(
            config,
            dtype=dtype,
            activation="bf16" if dtype == torch.bfloat16 else "fp32",
            max_positions=min(max_positions or most, most),
            device=device,
        )
        for name, weight in found:
            self._set(name, weight)
        for name, layer in _adapted(base):
            self._adapt(name, layer)
        self._signature = self._state()
        self.refresh()

    def refresh(self) -> None:
        """Say that weights may have changed; packed caches are made again before the next use."""
        with torch.no_grad():
            for ours, theirs in self._copied:
                ours.copy_(theirs)
        self.decoder.weights_changed()

    @property
    def current(self) -> bool:
        """Whether the model still holds the tensors that this was built on, and uses them so."""
        return self._signature == self._state()

    def _state(self) -> list[tuple[Any, ...]]:
        """What must not change under the decoder: tensors, which adapters are on, activations."""
        parameters = self.model.named_parameters(remove_duplicate=False)
        state: list[tuple[Any, ...]] = [(name, p.data_ptr(), p.dtype) for name, p in parameters]
        for name, module in self.model.named_modules():
            layer: Any = module
            if isinstance(layer, QuantLinear | QuantExperts):
                state.append((name, layer.activation))
            elif _is_wrapper(layer):
                merged = tuple(getattr(layer, "merged_adapters", ()))
                scaling = tuple(getattr(layer, "scaling", {}).items())
                on = tuple(layer.active_adapters)
                state.append((name, on, layer.disable_adapters, merged, scaling))
        return state

    def _set(self, name: str, weight: Tensor | Packed) -> None:
        owner, _, attribute = name.rpartition(".")
        module = self.decoder.get_submodule(owner)
        if isinstance(weight, QuantExperts) and isinstance(module, Experts):
            if weight.gating != "silu":
                raise ValueError(f"{owner} has the gating {weight.gating!r}: the engine has silu")
            setattr(module, attribute, None)
            setattr(module, f"packed_{attribute.removesuffix('_proj')}", weight.packed(attribute))
            module.activation = weight.activation
        elif isinstance(weight, PackedMatrix) and isinstance(module, Linear | Embedding):
            module.weight, module.packed = None, weight.packed_weight()
            if isinstance(module, Linear) and isinstance(weight, QuantLinear):
                module.activation = weight.activation
        elif isinstance(weight, Tensor):
            setattr(module, attribute, weight)
        else:
            raise ValueError(f"{owner} is quantized, and the engine wants its weight plain")
        if name == "lm_head.weight":  # losses and log-probabilities ask the model, not the layer
            self.decoder.activation = self.decoder.lm_head.activation

    def _adapt(self, name: str, layer: Any) -> None:
        ours = self.decoder.get_submodule(name)
        if not isinstance(ours, Linear) or name == "lm_head":
            raise ValueError(f"{name} has an adapter, which the engine has no place for")
        adapter = _plain_adapter(name, layer)
        if adapter is None:
            return
        factors = []
        for side in (layer.lora_A, layer.lora_B):
            theirs = side[adapter].weight
            factor = Factor(theirs.detach().to(self.decoder.dtype))  # itself where dtypes agree
            if factor.weight.data_ptr() != theirs.data_ptr():
                self._copied.append((factor.weight, theirs))
            factors.append(factor)
        ours.lora_A, ours.lora_B = factors
        ours.low_rank = LowRank(*factors, scale=float(layer.scaling[adapter]), dropout=0.0)


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, or the model itself.

    Raises ValueError for adapters that are not LoRA.
    """
    configs = getattr(model, "peft_config", None)
    if not configs or not hasattr(model, "get_base_model"):
        return model
    for name, config in configs.items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind != "LORA":
            raise ValueError(f"adapter {name!r} is {kind}: the engine serves LoRA alone")
    base: nn.Module = model.get_base_model()  # type: ignore[operator]
    return base


def decoder_config(base: nn.Module) -> ModelConfig:
    """What our decoder would be for a transformers model.

    Raises ValueError, naming the family, if it has none.
    """
    config = getattr(base, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise ValueError(f"{type(base).__name__} is no transformers model: it has no config")
    kind, name = config.model_type, type(base).__name__
    if kind not in MODEL_TYPES or not name.endswith("ForCausalLM"):
        raise ValueError(
            f"{name} (model_type {kind!r}) is a family that the engine cannot represent; it "
            f"generates for causal models of {', '.join(MODEL_TYPES)}. Leave rollouts of this one "
            "to the trainer's own generation, on a model patched with fastllm.patch"
        )
    end = getattr(getattr(base, "generation_config", None), "eos_token_id", None)
    ends = None if end is None else {"eos_token_id": end}
    values = {k: v for k, v in config.to_dict().items() if k != "architectures"}
    try:
        return ModelConfig.from_hf(values, f"config of {name}", ends)
    except ModelFileError as error:
        raise ValueError(f"{name} is not what the engine represents: {error}") from error


def _weights(base: nn.Module, config: ModelConfig) -> Iterator[tuple[str, Tensor | Packed]]:
    """Every weight of the decoder by name: the model's own tensor, or its packed module."""
    for name, shape in config.weight_shapes().items():
        if (
            config.mla is not None
            and half_split_index(config.mla, config.num_attention_heads, name) is not None
        ):
            raise ValueError(
                f"{config.model_type} with rope_interleave=true has the rows of {name} in another "
                "order than the engine, which cannot share them: its live weights are not served"
            )
        owner, _, attribute = name.rpartition(".")
        layer = _unwrapped(_descend(base, owner))
        if isinstance(layer, Packed) and attribute != "bias":
            yield name, layer
            continue
        weight = layer._parameters.get(attribute, layer._buffers.get(attribute))
        if weight is None:
            found = "computes" if hasattr(layer, attribute) else "has no"
            raise ValueError(
                f"{type(layer).__name__} {found} {name}, and the engine wants a tensor to share: "
                "trained tokens and parametrized layers are not served"
            )
        if type(weight) not in (Tensor, nn.Parameter) or tuple(weight.shape) != shape:
            raise ValueError(
                f"{name} is {type(weight).__name__} {list(weight.shape)} and not a plain tensor of "
                f"{list(shape)}: sharded models (FSDP, ZeRO-3) and layers quantized by others are "
                "not served"
            )
        yield name, weight


def _one_kind(found: list[tuple[str, Tensor | Packed]]) -> tuple[torch.dtype, torch.device]:
    """The dtype of the matrices and the device of all."""
    dense = [t for _, t in found if isinstance(t, Tensor)]
    dtypes = {t.dtype for _, t in found if isinstance(t, Packed) or t.ndim > 1}
    devices = {t.device for t in dense}
    dtype = next(iter(dtypes))
    if len(dtypes) > 1 or dtype not in _COMPUTE:
        names = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(f"the matrices are {names}: the engine wants all float32 or all bfloat16")
    if len(devices) > 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"the weights lie on {names}: the engine wants one CPU or one GPU")
    for name, t in found:
        if isinstance(t, Tensor) and t.dtype not in _COMPUTE:
            raise ValueError(f"{name} is {t.dtype}: the engine wants float32 or bfloat16")
    return dtype, next(iter(devices))


def _descend(base: nn.Module, path: str) -> nn.Module:
    """The module of a name that knows nothing of wrappers."""
    module = base
    for part in path.split("."):
        child = getattr(_unwrapped(module), part, None)
        if child is None:
            raise ValueError(f"the model has no {path}, which its configuration asks for")
        module = child
    return module


def _unwrapped(module: nn.Module) -> nn.Module:
    """What PEFT has wrapped: the base of an adapted layer, or the copy of one that is trained."""
    if not _is_wrapper(module):
        return module
    copies = getattr(module, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):
        active = [name for name in module.active_adapters if name in copies]  # type: ignore
        enabled = not module.disable_adapters
        return copies[active[0]] if active and enabled else module.original_module  # type: ignore
    base: nn.Module = module.get_base_layer()  # type: ignore[operator]
    return base


def _is_wrapper(module: nn.Module) -> bool:
    """Whether PEFT has put this module around another: adapters on it, or copies of it."""
    copies = getattr(module, "modules_to_save", None)
    return isinstance(copies, nn.ModuleDict) or (
        hasattr(module, "base_layer") and hasattr(module, "get_base_layer")
    )


def _adapted(base: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers with an adapter, by the names that they have without PEFT."""
    for name, module in base.named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            yield name.replace(".base_layer", ""), module


def _plain_adapter(name: str, layer: Any) -> str | None:
    """The one active adapter of a layer; None: there is none.

    Raises ValueError for what is more than W x + scale * B(A x).
    """
    if layer.merged_adapters:
        raise ValueError(f"{name} has a merged adapter: call unmerge_adapter, nothing is merged")
    active = [a for a in layer.active_adapters if a in layer.lora_A]
    if layer.disable_adapters or not active:
        return None
    if len(active) > 1:
        raise ValueError(f"{name} has {len(active)} active adapters: the engine serves one")
    adapter: str = active[0]
    if adapter in layer.lora_variant or layer.lora_bias.get(adapter):
        raise ValueError(f"the adapter of {name} is a variant of LoRA (DoRA, a bias): plain ones")
    return adapter
