"""How files hold the experts of a mixture.

In memory a layer's experts are two tensors, `mlp.experts.gate_up_proj` [E, 2I, H], the rows of gate
first, and `mlp.experts.down_proj` [E, H, I]. Hugging Face directories hold three matrices an
expert, `mlp.experts.7.gate_proj.weight` and so on, in Mixtral's
`block_sparse_moe.experts.7.w1.weight` (gate), `w3` (up) and `w2` (down); directories with the two
tensors are read too. GGUF files hold three tensors a layer: gate, up and down of all experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from fastllm.models.config import ModelConfig

_FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)", re.DOTALL)
_MEMBERS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_MIXTRAL_EXPERT = re.compile(r"(.*\.mlp\.experts\.[0-9]+)\.(w1|w2|w3)\.weight", re.DOTALL)
_FROM_MIXTRAL = {theirs: ours for ours, theirs in _MIXTRAL.items()}


def holds_experts(name: str) -> bool:
    """Whether a weight of `config.weight_shapes()` holds all experts of a layer."""
    return _FUSED.fullmatch(name) is not None


def members(name: str, expert: int) -> list[str]:
    """The matrices whose rows, one after another, are those of one expert in the tensor `name`."""
    match = _FUSED.fullmatch(name)
    assert match is not None, f"{name} holds no experts"
    return [f"{match[1]}.{expert}.{member}.weight" for member in _MEMBERS[match[2]]]


def stacks(name: str) -> list[str]:
    """The tensors of a GGUF file whose rows, expert by expert, are those of the tensor `name`.

    As Hugging Face would name them: `fastllm.models.weights.GGUF_LAYER_NAMES` has the others.
    """
    match = _FUSED.fullmatch(name)
    assert match is not None, f"{name} holds no experts"
    return [f"{match[1]}.{member}.weight" for member in _MEMBERS[match[2]]]


def stacked_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor that a GGUF file must hold."""
    for name, shape in config.weight_shapes().items():
        parts = stacks(name) if holds_experts(name) else []
        for part in parts:
            yield part, (shape[0], shape[1] // len(parts), shape[2])
        if not parts:
            yield name, shape


def usual_name(name: str, config: ModelConfig) -> str:
    """The name of a tensor of a file as the other families spell it."""
    if config.model_type != "mixtral":
        return name
    name = name.replace(".block_sparse_moe.", ".mlp.")
    match = _MIXTRAL_EXPERT.fullmatch(name)
    return name if match is None else f"{match[1]}.{_FROM_MIXTRAL[match[2]]}.weight"


def file_name(name: str, config: ModelConfig) -> str:
    """The name under which a weight or a member of one is saved: the inverse of `usual_name`."""
    if config.model_type != "mixtral" or ".mlp." not in name:
        return name
    stem, _, kind = name.rpartition(".")
    head, _, last = stem.rpartition(".")
    stem = f"{head}.{_MIXTRAL[last]}" if last in _MIXTRAL else stem
    return f"{stem}.{kind}".replace(".mlp.", ".block_sparse_moe.")


def stored_shapes(
    config: ModelConfig, found: Mapping[str, object]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(usual name, shape) of every tensor that a directory must hold, in the model's order.

    found: usual names of those that it holds: experts are expected as one tensor where there is
        one of that name, else as matrices.
    """
    for name, shape in config.weight_shapes().items():
        if not holds_experts(name) or name in found:
            yield name, shape
            continue
        for expert in range(shape[0]):
            parts = members(name, expert)
            for part in parts:
                yield part, (shape[1] // len(parts), shape[2])


def to_files(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Weights of a model under the names that files have; experts as views, matrix by matrix."""
    stored = {}
    for name, tensor in weights.items():
        if not holds_experts(name):
            stored[file_name(name, config)] = tensor
            continue
        for expert, rows in enumerate(tensor):
            parts = members(name, expert)
            for part, matrix in zip(parts, rows.chunk(len(parts)), strict=True):
                stored[file_name(part, config)] = matrix
    return stored
