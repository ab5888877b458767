"""The low-rank term that an adapter adds to a linear layer: scale * B(A x), LoRA's (2106.09685).

    y = round(base + scale * (round(x A^T) B^T))        base: the layer's product in fp32

One rounding of the sum, wherever the base comes from: a plain weight, a packed one, a member of a
fused product. Training, prompts and captured decode steps run this same sequence, so that
log-probabilities agree to the bit without ever merging the adapter.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastllm.ops.linear import linear
from fastllm.ops.lora_add import lora_add


class Factor(nn.Module):
    """One of the two matrices, as `weight`; parameters are named as PEFT names them."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        if weight.dtype != torch.float32:
            self.weight.grad_dtype = torch.float32  # sums over micro batches are not rounded


class LowRank:
    """A [rank, in] and B [out, rank] with a scale; no module: the layer it serves holds them.

    dropout: share of inputs of A that is dropped while gradients are recorded in training mode, by
    torch's default generator, which `torch.manual_seed` seeds and activation checkpointing repeats.
    """

    def __init__(self, a: Factor, b: Factor, *, scale: float, dropout: float) -> None:
        self.a, self.b = a, b
        self.scale = scale
        self.dropout = dropout
        self.enabled = True

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.weight.shape[0]

    def delta(self) -> Tensor:
        """What a merged weight gains: float32 [out, in]."""
        return self.scale * (self.b.weight.detach().float() @ self.a.weight.detach().float())

    def __call__(self, x: Tensor, base: Tensor, out_dtype: torch.dtype) -> Tensor:
        """base, float32 [..., out], plus the term of x [..., in]; contiguous, in `out_dtype`."""
        if self.dropout > 0 and self.a.training and torch.is_grad_enabled():
            x = F.dropout(x, self.dropout)
        return lora_add(linear(x, self.a.weight), self.b.weight, base, self.scale, out_dtype)


def without_term(base: Tensor, out_dtype: torch.dtype) -> Tensor:
    """`base` rounded, by the op that adapters use: a member of a fused product without adapter."""
    t = torch.empty((*base.shape[:-1], 0), dtype=out_dtype, device=base.device)
    b = torch.empty((base.shape[-1], 0), dtype=out_dtype, device=base.device)
    return lora_add(t, b, base, 0.0, out_dtype)
