"""`PackedWeight`: a weight in the layout that the kernels of one device read.

It is a cache made from a plain tensor or from a GGUF file's blocks: no parameter, never saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _C
from ..ops import packed_layout as layout
from ..ops.pages import Arena
from .gguf_blocks import row_bytes

_SCALE_BYTES = {"q4_0": 2, "q4_1": 4, "q8_0": 2}
_SOURCE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A packed `[n, k]` weight; the layout of data and scales is in `fastllm.ops.packed_layout`."""

    data: Tensor
    scales: Tensor
    format: str
    n: int
    k: int

    @property
    def rows_per_group(self) -> int:
        """R: rows interleaved in one group."""
        return layout.rows_of(self.data, self.format)

    @property
    def nbytes(self) -> int:
        """Bytes of data and scales, padding included."""
        return self.data.nbytes + self.scales.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales and padding included; 0 for an empty weight."""
        count = self.n * self.k
        return 8 * self.nbytes / count if count else 0.0

    @property
    def device(self) -> torch.device:
        """Where the weight lies."""
        return self.data.device


def _empty(shape: Sequence[int], dtype: torch.dtype, arena: Arena | None) -> Tensor:
    return torch.empty(shape, dtype=dtype) if arena is None else arena.empty(shape, dtype)


def rows_per_group(device: torch.device | str) -> int:
    """R of the layout that the kernels of `device` read: 16 on the CPU, 1 on a GPU."""
    kind = torch.device(device).type
    if kind not in layout.ROWS_PER_GROUP:
        raise ValueError(f"device {str(device)!r} has no packed layout; use 'cpu' or 'cuda'")
    return layout.ROWS_PER_GROUP[kind]


def pack(
    format: str,
    rows: Tensor,
    n: int,
    k: int,
    device: torch.device | str = "cpu",
    arena: Arena | None = None,
) -> PackedWeight:
    """Bring a weight into the layout of `device`.

    Args:
        format: "q4_0", "q4_1" or "q8_0" for GGUF blocks; "bf16" or "f32" for dense values
            (converted if needed).
        rows: uint8 `[n, bytes per row]` of GGUF blocks, or a dense `[n, k]` tensor of float32,
            bfloat16 or float16. Any row stride; read only.
        n: rows (output features).
        k: columns (input features); a multiple of 32 for the quantized formats.
        device: where the weight goes.
        arena: on the CPU, where its memory comes from; default: memory of its own.

    Raises:
        ValueError: on an unknown format, or rows of another shape or dtype.
    """
    _check_rows(format, rows, n, k)
    per_group = rows_per_group(device)
    if rows.device.type == "cpu" and torch.device(device).type == "cpu":
        dtype = layout.DENSE.get(format, torch.uint8)
        data = _empty(layout.data_shape(format, n, k, per_group), dtype, arena)
        scales = _empty(layout.scales_shape(format, n, k, per_group), torch.float16, arena)
        if k > 1 and rows.stride(1) != 1:
            rows = rows.contiguous()
        _C.pack(data, scales, rows, layout.FORMATS.index(format), n, k)
        return PackedWeight(data, scales, format, n, k)
    return pack_ref(format, rows.to(device), n, k, per_group)


def repack_(packed: PackedWeight, rows: Tensor) -> None:
    """Write other dense values into a packed weight, in place: captured graphs read them at once.

    Args:
        packed: of format "bf16" or "f32".
        rows: dense `[n, k]` like those it was packed from.

    Raises:
        ValueError: on rows of another shape or dtype, or a quantized `packed`.
    """
    if packed.format not in layout.DENSE:
        raise ValueError(f"only dense packs are written again, this one is {packed.format}")
    _check_rows(packed.format, rows, packed.n, packed.k)
    if rows.device.type == "cpu" and packed.device.type == "cpu":
        rows = rows if rows.stride(1) == 1 or packed.k <= 1 else rows.contiguous()
        index = layout.FORMATS.index(packed.format)
        _C.pack(packed.data, packed.scales, rows, index, packed.n, packed.k)
        return
    rows = rows.to(packed.device)
    packed.data.copy_(pack_ref(packed.format, rows, packed.n, packed.k, packed.rows_per_group).data)


def pack_ref(format: str, rows: Tensor, n: int, k: int, per_group: int) -> PackedWeight:
    """`pack` in plain PyTorch, for any number of interleaved rows, on the device of `rows`."""
    if format in layout.DENSE:
        values = rows.to(layout.DENSE[format])
        if format == "bf16":
            values = torch.nn.functional.pad(values, (0, k % 2)).unflatten(1, (-1, 2))
            data = layout.interleave(values, per_group)
        else:
            data = layout.interleave(values.unsqueeze(-1), per_group).squeeze(-1)
        scales = torch.empty(0, dtype=torch.float16, device=rows.device)
        return PackedWeight(data, scales, format, n, k)
    head = _SCALE_BYTES[format]
    blocks = rows.unflatten(1, (k // layout.BLOCK, row_bytes(format, layout.BLOCK)))
    words = blocks[:, :, head:].unflatten(2, (layout.WORDS[format], 4))
    halves = blocks[:, :, :head].contiguous().view(torch.float16)  # [n, K/32, S]
    data = layout.interleave(words, per_group)
    scales = layout.interleave(halves.unsqueeze(-1), per_group).squeeze(-1)
    return PackedWeight(data, scales, format, n, k)


def unpack(packed: PackedWeight) -> Tensor:
    """The weight as float32 `[n, k]`."""
    return layout.dequantize(packed.data, packed.scales, packed.format, packed.n, packed.k)


def concat(packs: Sequence[PackedWeight], arena: Arena | None = None) -> PackedWeight:
    """Stack weights of one format along N: one product serves them all (q, k, v or gate, up).

    The result has no gaps: if a part other than the last does not fill its groups, rows are
    interleaved anew.

    Raises:
        ValueError: if `packs` is empty or formats, columns, layouts or devices differ.
    """
    if not packs:
        raise ValueError("packs is empty")
    first = packs[0]
    for other in packs[1:]:
        same = (other.format, other.k, other.rows_per_group, other.device)
        if same != (first.format, first.k, first.rows_per_group, first.device):
            raise ValueError(
                f"packs differ: {first.format} of {first.k} columns and {other.format} of "
                f"{other.k} columns"
            )
    if len(packs) == 1:
        return first
    n, per_group = sum(part.n for part in packs), first.rows_per_group
    if all(part.n % per_group == 0 for part in packs[:-1]):
        data = _cat([part.data for part in packs], arena)
        scales = _cat([part.scales for part in packs], arena)
    else:
        data = _stack(packs, [part.data for part in packs], first.format == "f32", per_group)
        scales = first.scales
        if first.format in layout.QUANTIZED:
            scales = _stack(packs, [part.scales for part in packs], True, per_group)
    return PackedWeight(data, scales, first.format, n, first.k)


def _cat(tensors: list[Tensor], arena: Arena | None) -> Tensor:
    if arena is None or tensors[0].device.type != "cpu":
        return torch.cat(tensors)
    shape = (sum(t.shape[0] for t in tensors), *tensors[0].shape[1:])
    return torch.cat(tensors, out=arena.empty(shape, tensors[0].dtype))


def _stack(
    packs: Sequence[PackedWeight], tensors: list[Tensor], rows_last: bool, per_group: int
) -> Tensor:
    if rows_last:
        tensors = [t.unsqueeze(-1) for t in tensors]
    rows = [layout.deinterleave(t, part.n) for t, part in zip(tensors, packs, strict=True)]
    stacked = layout.interleave(torch.cat(rows), per_group)
    return stacked.squeeze(-1) if rows_last else stacked


def _check_rows(format: str, rows: Tensor, n: int, k: int) -> None:
    layout.check_format(format)
    if n < 0 or k < 0:
        raise ValueError(f"n and k must not be negative, got {n} and {k}")
    if format in layout.DENSE:
        if rows.dtype not in _SOURCE_DTYPES or tuple(rows.shape) != (n, k):
            raise ValueError(
                f"rows must be a [{n}, {k}] tensor of float32, bfloat16 or float16, "
                f"got {rows.dtype} of {tuple(rows.shape)}"
            )
        return
    width = row_bytes(format, k)
    if rows.dtype != torch.uint8 or tuple(rows.shape) != (n, width):
        raise ValueError(
            f"rows of {format} must be uint8 of shape [{n}, {width}], "
            f"got {rows.dtype} of {tuple(rows.shape)}"
        )
