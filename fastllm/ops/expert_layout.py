"""How the stacked weights of experts lie: in rows or columns; gate and up in halves or in turns.

A weight is always seen as `[E, N, K]`. It lies in rows (`[E, N, K]` in memory, as most models have
it) or in columns (a transposed view of `[E, K, N]`, as GPT-OSS has it). Of an `interleaved` weight
the rows 2 i and 2 i + 1 are gate i and up i; else the gates come first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pages import large_empty


def in_columns(weight: Tensor) -> bool:
    """Whether a weight `[E, N, K]` lies in columns; what fits both counts as rows."""
    return weight.stride(-1) != 1 and weight.shape[-1] > 1


def native_layout(weight: Tensor, interleaved: bool = False) -> bool:
    """Whether native kernels read a weight where it lies: in columns if it is interleaved."""
    if interleaved or in_columns(weight):
        return weight.stride(-2) == 1 or weight.shape[-2] <= 1
    return True


def laid_out(weight: Tensor, interleaved: bool = False) -> Tensor:
    """The weight itself where kernels of its device take it as it is, else a copy of it."""
    if weight.device.type != "cpu":  # kernels of GPUs take rows, gates first
        return (split_pairs(weight.mT).mT if interleaved else weight).contiguous()
    if native_layout(weight, interleaved):
        return weight
    return weight.mT.contiguous().mT if interleaved else weight.contiguous()


def empty_gradient(weight: Tensor, dtype: torch.dtype, interleaved: bool = False) -> Tensor:
    """Memory for the gradient of a weight, in the order in which the weight lies."""
    e, n, k = weight.shape
    if interleaved or in_columns(weight):
        return room((e, k, n), dtype, weight).mT
    return room((e, n, k), dtype, weight)


def room(shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Memory for a large tensor on the device of `like`, which may be fake."""
    # Huge pages: the first touch of 100 MB of fp32 gradients took each of two threads 15 ms, not 1.
    if type(like) in (Tensor, torch.nn.Parameter) and like.device.type == "cpu":
        return large_empty(shape, dtype, "cpu")
    return like.new_empty(shape, dtype=dtype)


def split_pairs(pairs: Tensor) -> Tensor:
    """`[..., 2 I]` in turns (gate, up, gate, up) -> gates, then ups."""
    return torch.cat((pairs[..., ::2], pairs[..., 1::2]), -1)


def join_pairs(halves: Tensor) -> Tensor:
    """The inverse of `split_pairs`."""
    return torch.stack(halves.chunk(2, -1), -1).flatten(-2)
