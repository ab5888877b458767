"""The router's CUDA C++ kernel: what it takes, and its launch, with or without sorted slots."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C

# Of csrc/cuda/moe_gate_params.h.
MAX_TOKENS, MAX_EXPERTS, MAX_SLOTS, MAX_GROUPS = 8192, 512, 32, 32
WARPS, BLOCKS = 16, 64


def fits_cuda(
    logits: Tensor, bias: Tensor | None, k: int, scoring: str, groups: int, *_: object
) -> bool:
    """Whether one launch routes these tokens: lanes, threads and blocks that wait suffice."""
    tokens, n_experts = logits.shape
    small = tokens <= MAX_TOKENS and n_experts <= MAX_EXPERTS
    dense = logits.stride(1) == 1 and (bias is None or bias.is_contiguous())
    return small and k <= MAX_SLOTS and groups <= MAX_GROUPS and dense


def cuda_scratch(tokens: int, n_experts: int) -> int:
    """Floats that the blocks of a launch tell each other (`gate_scratch`)."""
    return min(BLOCKS, max(1, -(-tokens // WARPS))) * (2 * n_experts + 1)


def launch_gate(
    out: tuple[Tensor, ...],
    dispatch: tuple[Tensor, Tensor] | None,
    first_expert: int,
    logits: Tensor,
    bias: Tensor | None,
    scoring: str,
    groups: int,
    kept_groups: int,
    group_score: str,
    renormalize: bool,
    scale: float,
) -> None:
    """Fill `out`, the outputs of `moe_gate`, and, if given, (offsets, slots) of `moe_dispatch`."""
    offsets, slots = dispatch or (None, None)
    with torch.cuda.device(logits.device):
        _C.moe_gate_cuda(
            *out,
            offsets,
            slots,
            logits.new_empty(cuda_scratch(*logits.shape)),
            logits,
            bias,
            scoring == "sigmoid",
            groups,
            kept_groups,
            group_score == "top2",
            renormalize,
            scale,
            first_expert,
            torch.cuda.current_stream().cuda_stream,
        )
