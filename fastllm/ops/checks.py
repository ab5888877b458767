"""What the argument checks of several ops share."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C

MAX_HEAD_DIM = 576  # kMaxHeadDim in csrc/ops_core.h: of the native attention kernels


def values_readable(tensor: Tensor) -> bool:
    """Whether reading `tensor` has no side effect: a real CPU tensor, eager, no graph recorded.

    Reading a CUDA tensor would synchronize, a fake one has no values, and the buffers of a graph
    under capture hold what some later replay will overwrite.
    """
    return (
        tensor.device.type == "cpu"
        and type(tensor) is Tensor
        and not torch.compiler.is_compiling()
        and not _C.recording()
    )


def check_devices(x: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError naming the first of the tensors that is on another device than `x`."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}")
