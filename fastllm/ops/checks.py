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


def check_tensors(**arguments: object) -> None:
    """Raise TypeError naming the first of the arguments that is neither a tensor nor None."""
    for name, argument in arguments.items():
        if argument is not None and not isinstance(argument, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(argument).__name__}")


def laid_out(name: str, x: Tensor) -> Tensor:
    """`x`, copied unless its last dimension is contiguous.

    Raises:
        ValueError: naming the argument, of a sparse tensor, and inside a graph capture on the CPU:
            a replay would read what the copy held at the capture.
    """
    if x.stride(-1) == 1:
        return x
    if x.layout != torch.strided:
        raise ValueError(f"{name} must be a strided tensor, got {x.layout}")
    if not torch.compiler.is_compiling() and _C.recording():
        raise ValueError(
            f"{name} must have a contiguous last dimension inside a graph capture, got strides "
            f"{tuple(x.stride())}"
        )
    return x.clone(memory_format=torch.contiguous_format)
