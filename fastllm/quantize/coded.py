"""`CodedWeight`: a quantized matrix as plain codes and scales, between foreign files and packs.

The files of other libraries are read into it and written from it, exactly: what a format of ours
cannot hold is a ValueError that says what to do instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import packed_layout as layout
from ..ops.quant_format import BLOCK

INT4_GROUPS = (128, 64, 32)
CODED_FORMATS = (
    *(f"int4_g{group}" for group in INT4_GROUPS),
    *(f"int4_asym_g{group}" for group in INT4_GROUPS),
    "int8", "q8_0", "nf4", "fp8", "fp8_block",
)  # fmt: skip
_REQUANTIZE = "dequantize the checkpoint with the library that made it and quantize it here"


@dataclass(frozen=True, slots=True)
class CodedWeight:
    """A quantized `[n, k]` matrix.

    format: int4_g*, int4_asym_g*, int8, q8_0, nf4, fp8 or fp8_block.
    codes: `[n, k]`; uint8 0..15 for int4 and nf4, the bytes of e4m3 for fp8, else int8.
    scales: `[n, groups]`; float16 for int4 and q8_0, else float32.
    zeros: uint8 `[n, groups]` of int4_asym, else None.
    order: int64 `[k]` where columns were reordered: column j here is column `order[j]` of the
        weight. None: they were not.
    """

    format: str
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    order: Tensor | None = None

    @property
    def n(self) -> int:
        """Rows."""
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        """Columns."""
        return self.codes.shape[1]

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Scales as `packed_layout.split_scales` gives them, `[n, groups, fields]`."""
        if self.zeros is None:
            return (self.scales.unsqueeze(2),)
        return (torch.stack((self.scales, self.zeros.to(self.scales.dtype)), 2),)

    def canonical(self) -> tuple[Tensor, Tensor]:
        """(data, scales) in the layout of one row a group, of reordered columns as they lie."""
        codes = self.codes.contiguous().view(torch.uint8)
        return layout.pack_parts(codes, self.parts, self.format, 1)

    def values(self) -> Tensor:
        """The weight as float32 `[n, k]`, its columns in the weight's own order."""
        codes = self.codes.contiguous().view(torch.uint8)
        values = layout.dequantize_parts(codes, self.parts, self.format)
        if self.order is not None:
            values = torch.empty_like(values).index_copy_(1, self.order, values)
        return values


def coded(data: Tensor, scales: Tensor, format: str, n: int, k: int) -> CodedWeight:
    """The codes and scales of a packed `[n, k]` weight, whatever number of rows it interleaves.

    Raises:
        ValueError: for a format that `CodedWeight` does not hold.
    """
    if format not in CODED_FORMATS:
        raise ValueError(f"{format} has no plain codes and scales: {', '.join(CODED_FORMATS)} have")
    codes = layout.stored_codes(data, format, n)
    fields = layout.split_scales(scales, format, n, k)[0]
    zeros = fields[:, :, 1].to(torch.uint8) if format.startswith("int4_asym") else None
    if format in ("int8", "q8_0"):
        codes = codes.view(torch.int8)
    return CodedWeight(format, codes, fields[:, :, 0].contiguous(), zeros)


def _spread(groups: Tensor, group: int, k: int) -> Tensor:
    """[n, groups] -> [n, k]."""
    return groups.repeat_interleave(group, 1)[:, :k]


def int4(codes: Tensor, scales: Tensor, zeros: Tensor | None, group: int) -> CodedWeight:
    """A 4-bit weight `scales * (codes - zeros)`, its groups made ours.

    Args:
        codes: uint8 `[n, k]`, 0..15.
        scales: `[n, k / group]` of any float dtype.
        zeros: uint8 of the same shape, 0..15; None: 8 everywhere.
        group: columns under a scale: 32, 64, 128, a multiple of 128, or k.

    Raises:
        ValueError: on scales of another shape, that are not finite or not held by float16, or
            groups that are none of ours.
    """
    check_scales(scales, codes.shape, group)
    ours = _int4_group(group, codes.shape[1])
    at_zero = 8 if zeros is None else _spread(zeros, group, codes.shape[1])
    silent = (codes == at_zero).unflatten(1, (-1, group)).all(2)
    half = half_scales(scales, silent).repeat_interleave(group // ours, 1)
    if zeros is None:
        return CodedWeight(f"int4_g{ours}", codes, half)
    return CodedWeight(f"int4_asym_g{ours}", codes, half, zeros.repeat_interleave(group // ours, 1))


def int8(codes: Tensor, scales: Tensor, group: int) -> CodedWeight:
    """An 8-bit weight `scales * codes`: format int8 for whole rows, else q8_0.

    Args:
        codes: int8 `[n, k]`.
        scales: `[n, k / group]` of any float dtype.
        group: columns under a scale: k, or a multiple of 32.

    Raises:
        ValueError: as `int4`.
    """
    check_scales(scales, codes.shape, group)
    k = codes.shape[1]
    if group == k:
        if k % BLOCK:
            raise ValueError(f"rows of {k} columns are not a multiple of {BLOCK}; {_REQUANTIZE}")
        return CodedWeight("int8", codes, scales.float())
    if group % BLOCK:
        raise ValueError(
            f"groups of {group} columns cannot be held in 8 bits: multiples of {BLOCK} can; "
            f"{_REQUANTIZE}"
        )
    silent = (codes == 0).unflatten(1, (-1, group)).all(2)
    half = half_scales(scales, silent).repeat_interleave(group // BLOCK, 1)
    return CodedWeight("q8_0", codes, half)


def fp8(codes: Tensor, scales: Tensor, block: tuple[int, int] | None) -> CodedWeight:
    """An e4m3 weight `scales * codes`.

    Args:
        codes: float8_e4m3fn `[n, k]`.
        scales: block None: one for each row, `[n, 1]` or `[n]`, or a single one; else
            `[ceil(n / rows), ceil(k / 128)]`, any float dtype.
        block: rows and columns under a scale; columns must be 128.

    Raises:
        ValueError: on another dtype or shape, NaN codes or scales that are not finite.
    """
    if codes.dtype != torch.float8_e4m3fn or codes.dim() != 2:
        raise ValueError(
            f"the weight is {codes.dtype} {list(codes.shape)}; a matrix of float8_e4m3fn is "
            "supported"
        )
    n, k = codes.shape
    data = codes.contiguous().view(torch.uint8)
    if bool(((data & 127) == 127).any()):
        raise ValueError("the weight holds NaN")
    if k % BLOCK:
        raise ValueError(f"rows of {k} columns are not a multiple of {BLOCK}; {_REQUANTIZE}")
    if block is None:
        if scales.numel() not in (1, n):
            raise ValueError(f"{n} rows have scales of shape {list(scales.shape)}")
        check_finite(scales)
        return CodedWeight("fp8", data, scales.float().reshape(-1, 1).expand(n, 1).contiguous())
    rows, columns = block
    if rows < 1 or columns != 128:
        raise ValueError(
            f"blocks of {rows} x {columns} have no format: 128 columns have; {_REQUANTIZE}"
        )
    expected = -(-n // rows), -(-k // columns)
    if tuple(scales.shape) != expected:
        raise ValueError(f"has scales of shape {list(scales.shape)}, {list(expected)} expected")
    check_finite(scales)
    return CodedWeight("fp8_block", data, scales.float().repeat_interleave(rows, 0)[:n])


def check_scales(scales: Tensor, shape: torch.Size, group: int) -> None:
    """Raise ValueError unless there is one finite scale for each `group` columns of a row."""
    n, k = shape
    if group < 1 or k % group:
        raise ValueError(f"rows of {k} columns do not divide into groups of {group}")
    if tuple(scales.shape) != (n, k // group):
        raise ValueError(
            f"scales of {n} x {k} in groups of {group} have shape {[n, k // group]}, not "
            f"{list(scales.shape)}"
        )
    check_finite(scales)


def check_finite(scales: Tensor) -> None:
    """Raise ValueError on NaN or infinity."""
    if not scales.dtype.is_floating_point:
        raise ValueError(f"scales have dtype {scales.dtype}")
    if not bool(torch.isfinite(scales.float()).all()):
        raise ValueError("scales hold NaN or infinity: the checkpoint is damaged")


def half_scales(scales: Tensor, silent: Tensor) -> Tensor:
    """Scales as float16, exactly; 0 where `silent`, because every value is 0 there anyway."""
    half = scales.to(torch.float16)
    lost = (half.float() != scales.float()) & ~silent
    if bool(lost.any()):
        value = scales[lost][0].item()
        raise ValueError(
            f"{int(lost.sum())} of {scales.numel()} scales, for example {value:g} of {scales.dtype}"
            f", are no float16 numbers, which this format needs; {_REQUANTIZE}"
        )
    return torch.where(silent & (half.float() != scales.float()), 0, half)


def _int4_group(group: int, k: int) -> int:
    for ours in INT4_GROUPS:
        if group % ours == 0:
            return ours
    raise ValueError(
        f"groups of {group} columns (rows have {k}) have no 4-bit format: multiples of 32 have; "
        f"{_REQUANTIZE}"
    )


def nibbles(words: Tensor) -> Tensor:
    """int32 `[..., w]` -> uint8 `[..., 8 w]`: the lowest four bits first."""
    data = byte_codes(words)
    return torch.stack((data & 15, data >> 4), -1).flatten(-2)


def nibble_words(codes: Tensor) -> Tensor:
    """The inverse of `nibbles`; the last dimension is a multiple of 8."""
    pairs = codes.to(torch.uint8).unflatten(-1, (-1, 2))
    return byte_words(pairs[..., 0] | pairs[..., 1] << 4)


def byte_codes(words: Tensor) -> Tensor:
    """int32 `[..., w]` -> uint8 `[..., 4 w]`: the lowest byte first."""
    # flat: views of other widths mind the strides of dimensions of size 1
    return words.reshape(-1).view(torch.uint8).view(*words.shape[:-1], 4 * words.shape[-1])


def byte_words(codes: Tensor) -> Tensor:
    """The inverse of `byte_codes`; the last dimension is a multiple of 4."""
    flat = codes.to(torch.uint8).reshape(-1).view(torch.int32)
    return flat.view(*codes.shape[:-1], codes.shape[-1] // 4)
