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
from ..ops.dequantize import dequantize
from ..ops.pages import Arena
from ..ops.quant_format import QUANT_FORMATS, format_of
from ..ops.quantize import quantize
from .code_parts import scale_parts, stored_codes
from .gguf_blocks import block_type, row_bytes
from .gguf_codes import GGUF_FORMATS, join_blocks, split_blocks

_SOURCE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NATIVE_ROWS = {1, layout.ROWS_PER_GROUP["cpu"]}  # between which the CPU core rearranges


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
    if arena is not None:
        return arena.empty(shape, dtype)
    return torch.empty(shape, dtype=dtype, device="cpu")


def _kept(packed: PackedWeight, arena: Arena | None) -> PackedWeight:
    """`packed` in memory of the arena."""
    if arena is None or packed.device.type != "cpu":
        return packed
    data, scales = (_empty(t.shape, t.dtype, arena) for t in (packed.data, packed.scales))
    data.copy_(packed.data)
    scales.copy_(packed.scales)
    return PackedWeight(data, scales, packed.format, packed.n, packed.k)


def _empty_weight(
    format: str, n: int, k: int, per_group: int, arena: Arena | None = None
) -> PackedWeight:
    """Memory for a weight on the CPU."""
    dtype = layout.DENSE.get(format, torch.uint8)
    data = _empty(layout.data_shape(format, n, k, per_group), dtype, arena)
    shape = layout.scales_shape(format, n, k, per_group)
    return PackedWeight(data, _empty(shape, layout.scales_dtype(format), arena), format, n, k)


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
        format: a GGUF format for blocks ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k",
            "q6_k"); "bf16" or "f32" for dense values (converted if needed).
        rows: uint8 `[n, bytes per row]` of GGUF blocks, or a dense `[n, k]` tensor of float32,
            bfloat16 or float16. Any row stride; read only.
        n: rows (output features).
        k: columns (input features); a multiple of 32, of 256 for K-quants; any for dense ones.
        device: where the weight goes.
        arena: on the CPU, where its memory comes from; default: memory of its own.

    Raises:
        ValueError: on an unknown format, or rows of another shape or dtype.
    """
    _check_rows(format, rows, n, k)
    per_group = rows_per_group(device)
    if rows.device.type == "cpu" and torch.device(device).type == "cpu":
        packed = _empty_weight(format, n, k, per_group, arena)
        if k > 1 and rows.stride(1) != 1:
            rows = rows.contiguous()
        _C.pack(packed.data, packed.scales, rows, layout.FORMATS.index(format), n, k)
        return packed
    return _kept(pack_ref(format, rows.to(device), n, k, per_group), arena)


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
        data, scales = layout.pack_dense(rows, format, per_group)
        return PackedWeight(data, scales, format, n, k)
    kind = block_type(format)
    codes, parts = split_blocks(format, rows.unflatten(1, (k // kind.values, kind.nbytes)))
    data, scales = layout.pack_parts(codes, parts, format, per_group)
    return PackedWeight(data, scales, format, n, k)


def pack_codes(
    format: str,
    codes: Tensor,
    scales: Tensor | tuple[Tensor, Tensor],
    zeros: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> PackedWeight:
    """A weight of the formats that no GGUF file has, from its codes and scales.

    Args:
        format: an int4, int8, nf4 or fp8 format.
        codes: `[n, k]`: uint8 0..15 of int4 and nf4 (there an index into `NF4_TABLE`), int8 of
            int8, e4m3 or its bytes as uint8 of fp8.
        scales: `[n, groups]` of a floating dtype, rounded to the format's own (fp16 of int4, fp32
            of the rest); groups is 1 for int8 and fp8, ceil(k / 128) for fp8_block. Of nf4_dq a
            pair: uint8 `[n, k / 64]` and float32 `[n]`.
        zeros: of int4_asym formats alone: integers 0..15 `[n, groups]`.
        device: where the weight goes.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    kind = format_of(format)
    if kind.dense or kind.name in GGUF_FORMATS:
        raise ValueError(f"format {kind.name!r} is packed by `pack`, from its rows")
    stored = stored_codes(kind, codes)
    n, k = stored.shape
    if k % kind.multiple:
        raise ValueError(f"codes of {kind.name} must have a multiple of {kind.multiple} columns")
    parts = scale_parts(kind, scales, zeros, n, k)
    per_group = rows_per_group(device)
    data, packed = layout.pack_parts(
        stored.to(device), [part.to(device) for part in parts], kind.name, per_group
    )
    return PackedWeight(data, packed, kind.name, n, k)


def quantize_weight(
    w: Tensor,
    format: str,
    importance: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> PackedWeight:
    """A dense weight in a format, packed for `device`, by `fastllm.ops.quantize`.

    Args:
        w: `[n, k]`, float32, bfloat16 or float16. Quantized where it lies if that is `device`.
        format: any format or alias, "bf16" and "f32" too; k must be one of its multiples.
        importance: float32 `[k]` or `[n, k]`, weights of squared errors, or None.
        device: where the packed weight goes.

    Raises:
        ValueError: as `fastllm.ops.quantize` and `pack` do.
    """
    name = format_of(format).name
    w = w.detach().to(device)
    if name in layout.DENSE:
        return pack(name, w, w.shape[0], w.shape[-1], device)
    if importance is not None:
        importance = importance.detach().to(device)
    data, scales = quantize(w, name, importance)
    return PackedWeight(data, scales, name, w.shape[0], w.shape[1])


def canonical(packed: PackedWeight) -> tuple[Tensor, Tensor]:
    """(data, scales) with rows one after another (R = 1), what `state_dict` and files hold."""
    one = _with_rows(packed, 1)
    return one.data, one.scales


def from_canonical(
    format: str,
    data: Tensor,
    scales: Tensor,
    n: int,
    k: int,
    device: torch.device | str = "cpu",
    arena: Arena | None = None,
) -> PackedWeight:
    """The inverse of `canonical`: a weight in the layout that the kernels of `device` read.

    Raises:
        ValueError: if data and scales are not an `[n, k]` weight of that format with R = 1.
    """
    if data.dim() > 2 and layout.rows_of(data, format) != 1:
        raise ValueError(f"data interleaves {layout.rows_of(data, format)} rows, canonical has 1")
    layout.check_packed(data, scales, format, n, k)
    per_group = rows_per_group(device)
    packed = PackedWeight(data.to(device), scales.to(device), format, n, k)
    return _with_rows(packed, per_group, arena)


def _with_rows(packed: PackedWeight, per_group: int, arena: Arena | None = None) -> PackedWeight:
    """The same weight, another number of rows interleaved."""
    if packed.rows_per_group == per_group:
        return _kept(packed, arena)
    if packed.device.type == "cpu" and {packed.rows_per_group, per_group} == _NATIVE_ROWS:
        out = _empty_weight(packed.format, packed.n, packed.k, per_group, arena)
        rearrange = _C.pack_rows if per_group > 1 else _C.unpack_rows
        index = layout.FORMATS.index(packed.format)
        rearrange(out.data, out.scales, packed.data, packed.scales, index, packed.n, packed.k)
        return out
    rows_last = packed.format == "f32"
    data = packed.data.unsqueeze(-1) if rows_last else packed.data
    data = layout.interleave(layout.deinterleave(data, packed.n), per_group)
    scales = packed.scales
    if not QUANT_FORMATS[packed.format].dense:
        parts = layout.split_scales(scales, packed.format, packed.n, packed.k)
        scales = layout.join_scales(parts, packed.format, per_group)
    data = data.squeeze(-1) if rows_last else data
    return _kept(PackedWeight(data, scales, packed.format, packed.n, packed.k), arena)


def gguf_rows(packed: PackedWeight) -> Tensor:
    """The blocks that a GGUF file holds, uint8 `[n, bytes per row]`: the inverse of `pack`.

    Raises:
        ValueError: if the format is none of GGUF's quantized ones.
    """
    if packed.format not in GGUF_FORMATS:
        raise ValueError(f"GGUF has no format {packed.format!r}: {', '.join(GGUF_FORMATS)}")
    if packed.device.type == "cpu" and packed.rows_per_group == layout.ROWS_PER_GROUP["cpu"]:
        width = row_bytes(packed.format, packed.k)
        rows = packed.data.new_empty((packed.n, width), dtype=torch.uint8)
        index = layout.FORMATS.index(packed.format)
        _C.unpack_blocks(rows, packed.data, packed.scales, index, packed.n, packed.k)
        return rows
    codes = layout.stored_codes(packed.data, packed.format, packed.n)
    parts = layout.split_scales(packed.scales, packed.format, packed.n, packed.k)
    return join_blocks(packed.format, codes, parts).flatten(1)


def unpack(packed: PackedWeight) -> Tensor:
    """The weight as float32 `[n, k]`."""
    return dequantize(packed.data, packed.scales, packed.format, packed.n, packed.k)


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
    if any(part.n % per_group for part in packs[:-1]):
        rows = [_with_rows(part, 1) for part in packs]
        whole = PackedWeight(
            _cat([part.data for part in rows], None), _scales(rows, None), first.format, n, first.k
        )
        return _with_rows(whole, per_group, arena)
    data = _cat([part.data for part in packs], arena)
    return PackedWeight(data, _scales(packs, arena), first.format, n, first.k)


def _scales(packs: Sequence[PackedWeight], arena: Arena | None) -> Tensor:
    if QUANT_FORMATS[packs[0].format].dense:
        return packs[0].scales
    return _cat([part.scales for part in packs], arena)


def _cat(tensors: list[Tensor], arena: Arena | None) -> Tensor:
    if arena is None or tensors[0].device.type != "cpu":
        return torch.cat(tensors)
    shape = (sum(t.shape[0] for t in tensors), *tensors[0].shape[1:])
    return torch.cat(tensors, out=arena.empty(shape, tensors[0].dtype))


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
    if format not in GGUF_FORMATS:
        raise ValueError(f"format {format!r} has no GGUF blocks: pack it from codes, `pack_codes`")
    width = row_bytes(format, k)
    if rows.dtype != torch.uint8 or tuple(rows.shape) != (n, width):
        raise ValueError(
            f"rows of {format} must be uint8 of shape [{n}, {width}], "
            f"got {rows.dtype} of {tuple(rows.shape)}"
        )
