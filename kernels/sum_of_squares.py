"""The sum of squares in two steps, chunks and then their sums, always in the same order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning


@triton.jit
def sum_of_squares_kernel(out_ptr, x_ptr, count, TILES: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for tile in range(TILES):
        at = (program * TILES + tile) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32)
        sums += x * x
    tl.store(out_ptr + program, tl.sum(sums, axis=0))


@triton.jit
def total_kernel(out_ptr, partial_ptr, count, BLOCK: tl.constexpr):
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        sums += tl.load(partial_ptr + at, mask=at < count, other=0.0)
    tl.store(out_ptr, tl.sum(sums, axis=0))


def sum_of_squares(x: Tensor) -> Tensor:
    """The sum of the squares of x's elements, 0-dim f32. x: f32 or bf16, contiguous."""
    count = x.numel()
    per_program = tuning.SQUARES_TILES * tuning.ELEMENTWISE_BLOCK
    programs = triton.cdiv(count, per_program)
    partial = torch.empty(programs, dtype=torch.float32, device=x.device)
    out = torch.empty((), dtype=torch.float32, device=x.device)
    if count:
        sum_of_squares_kernel[(programs,)](
            partial,
            x,
            count,
            TILES=tuning.SQUARES_TILES,
            BLOCK=tuning.ELEMENTWISE_BLOCK,
            num_warps=4,
        )
    total_kernel[(1,)](out, partial, programs, BLOCK=tuning.ELEMENTWISE_BLOCK, num_warps=4)
    return out
