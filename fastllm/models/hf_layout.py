"""A model's weights as Hugging Face's files hold them: names, dense values, order of the rows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastllm.models.config import ModelConfig
from fastllm.models.decoder import Decoder
from fastllm.models.mla_config import half_split_index
from fastllm.nn.moe import Experts
from fastllm.ops import packed_layout as layout
from fastllm.quantize.packed import PackedWeight, unpack
from fastllm.quantize.packed_experts import PackedExperts
from fastllm.quantize.packed_experts import unpack as unpack_experts


def hf_tensors(model: Decoder) -> dict[str, Tensor]:
    """Every weight, in Hugging Face layout and under its name, in the order of the model.

    Experts are one tensor: `fastllm.models.expert_files.to_files` gives the names of files.
    """
    found = {name: tensor.detach() for name, tensor in model.weights().items()}
    for name, group in model.parallel_linears():
        names = [f"{name}.{member}.weight" for member in group.names]
        if group.packed is not None and names[0] not in found:  # a cache may be stale
            parts = _dense(group.packed, names).split(group.sizes)
            found.update(zip(names, parts, strict=True))
    for name, module in model.named_modules():
        packed = getattr(module, "packed", None)
        if isinstance(packed, PackedWeight) and f"{name}.weight" not in found:
            found[f"{name}.weight"] = _dense(packed, [name])
        if isinstance(module, Experts):
            for part in ("gate_up_proj", "down_proj"):
                experts = module.packed(part)
                if experts is not None and f"{name}.{part}" not in found:
                    found[f"{name}.{part}"] = _dense_experts(experts, f"{name}.{part}")
    config = model.config
    return {name: in_file_order(found[name], name, config) for name in config.weight_shapes()}


def in_file_order(tensor: Tensor, name: str, config: ModelConfig) -> Tensor:
    """Undo what `WeightSource.get` does to the order of rows."""
    index = _row_order(name, config)
    return tensor if index is None else tensor[index.argsort().to(tensor.device)]


def in_model_order(tensor: Tensor, name: str, config: ModelConfig) -> Tensor:
    """A weight of a Hugging Face directory with its rows as `WeightSource.get` gives them."""
    index = _row_order(name, config)
    return tensor if index is None else tensor[index.to(tensor.device)]


def _row_order(name: str, config: ModelConfig) -> Tensor | None:
    if config.mla is None:
        return None
    return half_split_index(config.mla, config.num_attention_heads, name)


def _dense(packed: PackedWeight, names: Sequence[str]) -> Tensor:
    if packed.format in layout.QUANTIZED:
        raise _is_quantized(names[0], packed.format)
    return unpack(packed).to(packed.data.dtype)


def _dense_experts(packed: PackedExperts, name: str) -> Tensor:
    if packed.format in layout.QUANTIZED:
        raise _is_quantized(name, packed.format)
    return unpack_experts(packed).to(packed.data.dtype)


def _is_quantized(name: str, format: str) -> ValueError:
    return ValueError(
        f"{name} is quantized ({format}), which a Hugging Face directory cannot hold; load the "
        "unquantized model to save it"
    )
