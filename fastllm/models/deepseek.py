"""The attention of one layer of a DeepSeek-V2 or V3 checkpoint, by itself.

`load_model` reads whole models; here the attention of any layer comes out as a module with plain
parameters, for training, study, or a model whose rest lies elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastllm.models.config import ModelConfig
from fastllm.models.decoder import make_attention
from fastllm.models.mla_config import half_split_index
from fastllm.nn.mla import MultiHeadLatentAttention


def mla_from_hf(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    layer: int,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    trainable: bool = False,
) -> MultiHeadLatentAttention:
    """The latent attention of `layer`, its rotated rows in half-split order.

    Args:
        config: of the model, with `mla`.
        tensors: weights under Hugging Face's names; others than this layer's are not looked at.
        layer: from 0.
        dtype: float32 or bfloat16; default that of the weights.
        device: where the parameters go.
        trainable: whether they require gradients.

    Raises:
        ValueError: if the model has another attention, or a weight has another shape than the
            configuration says.
        KeyError: naming a weight that is not there.
    """
    if config.mla is None:
        raise ValueError(f"{config.model_type} has no latent attention: config.mla is None")
    if not 0 <= layer < config.num_hidden_layers:
        raise ValueError(f"layer must be from 0 to {config.num_hidden_layers - 1}, got {layer}")
    compute = dtype or tensors[f"{_prefix(layer)}kv_b_proj.weight"].dtype
    activation = "bf16" if compute == torch.bfloat16 else "fp32"
    module = make_attention(config, layer, activation)
    assert isinstance(module, MultiHeadLatentAttention)
    for name, parameter in list(module.named_parameters()):
        full_name = _prefix(layer) + name
        if full_name not in tensors:
            raise KeyError(f"{full_name} is not among the weights")
        data = tensors[full_name]
        if data.shape != parameter.shape:
            raise ValueError(
                f"{full_name} has shape {list(data.shape)}, the configuration says "
                f"{list(parameter.shape)}"
            )
        index = half_split_index(config.mla, config.num_attention_heads, full_name)
        data = data.detach() if index is None else data.detach()[index.to(data.device)]
        owner, _, attribute = name.rpartition(".")
        kept = nn.Parameter(data.to(device, compute, copy=True), requires_grad=trainable)
        setattr(module.get_submodule(owner), attribute, kept)
    return module


def _prefix(layer: int) -> str:
    return f"model.layers.{layer}.self_attn."
