"""How the packed weight formats lie in memory, for kernels of one row per group (R = 1).

q4_0, q4_1: data uint8 [N, K/32, 4, 1, 4]: 16 bytes a block, low nibbles columns 0..15, high
nibbles 16..31. q8_0: data uint8 [N, K/32, 8, 1, 4]: 32 int8. Scales fp16 [N, K/32, S, 1].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BYTES_PER_BLOCK = {"q4_0": 16, "q4_1": 16, "q8_0": 32}


@triton.jit
def block_codes(data_ptr, block, mask, FORMAT: tl.constexpr):
    """Integer codes of 32-column blocks, as columns 0..15 and 16..31: two [len(block), 16] int8.

    block: int64 indices of blocks, [B]; mask: [B]. Codes are q (q4_1, 0..15), q - 8 (q4_0) or q
    (q8_0, -128..127); masked blocks give 0, and -8 for q4_0.
    """
    cols = tl.arange(0, 16)
    if FORMAT == "q8_0":
        bytes_ptr = data_ptr + block[:, None] * 32 + cols[None, :]
        first = tl.load(bytes_ptr, mask=mask[:, None], other=0).to(tl.int8, bitcast=True)
        second = tl.load(bytes_ptr + 16, mask=mask[:, None], other=0).to(tl.int8, bitcast=True)
    else:
        pairs = tl.load(data_ptr + block[:, None] * 16 + cols[None, :], mask=mask[:, None], other=0)
        first = (pairs & 0xF).to(tl.int8)
        second = (pairs >> 4).to(tl.int8)
        if FORMAT == "q4_0":
            first -= 8
            second -= 8
    return first, second


def row_blocks(data: Tensor, format: str) -> int:
    """Blocks of 32 columns in a row. Raises ValueError for a format or layout not served here."""
    if format not in BYTES_PER_BLOCK:
        raise ValueError(f"format {format!r} is not one of {', '.join(BYTES_PER_BLOCK)}")
    if data.dim() != 5 or data.shape[3] != 1:
        raise ValueError(
            f"data of shape {tuple(data.shape)} interleaves rows; pack it for the GPU (R = 1)"
        )
    return data.shape[1]


def dense_rows(data: Tensor, format: str) -> Tensor:
    """[N, K] view of a weight packed as "bf16" (K padded to even) or "f32"."""
    if data.shape[2] != 1:
        raise ValueError(
            f"data of shape {tuple(data.shape)} interleaves rows; pack it for the GPU (R = 1)"
        )
    dtype = torch.bfloat16 if format == "bf16" else torch.float32
    return data.view(dtype).reshape(data.shape[0], -1)
