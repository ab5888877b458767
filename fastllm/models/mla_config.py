"""What a configuration says of multi-head latent attention, and the order of its rotated rows.

DeepSeek's checkpoints rotate neighbours (0, 1), (2, 3), ... of a head's rotated columns. Here they
lie in half-split order, (0, R/2), (1, R/2 + 1), ..., as in every other model: rows of the matrices
that make them are reordered when they are read, and back when they are written. Scores do not
change, because queries and keys are reordered alike.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

_BOUNDS = {
    "q_lora_rank": (1, 1 << 16),
    "kv_lora_rank": (1, 1 << 16),
    "qk_nope_head_dim": (1, 1024),
    "qk_rope_head_dim": (2, 512),
    "v_head_dim": (1, 1024),
}
_ROTATED = re.compile(
    r".*\.self_attn\.(?:(q_proj|q_b_proj)|kv_a_proj_with_mqa)\.(?:weight|bias)", re.DOTALL
)


@dataclass(frozen=True, kw_only=True, slots=True)
class MlaConfig:
    """Sizes of multi-head latent attention, under Hugging Face's names.

    Raises ValueError if a value is out of range.
    """

    q_lora_rank: int | None  # None: queries have no latent
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_interleave: bool = True  # the files' rows rotate neighbours

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} must be from {low} to {high}, is {value}")
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"qk_rope_head_dim {self.qk_rope_head_dim} is odd and cannot be rotated in pairs"
            )

    @property
    def qk_head_dim(self) -> int:
        """Columns of a query or key, plain and rotated."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Values of a cached position in one layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim


def half_split_index(mla: MlaConfig, heads: int, name: str) -> Tensor | None:
    """int64: row i of the weight or bias `name` in half-split order is this row of the file.

    None: the file's order is the one.
    """
    match = _ROTATED.fullmatch(name)
    if match is None or not mla.rope_interleave:
        return None
    rope = mla.qk_rope_head_dim
    pairs = torch.arange(rope).view(-1, 2).t().reshape(-1)  # 0, 2, 4, ..., 1, 3, 5, ...
    blocks, plain = (heads, mla.qk_nope_head_dim) if match[1] else (1, mla.kv_lora_rank)
    block = torch.cat((torch.arange(plain), plain + pairs))
    return (torch.arange(blocks)[:, None] * (plain + rope) + block).reshape(-1)
