"""The quantized formats: one table of what layout, definition and kernels need to know of each.

A value is `d * code` or `d * code + m`, d and m belonging to `group` columns of a row:

    q4_0, int4_g*       d (u - 8)          d fp16, 32 columns (int4: 32, 64 or 128)
    q4_1                d u + m            fp16, 32 columns
    int4_asym_g*        d (u - z)          d fp16, z an integer 0..15; m = -(d z), exact in fp32
    q5_0, q5_1          d (u - 16), d u + m
    q8_0, int8          d s                an int8 s; d fp16 for 32 columns, fp32 for a row
    q4_k, q5_k          (d sc) u - (dmin mn)   32 columns; d, dmin fp16 for 256, sc, mn 0..63
    q6_k                (d sc) (u - 32)    16 columns; d fp16 for 256 columns, sc int8
    nf4, nf4_dq         d T[u]             64 columns; d fp32, or a row's fp32 times a byte
    fp8, fp8_block      d v                v is e4m3; d fp32 for a row or for 128 columns

T is the NormalFloat-4 table (Dettmers et al., "QLoRA", 2023) rounded to bfloat16: so are its
products in every mode exact in what they are computed in. An entry is within 2^-9 of the original.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fastllm.errors import did_you_mean

BLOCK = 32  # columns of a block of codes, and of a block of int8 activations
SUPER_BLOCK = 256  # columns of a K-quant's record of scales
WIDEST_CHUNK = 128  # columns summed before they are scaled, where a scale serves more

NF4_TABLE = (
    -1.0, -0.6953125, -0.5234375, -0.39453125, -0.28515625, -0.1845703125, -0.0908203125, 0.0,
    0.07958984375, 0.1611328125, 0.24609375, 0.337890625, 0.44140625, 0.5625, 0.72265625, 1.0,
)  # fmt: skip
NF4_INT8 = tuple(round(127 * value) for value in NF4_TABLE)  # the codes of mode "int8"


@dataclass(frozen=True, slots=True)
class QuantFormat:
    """One format.

    bits: of a code; 16 or 32 for dense values.
    group: columns of a row under one scale; 0: all of them.
    codes: "unsigned" (u - offset), "int8", "e4m3", "nf4" or "dense".
    scales: what a record of scales holds: "half" (d), "half_min" (d, m), "half_zero" (d, z),
        "float" (d), "super_min" (d, dmin, 8 x (sc, mn)), "super" (d, 16 x sc), "double" (of a
        whole row: fp32 and a byte for each group) or "none".
    multiple: K must be one of it.
    fallback: the format of rows whose K is no such multiple.
    """

    name: str
    bits: int
    group: int
    codes: str
    scales: str
    offset: int = 0
    multiple: int = BLOCK
    fallback: str = "bf16"

    @property
    def dense(self) -> bool:
        """Whether values are stored as they are."""
        return self.codes == "dense"

    @property
    def words(self) -> int:
        """Groups of four bytes in which 32 codes lie: as many as a code has bits."""
        return self.bits

    @property
    def scale_dtype(self) -> torch.dtype:
        """Dtype of the tensor of scales; bytes where a record mixes types."""
        if self.scales == "float":
            return torch.float32
        return torch.uint8 if self.scales in _MIXED else torch.float16

    @property
    def mixed(self) -> bool:
        """Whether a record of scales holds several types, and is stored as bytes."""
        return self.scales in _MIXED

    def columns_per_scale(self, k: int) -> int:
        """Columns under one scale in rows of k."""
        return self.group or max(k, 1)

    def scale_records(self, k: int) -> int:
        """Records of scales in a row of k columns."""
        if self.scales in ("super_min", "super"):
            return k // SUPER_BLOCK
        return 1 if self.scales == "double" or not self.group else -(-k // self.group)

    def scale_fields(self, k: int) -> tuple[tuple[torch.dtype, int], ...]:
        """(dtype, count) of the parts of a record of scales, in order."""
        if self.scales == "double":
            return (torch.float32, 1), (torch.uint8, -(-(k // self.group) // 4) * 4)
        return _FIELDS[self.scales]

    def record_bytes(self, k: int) -> int:
        """Bytes of a record of scales."""
        return sum(dtype.itemsize * count for dtype, count in self.scale_fields(k))

    def scale_bytes(self, k: int) -> int:
        """Bytes of a row's scales."""
        return 0 if self.dense else self.scale_records(k) * self.record_bytes(k)

    def bits_per_weight(self, k: int) -> float:
        """Stored bits for each of a row's k values, scales included."""
        return self.bits + (8 * self.scale_bytes(k) / k if k else 0.0)

    @property
    def modes(self) -> tuple[str, ...]:
        """How `quant_matmul` can multiply rows with this format."""
        if self.dense:
            return ("bf16",) if self.name == "bf16" else ("fp32",)
        return ("fp8" if self.codes == "e4m3" else "int8"), "bf16", "fp32"

    def mode(self, activation: str) -> str:
        """The mode of a layer of a model whose activation is that: e4m3 codes have no int8."""
        return "fp8" if activation == "int8" and self.codes == "e4m3" else activation

    def chunk(self, mode: str, k: int) -> int:
        """Columns summed before one fused multiply-add with the scale; the last may be fewer."""
        if mode == "int8":
            return BLOCK
        return min(self.columns_per_scale(k), WIDEST_CHUNK)


_HALF, _BYTE = torch.float16, torch.uint8
_FIELDS: Mapping[str, tuple[tuple[torch.dtype, int], ...]] = {
    "half": ((_HALF, 1),),
    "half_min": ((_HALF, 2),),
    "half_zero": ((_HALF, 2),),
    "float": ((torch.float32, 1),),
    "super_min": ((_HALF, 1), (_HALF, 1), (_BYTE, 16)),  # d, dmin, (sc, mn) of 8 sub-blocks
    "super": ((_HALF, 1), (torch.int8, 16)),
    "none": (),
}
_MIXED = ("super_min", "super", "double")


def _int4(name: str, scales: str, offset: int) -> list[QuantFormat]:
    return [
        QuantFormat(
            f"{name}_g{group}", 4, group, "unsigned", scales, offset, multiple=group,
            fallback="bf16" if group == 32 else f"{name}_g{group // 2}",
        )
        for group in (32, 64, 128)
    ]  # fmt: skip


# The order is that of the codes of csrc's enum Format.
QUANT_FORMATS: Mapping[str, QuantFormat] = {
    format.name: format
    for format in (
        QuantFormat("q4_0", 4, 32, "unsigned", "half", 8),
        QuantFormat("q4_1", 4, 32, "unsigned", "half_min"),
        QuantFormat("q8_0", 8, 32, "int8", "half"),
        QuantFormat("bf16", 16, 0, "dense", "none", multiple=1),
        QuantFormat("f32", 32, 0, "dense", "none", multiple=1),
        QuantFormat("q5_0", 5, 32, "unsigned", "half", 16),
        QuantFormat("q5_1", 5, 32, "unsigned", "half_min"),
        QuantFormat("q4_k", 4, 32, "unsigned", "super_min", multiple=256, fallback="q5_0"),
        QuantFormat("q5_k", 5, 32, "unsigned", "super_min", multiple=256, fallback="q5_1"),
        QuantFormat("q6_k", 6, 16, "unsigned", "super", 32, multiple=256, fallback="q8_0"),
        *_int4("int4", "half", 8),
        *_int4("int4_asym", "half_zero", 0),
        QuantFormat("int8", 8, 0, "int8", "float"),
        QuantFormat("nf4", 4, 64, "nf4", "float", multiple=64, fallback="int4_g32"),
        QuantFormat("nf4_dq", 4, 64, "nf4", "double", multiple=64, fallback="int4_g32"),
        QuantFormat("fp8", 8, 0, "e4m3", "float"),
        QuantFormat("fp8_block", 8, 128, "e4m3", "float"),
    )
}
ALIASES: Mapping[str, str] = {"int4": "int4_g128", "int4_asym": "int4_asym_g128"}


def format_of(name: str) -> QuantFormat:
    """The format of that name or alias (any case).

    Raises:
        ValueError: if there is none, with the nearest names.
    """
    lower = str(name).lower()
    found = QUANT_FORMATS.get(ALIASES.get(lower, lower))
    if found is not None:
        return found
    known = [*QUANT_FORMATS, *ALIASES]
    hint = did_you_mean(lower, known, 3, 0.5) or f"formats are {', '.join(known)}"
    raise ValueError(f"format {str(name)!r:.80} does not exist; {hint}")


def fit(name: str, k: int) -> str:
    """The format that rows of k columns get where `name` is wanted: itself, or what it falls to.

    K-quants need K to be a multiple of 256 and fall to q5_0, q5_1 and q8_0; int4 falls to smaller
    groups, nf4 to int4_g32; and to bf16 whatever has no whole blocks of 32.

    Raises:
        ValueError: on an unknown name.
    """
    format = format_of(name)
    while k % format.multiple:
        format = QUANT_FORMATS[format.fallback]
    return format.name
