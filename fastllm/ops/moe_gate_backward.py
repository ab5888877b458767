"""Gradient of the router's logits through the weights of the chosen experts and the statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from .registry import Op

# Keeps the sum of the chosen scores, or of a row of sigmoids, away from 0 before it divides.
SUM_EPS = 1e-20


def moe_gate_backward_ref(
    logits: Tensor,
    topk_ids: Tensor,
    d_weights: Tensor,
    d_score_sum: Tensor,
    d_z_sum: Tensor,
    scoring: str,
    renormalize: bool,
    scale: float,
) -> Tensor:
    """Plain PyTorch definition of `moe_gate_backward`: the scores are computed again, in fp32."""
    valid = topk_ids[:, :1] >= 0  # a row without a distribution chose nothing
    rows = torch.where(valid, logits, 0.0)
    softmax = torch.softmax(rows, -1)
    scores = softmax if scoring == "softmax" else torch.sigmoid(rows)
    ids, chosen = topk_ids.long().clamp(min=0), topk_ids >= 0
    g = torch.where(chosen, d_weights, 0.0) * scale
    if renormalize:
        picked = torch.where(chosen, scores.gather(1, ids), 0.0)
        total = picked.sum(-1, keepdim=True) + SUM_EPS
        g = torch.where(chosen, g - (g * picked).sum(-1, keepdim=True) / total, 0.0) / total
    by_choice = torch.zeros_like(scores).scatter_add(1, ids, g)
    if scoring == "softmax":
        d = d_score_sum + by_choice
        dlogits = scores * (d - (scores * d).sum(-1, keepdim=True))
    else:
        total = scores.sum(-1, keepdim=True) + SUM_EPS
        mean = (d_score_sum * scores).sum(-1, keepdim=True) / total
        d = by_choice + (d_score_sum - mean) / total
        dlogits = d * (scores * (1 - scores))
    lse = torch.logsumexp(rows, -1, keepdim=True)
    return torch.where(valid, dlogits + softmax * (2 * d_z_sum * lse), 0.0)


def _fake(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


# Neither the selection's bias nor its groups are arguments: which experts were chosen is not
# differentiated. An id of -1 is a slot without an expert; a row whose first id is -1 gets zeros.
moe_gate_backward = Op(
    "moe_gate_backward(Tensor logits, Tensor topk_ids, Tensor d_weights, Tensor d_score_sum, "
    "Tensor d_z_sum, str scoring, bool renormalize, float scale) -> Tensor",
    moe_gate_backward_ref,
    fake=_fake,
)


def _contiguous(
    logits: Tensor, topk_ids: Tensor, d_weights: Tensor, d_score_sum: Tensor, *_: Any
) -> bool:
    dense = topk_ids.is_contiguous() and d_weights.is_contiguous() and d_score_sum.is_contiguous()
    return logits.stride(1) == 1 and dense


@moe_gate_backward.impl("native", "cpu", dtypes=(torch.float32,), when=_contiguous)
def _moe_gate_backward_cpu(
    logits: Tensor,
    topk_ids: Tensor,
    d_weights: Tensor,
    d_score_sum: Tensor,
    d_z_sum: Tensor,
    scoring: str,
    renormalize: bool,
    scale: float,
) -> Tensor:
    dlogits = logits.new_empty(logits.shape, dtype=torch.float32)
    gradients = d_weights, d_score_sum, d_z_sum
    _C.moe_gate_backward(
        dlogits, logits, topk_ids, *gradients, scoring == "sigmoid", renormalize, scale
    )
    return dlogits


@moe_gate_backward.impl("triton", "cuda", dtypes=(torch.float32,))
def _moe_gate_backward_triton(*args: Any) -> Tensor:
    from ..kernels import moe_gate_backward as kernel

    return kernel.moe_gate_backward(*args)
