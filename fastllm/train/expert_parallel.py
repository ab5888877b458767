"""Experts of a layer shared out among processes, each of which has tokens of its own.

A process of a group of n holds E / n experts of every layer. For T tokens in each process:

    forward    gather x, ids and weights of all n T tokens; the own experts' share of every
               token's output, float32; sum the shares, each process keeps those of its tokens
    backward   the same the other way: gather dy, sum the shares of dx and of the weights' gradient

Every token goes to every process of the group, whether its experts are there or not: no counts are
exchanged, no token is sorted before it is sent, and shapes are known beforehand. A process sends
and receives, a token and layer, (n - 1) of: 2 H bytes and 4 H (sums) forward, 4 H and 4 H backward,
in bfloat16. Sending each token only to its k experts would move min(k, n - 1) / (n - 1) of it and
needs a wait for the counts: for groups up to about k processes the two cost the same.

Sums over processes are float32, in another order than one process has: equal to its results up to
rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from fastllm.nn.moe import Experts

# torch 2.13 has new names for both.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class ExpertGroup:
    """The processes of one group, and how many tokens each of them has in this micro batch."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.tokens = 0  # of the process that has most: all send so many rows

    def begin(self, tokens: int, device: torch.device) -> None:
        """Agree on the tokens of a micro batch. Every process of the group calls it."""
        most = torch.tensor(tokens, device=device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.group)
        self.tokens = int(most)

    def combine(
        self, experts: Experts, x: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> Tensor:
        """The sum over the experts of all processes for this one's tokens; differentiable.

        Args:
            experts: this process's slice.
            x: `[T, H]`.
            topk_ids: `[T, k]` int32, of all experts.
            topk_weights: `[T, k]` float32.

        Returns:
            float32 `[T, H]`.

        Raises:
            RuntimeError: if there are more tokens than `begin` was told of.
        """
        if x.shape[0] > self.tokens:
            raise RuntimeError(
                f"{x.shape[0]} tokens, but the processes agreed on {self.tokens}: call begin first"
            )
        every = [_Gather.apply(self, t, 0) for t in (x, topk_weights)]  # type: ignore[no-untyped-call]
        ids = gather_rows(self, topk_ids, -1)
        part = experts(every[0], ids, every[1], out_dtype=torch.float32)
        combined: Tensor = _Scatter.apply(self, part, x.shape[0])  # type: ignore[no-untyped-call]
        return combined


def gather_rows(group: ExpertGroup, rows: Tensor, fill: int) -> Tensor:
    """`[T, C]` of every process, filled up to as many rows each -> `[n T', C]`."""
    missing = group.tokens - rows.shape[0]
    own = rows.contiguous()
    if missing:
        own = torch.cat((own, own.new_full((missing, *own.shape[1:]), fill)))
    every = own.new_empty((group.size * group.tokens, *own.shape[1:]))
    _all_gather(every, own, group=group.group)
    return every


def sum_rows(group: ExpertGroup, rows: Tensor, count: int) -> Tensor:
    """The sum over processes of `[n T', C]`, of which this one keeps its own `count` rows."""
    own = rows.new_empty((group.tokens, *rows.shape[1:]))
    _reduce_scatter(own, rows.contiguous(), group=group.group)
    return own[:count]


class _Gather(torch.autograd.Function):
    """Rows of all processes; gradients are summed in float32 and rounded once."""

    @staticmethod
    def forward(ctx: Any, group: ExpertGroup, rows: Tensor, fill: int) -> Tensor:  # type: ignore[override]
        ctx.group, ctx.count, ctx.dtype = group, rows.shape[0], rows.dtype
        return gather_rows(group, rows, fill)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return None, sum_rows(ctx.group, grad.float(), ctx.count).to(ctx.dtype), None


class _Scatter(torch.autograd.Function):
    """Sum over processes, own rows; every process gets the gradient of all rows."""

    @staticmethod
    def forward(ctx: Any, group: ExpertGroup, rows: Tensor, count: int) -> Tensor:  # type: ignore[override]
        ctx.group = group
        return sum_rows(group, rows, count)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return None, gather_rows(ctx.group, grad, 0), None
