"""One block of 32 columns of a product with packed weights: the arithmetic of `quant_matmul`.

Exact int32 dot of codes, or fp32 dot of x with the unscaled codes; then one FMA with the scale and,
for q4_1, one with the minimum. Every kernel with packed weights adds blocks by these functions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .quant_format import block_codes
from .triton_compat import cast, dot, fma


@triton.jit
def block_scale(scales_ptr, block, mask, which, N_SCALES: tl.constexpr):
    """Scale (`which` 0) or minimum (1) of blocks: [len(block), 1] fp32."""
    return tl.load(scales_ptr + block * N_SCALES + which, mask=mask, other=0.0).to(tl.float32)[
        :, None
    ]


@triton.jit
def activation_block(
    x_rows, scales_ptr, sums_ptr, block, mask, FORMAT: tl.constexpr, INT8: tl.constexpr
):
    """What a block of each row of x gives to products: (values, more values, scale, sum).

    x_rows [M]: where the row's 32 values begin: int8 codes (interleaved for 4-bit weights), of
    which values is [32, M]; or x itself, the halves [16, M] each. block [M]: of scales and sums.
    """
    x_sum = tl.load(sums_ptr + block, mask=mask, other=0.0)[None, :] if FORMAT == "q4_1" else 0.0
    if INT8:
        q = tl.load(x_rows[None, :] + tl.arange(0, 32)[:, None], mask=mask[None, :], other=0)
        return q, q, tl.load(scales_ptr + block, mask=mask, other=0.0)[None, :], x_sum
    else:
        half = x_rows[None, :] + tl.arange(0, 16)[:, None]
        first = tl.load(half, mask=mask[None, :], other=0.0)
        return first, tl.load(half + 16, mask=mask[None, :], other=0.0), 1.0, x_sum


@triton.jit
def add_block(acc, x, data_ptr, scales_ptr, block, mask, FORMAT: tl.constexpr, INT8: tl.constexpr):
    """acc [N, M] plus the product of blocks [N] of the weight with x, an `activation_block`."""
    N_SCALES: tl.constexpr = 2 if FORMAT == "q4_1" else 1
    values, more, x_scale, x_sum = x
    if INT8:
        if FORMAT == "q8_0":
            bytes_ptr = data_ptr + block[:, None] * 32 + tl.arange(0, 32)[None, :]
            codes = tl.load(bytes_ptr, mask=mask[:, None], other=0).to(tl.int8, bitcast=True)
        else:
            first, second = block_codes(data_ptr, block, mask, FORMAT)
            codes = tl.interleave(first, second)
        t = dot(codes, values, tl.zeros(acc.shape, dtype=tl.int32)).to(tl.float32)
    else:
        first, second = block_codes(data_ptr, block, mask, FORMAT)
        t = dot(cast(first, values.dtype), values, tl.zeros(acc.shape, dtype=tl.float32))
        t = dot(cast(second, values.dtype), more, t)
    d = block_scale(scales_ptr, block, mask, 0, N_SCALES)
    acc = fma(t, tl.broadcast_to(d * x_scale, acc.shape), acc)
    if FORMAT == "q4_1":
        m = block_scale(scales_ptr, block, mask, 1, N_SCALES)
        acc = fma(tl.broadcast_to(m, acc.shape), tl.broadcast_to(x_sum, acc.shape), acc)
    return acc
