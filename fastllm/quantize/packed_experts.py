"""`PackedExperts`: the weights of all experts of a layer in the layout that kernels read.

As `PackedWeight` a cache made from a plain tensor or from a GGUF file's blocks, never saved; every
expert fills whole groups of rows, so that one can be read, or written again, without the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import packed_layout as layout
from ..ops.pages import Arena
from .gguf_blocks import block_type
from .packed import PackedWeight, pack, rows_per_group
from .packed import repack_ as repack_weight_
from .packed import unpack as unpack_weight


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """Packed `[E, n, k]` weights: data and scales of `fastllm.ops.packed_layout`, stacked."""

    data: Tensor
    scales: Tensor
    format: str
    n: int
    k: int

    @property
    def experts(self) -> int:
        """E."""
        return self.data.shape[0]

    @property
    def parts(self) -> tuple[Tensor, Tensor, str]:
        """What `fastllm.ops.quant_moe` takes: (data, scales, format)."""
        return self.data, self.scales, self.format

    @property
    def nbytes(self) -> int:
        """Bytes of data and scales, padding included."""
        return self.data.nbytes + self.scales.nbytes

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.data.device

    def expert(self, e: int) -> PackedWeight:
        """One expert's weight; it shares this memory."""
        return PackedWeight(self.data[e], self.scales[e], self.format, self.n, self.k)


def pack_experts(
    format: str,
    rows: Tensor,
    device: torch.device | str = "cpu",
    arena: Arena | None = None,
) -> PackedExperts:
    """Bring the weights of all experts into the layout of `device`.

    Args:
        format: "q4_0", "q4_1" or "q8_0" for GGUF blocks; "bf16" or "f32" for dense values
            (converted if needed).
        rows: uint8 `[E, n, bytes per row]` of GGUF blocks, or a dense `[E, n, k]` tensor of
            float32, bfloat16 or float16; read only.
        device: where the weights go.
        arena: on the CPU, where their memory comes from; default: memory of their own.

    Raises:
        ValueError: on an unknown format, or rows of another shape or dtype.
    """
    layout.check_format(format)
    if rows.dim() != 3:
        raise ValueError(f"rows must have three dimensions, [E, n, ...], got {tuple(rows.shape)}")
    experts, n, width = rows.shape
    k = width if format in layout.DENSE else _columns(format, width)
    packed = empty_experts(format, experts, n, k, device, arena)
    for e in range(experts):
        pack_expert_(packed, e, rows[e])
    return packed


def empty_experts(
    format: str,
    experts: int,
    n: int,
    k: int,
    device: torch.device | str = "cpu",
    arena: Arena | None = None,
) -> PackedExperts:
    """Memory for so many `[n, k]` weights in the layout of `device`: `pack_expert_` fills it.

    The other arguments are those of `pack_experts`. Raises ValueError on an unknown format.
    """
    layout.check_format(format)
    per_group = rows_per_group(device)
    data_shape = (experts, *layout.data_shape(format, n, k, per_group))
    scales_shape = (experts, *layout.scales_shape(format, n, k, per_group))
    dtype = layout.DENSE.get(format, torch.uint8)
    if arena is None or torch.device(device).type != "cpu":
        data = torch.empty(data_shape, dtype=dtype, device=device)
        scales = torch.empty(scales_shape, dtype=torch.float16, device=device)
    else:
        data, scales = arena.empty(data_shape, dtype), arena.empty(scales_shape, torch.float16)
    return PackedExperts(data, scales, format, n, k)


def pack_expert_(packed: PackedExperts, expert: int, rows: Tensor) -> None:
    """Write one expert: models are loaded without a layer's plain weights in memory.

    Args:
        packed: from `empty_experts` or `pack_experts`.
        expert: from 0.
        rows: as of `fastllm.quantize.packed.pack`.

    Raises:
        ValueError: on rows of another shape or dtype.
    """
    if packed.format in layout.DENSE:
        repack_weight_(packed.expert(expert), rows)  # where it belongs, without a copy
        return
    one = pack(packed.format, rows, packed.n, packed.k, packed.device)
    packed.data[expert], packed.scales[expert] = one.data, one.scales


def _columns(format: str, row_bytes: int) -> int:
    kind = block_type(format)
    if row_bytes % kind.nbytes:
        raise ValueError(f"rows of {format} must be whole blocks of {kind.nbytes} bytes")
    return row_bytes // kind.nbytes * kind.values


def repack_(packed: PackedExperts, rows: Tensor) -> None:
    """Write other dense values `[E, n, k]` into packed experts, in place.

    Raises:
        ValueError: on rows of another shape or dtype, or quantized experts.
    """
    if rows.dim() != 3 or rows.shape[0] != packed.experts:
        raise ValueError(
            f"rows must be [{packed.experts}, {packed.n}, {packed.k}], got {tuple(rows.shape)}"
        )
    for e in range(packed.experts):
        repack_weight_(packed.expert(e), rows[e])


def unpack(packed: PackedExperts) -> Tensor:
    """The weights as float32 `[E, n, k]`."""
    shape = packed.experts, packed.n, packed.k
    out = torch.empty(shape, dtype=torch.float32, device=packed.device)
    for e in range(packed.experts):
        out[e] = unpack_weight(packed.expert(e))
    return out
