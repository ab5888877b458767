"""The gradient of router logits: scores are made again from the row, which registers hold.

With d = dL/dscore, softmax: p (d - sum p d); sigmoid: d s (1 - s); lse^2 adds 2 dz lse softmax.
Memory-bound: 8 bytes a logit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .moe_gate import SUM_EPS, row_statistics, scores_of
from .triton_compat import divide


@triton.jit
def moe_gate_backward_kernel(
    dlogits_ptr,
    logits_ptr,
    ids_ptr,
    d_weights_ptr,
    d_score_sum_ptr,
    d_z_sum_ptr,
    stride_l,
    T,
    E,
    K,
    scale,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    experts = tl.arange(0, BLOCK_E)[None, :]
    mask = (rows < T)[:, None] & (experts < E)
    row_ptr = logits_ptr + (rows * stride_l)[:, None]
    x = tl.load(row_ptr + experts, mask=mask, other=float("-inf"))
    chose = tl.load(ids_ptr + rows * K, mask=rows < T, other=-1) >= 0
    shift, total, _ = row_statistics(x)
    total = tl.where(chose, total, 1.0)
    scores = scores_of(x, shift, total, SIGMOID)
    d = tl.load(d_score_sum_ptr + experts, mask=experts < E, other=0.0)
    d = tl.broadcast_to(d, (ROWS, BLOCK_E))
    if SIGMOID:
        norm = tl.sum(scores, axis=1)[:, None] + SUM_EPS
        norm = tl.broadcast_to(norm, (ROWS, BLOCK_E))
        mean = divide(tl.broadcast_to(tl.sum(scores * d, axis=1)[:, None], (ROWS, BLOCK_E)), norm)
        d = divide(d - mean, norm)
    divisor = tl.zeros((ROWS,), dtype=tl.float32) + 1.0
    shared = tl.zeros((ROWS,), dtype=tl.float32)
    if RENORMALIZE:
        slot = tl.arange(0, BLOCK_K)[None, :]
        slots = rows[:, None] * K + slot
        inside = (rows < T)[:, None] & (slot < K)
        ids = tl.load(ids_ptr + slots, mask=inside, other=-1)
        live = inside & (ids >= 0) & (ids < E)
        picked = tl.load(row_ptr + ids, mask=live, other=float("-inf"))
        picked = tl.where(live, scores_of(picked, shift, total, SIGMOID), 0.0)
        given = tl.load(d_weights_ptr + slots, mask=live, other=0.0) * scale
        divisor = tl.sum(picked, axis=1) + SUM_EPS
        shared = divide(tl.sum(picked * given, axis=1), divisor)
    for j in range(K):
        expert = tl.load(ids_ptr + rows * K + j, mask=rows < T, other=-1)
        g = tl.load(d_weights_ptr + rows * K + j, mask=rows < T, other=0.0) * scale
        g = divide(g - shared, divisor)
        d += tl.where(experts == expert[:, None], g[:, None], 0.0)
    dz = 2.0 * tl.load(d_z_sum_ptr) * (shift + tl.log(total))
    if SIGMOID:
        softmax = scores_of(x, shift, total, False)
        dlogits = d * (scores * (1.0 - scores)) + softmax * dz[:, None]
    else:
        dlogits = scores * (d - (tl.sum(scores * d, axis=1) - dz)[:, None])
    dlogits = tl.where(chose[:, None], dlogits, 0.0)
    tl.store(dlogits_ptr + rows[:, None] * E + experts, dlogits, mask=mask)


def moe_gate_backward(
    logits: Tensor,
    topk_ids: Tensor,
    d_weights: Tensor,
    d_score_sum: Tensor,
    d_z_sum: Tensor,
    scoring: str,
    renormalize: bool,
    scale: float,
) -> Tensor:
    """f32[T, E]: the gradient of logits f32[T, E] (last dim contiguous) of `moe_gate`.

    topk_ids i32[T, k], of which -1 is a slot without an expert; d_weights f32[T, k]; d_score_sum
    f32[E]; d_z_sum f32[].
    """
    n_tokens, n_experts = logits.shape
    k = topk_ids.shape[1]
    dlogits = torch.empty((n_tokens, n_experts), dtype=torch.float32, device=logits.device)
    if n_tokens == 0:
        return dlogits
    block_e = triton.next_power_of_2(n_experts)
    rows = tuning.gate_rows(block_e)
    moe_gate_backward_kernel[(triton.cdiv(n_tokens, rows),)](
        dlogits,
        logits,
        topk_ids.contiguous(),
        d_weights.contiguous(),
        d_score_sum.contiguous(),
        d_z_sum,
        logits.stride(0),
        n_tokens,
        n_experts,
        k,
        scale,
        SIGMOID=scoring == "sigmoid",
        RENORMALIZE=renormalize,
        ROWS=rows,
        BLOCK_E=block_e,
        BLOCK_K=triton.next_power_of_2(k),
        num_warps=4,
    )
    return dlogits
