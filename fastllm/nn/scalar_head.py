"""The head of a model that judges: one number for each token instead of logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastllm.ops.linear import linear


class ScalarHead(nn.Module):
    """score = x . w, summed in float32; `weight` is [1, size], as transformers has it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        weight = torch.empty(1, size, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> float32 [...], differentiable."""
        return linear(x, self.weight.to(x.dtype), None, torch.float32).squeeze(-1)

    def train_weight(self) -> None:
        """Let the weight be trained; its gradients add up in float32."""
        self.weight.requires_grad_(True)
        if self.weight.dtype == torch.bfloat16:
            self.weight.grad_dtype = torch.float32


def scalar_head(model: nn.Module) -> ScalarHead | None:
    """The head of a model that judges; None if it is a language model."""
    head = getattr(model, "score", None)
    return head if isinstance(head, ScalarHead) else None
