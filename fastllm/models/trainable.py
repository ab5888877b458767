"""Models to train: plain parameters under Hugging Face names, fresh or from files.

A parameter is a bfloat16 or float32 tensor in Hugging Face layout; bfloat16 ones gather their
gradient in float32. A tied LM head is the embedding's parameter itself. Quantized files give a
frozen packed base, which is trained through adapters.
"""

from __future__ import annotations

import hashlib
import math
import os

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastllm.models.config import ModelConfig
from fastllm.models.decoder import Decoder
from fastllm.models.expert_files import holds_experts
from fastllm.models.loader import DTYPES, check_device, choose_compute, is_quantized, load_model
from fastllm.models.names import resolve
from fastllm.models.weights import WeightSource, open_weights
from fastllm.quantize.rule import QuantRule

_RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight", "experts.down_proj")


def initialize(
    config: ModelConfig,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    device: torch.device | str = "cpu",
    max_positions: int | None = None,
) -> Decoder:
    """A model of random weights, every parameter of which can be trained.

    Matrices are normal with deviation sqrt(2 / (5 hidden)) (Nguyen and Salazar, 2019; arXiv
    1910.05895); those that write to the residual stream are divided by sqrt(2 layers), so that its
    variance at the end does not grow with depth (Radford et al., 2019). Norms are 1, biases 0.
    Every tensor has a generator of its own, seeded by `seed` and its name, and so has every expert:
    the values depend neither on the device nor on the number of processes nor on other tensors.

    Args:
        config: sizes and kind.
        dtype: torch.bfloat16 or torch.float32, of parameters and blocks.
        seed: any integer.
        device: "cpu" or "cuda".
        max_positions: the longest document; default that of the configuration.

    Raises:
        ValueError: on a dtype or device that does not exist.
    """
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype must be torch.bfloat16 or torch.float32, got {dtype!r:.80}")
    model = _empty(config, dtype, check_device(device), max_positions)
    for name, shape in config.weight_shapes().items():
        if holds_experts(name):
            data = torch.empty(shape, dtype=dtype)
            for expert, rows in enumerate(data):
                rows.copy_(_initial(config, name, shape[1:], seed, expert))
            _set(model, name, data)
        else:
            _set(model, name, _initial(config, name, shape, seed).to(dtype))
    return _ready(model)


def load_trainable(
    path: str | os.PathLike[str] | WeightSource,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    max_positions: int | None = None,
    quantization: str | QuantRule | None = None,
) -> Decoder:
    """A model from files, to be trained: see `load_model` for what `path` may be.

    Dense weights become parameters that require gradients. A quantized file, and all matrices of a
    model that is quantized as it is loaded, stay packed and frozen, with inputs in the compute
    dtype ("bf16" or "fp32" activation, never int8: generation then has training's bits); add
    adapters to train it.

    Args:
        path: a GGUF file, a Hugging Face directory, a name, or opened weights.
        dtype: bfloat16 or float32; default bfloat16 for quantized files, else what the file says
            (float16 becomes bfloat16).
        device: "cpu" (default) or "cuda".
        max_positions: the longest document; default that of the configuration.
        quantization: a format for the layers' matrices, see `load_model`.

    Raises:
        ModelNotFoundError, ModelFileError: naming file, tensor and remedy.
        ValueError: on a dtype, device or format that does not exist.
    """
    source = open_weights(resolve(path)) if isinstance(path, str | os.PathLike) else path
    where = check_device(device)
    compute, _ = choose_compute(source, dtype, where, None, quantization is not None)
    if quantization is not None or is_quantized(source):
        activation = "bf16" if compute == torch.bfloat16 else "fp32"
        model = load_model(source, compute, where, activation, max_positions, quantization)
        return model.train()
    model = _empty(source.config, compute, where, max_positions)
    for name, shape in source.config.weight_shapes().items():
        if holds_experts(name):
            _set(model, name, _read_experts(source, name, shape, compute))
            continue
        data = source.get(name).data
        # Norms and biases stay as precise as the file has them, as in `load_model`.
        precise = len(shape) == 1 and data.dtype != torch.bfloat16
        _set(model, name, data.to(torch.float32 if precise else compute, copy=True))
        source.release(name)
    source.release()
    return _ready(model)


def accumulate_in_fp32(model: nn.Module) -> None:
    """Let bfloat16 parameters that are trained collect their gradients in float32.

    Sets `p.grad_dtype` (torch 2.10 and newer): a backward may return a float32 gradient, and
    anything else is converted, before it is added to `p.grad`. Micro batches then add up without
    rounding to bfloat16 in between. Call it before the first backward, and again after parameters
    have been replaced. Gradients of FSDP2's sharded parameters are made by FSDP2 itself: they are
    left as they are (`MixedPrecisionPolicy(reduce_dtype=torch.float32)` adds those in float32).
    """
    for p in model.parameters():
        if p.requires_grad and p.dtype == torch.bfloat16 and not isinstance(p, DTensor):
            p.grad_dtype = torch.float32


def _empty(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, max_positions: int | None
) -> Decoder:
    return Decoder(
        config,
        dtype=dtype,
        activation="bf16" if dtype == torch.bfloat16 else "fp32",
        max_positions=max_positions or config.max_position_embeddings,
        device=device,
    )


def _read_experts(
    source: WeightSource, name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """The experts of a layer, read and converted one by one."""
    data = torch.empty(shape, dtype=dtype)
    for expert, rows in enumerate(data):
        rows.copy_(source.get_expert(name, expert).data)
    source.release(name)
    return data


def _set(model: Decoder, name: str, data: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    if attribute in module._buffers:  # a router's bias, which stays float32
        setattr(module, attribute, data.to(model.device, torch.float32))
    else:
        setattr(module, attribute, nn.Parameter(data.to(model.device)))


def _ready(model: Decoder) -> Decoder:
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    accumulate_in_fp32(model)
    return model.train()


def _initial(
    config: ModelConfig, name: str, shape: tuple[int, ...], seed: int, expert: int | None = None
) -> Tensor:
    """Float32 values of one weight, or of one expert's part of it."""
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    deviation = math.sqrt(0.4 / config.hidden_size)
    if name.endswith(_RESIDUAL_OUTPUTS):
        deviation /= math.sqrt(2 * config.num_hidden_layers)
    key = f"{seed}/{name}" if expert is None else f"{seed}/{name}.{expert}"
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(shape, generator=generator).mul_(deviation)
