"""`PackedExperts`: the weights of all experts of a layer in the layout that kernels read.

As `PackedWeight` a cache made from a plain tensor or from a GGUF file's blocks, never saved; every
expert fills whole groups of rows, so that one can be read, or written again, without the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import packed_layout as layout
from ..ops.pages import Arena
from ..ops.quant_format import QUANT_FORMATS
from .gguf_blocks import block_type
from .packed import PackedWeight, pack, rows_per_group
from .packed import canonical as canonical_weight
from .packed import from_canonical as from_canonical_weight
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
        format: a GGUF format for blocks, "bf16" or "f32" for dense values (converted if needed).
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
    dtype, of_scales = layout.DENSE.get(format, torch.uint8), layout.scales_dtype(format)
    if arena is None or torch.device(device).type != "cpu":
        data = torch.empty(data_shape, dtype=dtype, device=device)
        scales = torch.empty(scales_shape, dtype=of_scales, device=device)
    else:
        data, scales = arena.empty(data_shape, dtype), arena.empty(scales_shape, of_scales)
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
    set_expert_(packed, expert, pack(packed.format, rows, packed.n, packed.k, packed.device))


def set_expert_(packed: PackedExperts, expert: int, one: PackedWeight) -> None:
    """Write one expert from a weight that is packed already, of any format.

    Raises:
        ValueError: if it is of another format or size, or interleaves other numbers of rows.
    """
    shapes = one.data.shape, one.scales.shape
    if one.format != packed.format or (one.n, one.k) != (packed.n, packed.k):
        raise ValueError(
            f"one is a {one.format} weight of {one.n} x {one.k}, experts are {packed.format} of "
            f"{packed.n} x {packed.k}"
        )
    if shapes != (packed.data.shape[1:], packed.scales.shape[1:]):
        raise ValueError(f"one interleaves {one.rows_per_group} rows, experts other numbers")
    packed.data[expert] = one.data
    if not QUANT_FORMATS[packed.format].dense:
        packed.scales[expert] = one.scales


def stack(packs: Sequence[PackedWeight], arena: Arena | None = None) -> PackedExperts:
    """The experts of a layer from weights that are packed already, of any one format.

    Raises:
        ValueError: if `packs` is empty or its weights differ in format, size or layout.
    """
    if not packs:
        raise ValueError("packs is empty")
    first = packs[0]
    packed = empty_experts(first.format, len(packs), first.n, first.k, first.device, arena)
    for e, one in enumerate(packs):
        set_expert_(packed, e, one)
    return packed


def canonical(packed: PackedExperts) -> tuple[Tensor, Tensor]:
    """(data, scales) of all experts with rows one after another (R = 1), as files hold them."""
    pairs = [canonical_weight(packed.expert(e)) for e in range(packed.experts)]
    if not pairs:
        shape = layout.data_shape(packed.format, packed.n, packed.k, 1)
        other = layout.scales_shape(packed.format, packed.n, packed.k, 1)
        return packed.data.new_empty(0, *shape), packed.scales.new_empty(0, *other)
    return torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])


def from_canonical(
    format: str,
    data: Tensor,
    scales: Tensor,
    n: int,
    k: int,
    device: torch.device | str = "cpu",
    arena: Arena | None = None,
) -> PackedExperts:
    """The inverse of `canonical`. Raises ValueError if an expert is no such weight."""
    packed = empty_experts(format, data.shape[0], n, k, device, arena)
    for e in range(data.shape[0]):
        set_expert_(packed, e, from_canonical_weight(format, data[e], scales[e], n, k, device))
    return packed


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
