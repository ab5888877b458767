"""A decoder's weights as a checkpoint's files hold them, and back onto any number of processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastllm.models.config import ModelConfig
from fastllm.models.decoder import Decoder
from fastllm.models.expert_files import holds_experts, to_files
from fastllm.train import distributed
from fastllm.train.state import load_into


def weights_of(model: Decoder) -> dict[str, Tensor]:
    """The live tensors that training changes: parameters, and the selection biases of routers."""
    buffers = {n: t for n, t in model.named_buffers() if n.endswith(".e_score_correction_bias")}
    return dict(model.named_parameters()) | buffers


def read_weights(weights: Mapping[str, Tensor], config: ModelConfig, directory: Path) -> None:
    """Fill `weights`, some of `weights_of`, from the files in `directory`.

    Files hold matrices of single experts. Where experts are sharded every process reads them all
    and keeps its part. Raises ValueError naming a tensor that is missing or has another shape.
    """
    targets, sharded = {}, {}
    for name, tensor in weights.items():
        if not (isinstance(tensor, DTensor) and holds_experts(name)):
            targets[name] = tensor.detach()
        else:
            sharded[name] = targets[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
    load_into(to_files(targets, config), directory)
    with torch.no_grad():
        for name, whole in sharded.items():
            distributed.fill(weights[name], whole.to(weights[name].device))
