"""Gradient of an embedding's table: the rows of dy added up by id, without atomics.

Tokens are sorted by id, stably, and one program adds the rows of an id, a few at once, in an order
that only they decide: the sums are fp32, rounded once, and do not depend on what ran first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .triton_compat import cast


@triton.jit
def embedding_backward_kernel(
    dweight_ptr,
    dy_ptr,
    begins_ptr,
    tokens_ptr,
    n_cols,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin, end = tl.load(begins_ptr + row), tl.load(begins_ptr + row + 1)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(begin, end, TOKENS):
        at = first + tl.arange(0, TOKENS)
        token = tl.load(tokens_ptr + at, mask=at < end, other=0).to(tl.int64)
        mask = (at < end)[:, None] & (cols < n_cols)[None, :]
        dy = tl.load(dy_ptr + token[:, None] * n_cols + cols[None, :], mask=mask, other=0.0)
        sums += tl.sum(dy.to(tl.float32), axis=0)
    y = cast(sums, dweight_ptr.dtype.element_ty)
    tl.store(dweight_ptr + row * n_cols + cols, y, mask=cols < n_cols)


def embedding_backward(dy: Tensor, ids: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """dweight[n, N] in `dtype`: row i is the sum of dy's rows whose id is i.

    dy[..., N]: f32 or bf16, contiguous; ids[...]: int32 or int64; ids outside [0, n) add nothing.
    """
    n_cols = dy.shape[-1]
    dweight = torch.empty((n, n_cols), dtype=dtype, device=dy.device)
    if dweight.numel() == 0:
        return dweight
    sorted_ids, tokens = ids.reshape(-1).sort(stable=True)
    bounds = torch.arange(n + 1, dtype=ids.dtype, device=ids.device)
    begins = torch.searchsorted(sorted_ids, bounds)  # of the run of each id, int64
    block = min(triton.next_power_of_2(n_cols), tuning.ELEMENTWISE_BLOCK)
    embedding_backward_kernel[(n, triton.cdiv(n_cols, block))](
        dweight,
        dy.contiguous(),
        begins,
        tokens,
        n_cols,
        TOKENS=tuning.EMBEDDING_TOKENS,
        BLOCK=block,
        num_warps=4,
    )
    return dweight
