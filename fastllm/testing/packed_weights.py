"""Random packed weights of every format, and their values in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import packed_layout as layout
from ..ops.quant_format import NF4_INT8, QUANT_FORMATS

FIRST_FORMATS = ("q4_0", "q4_1", "q8_0", "bf16", "f32")  # every run sees all their cases
# What d is multiplied by: fp16 scales reach 6e4 and down to 6e-8, fp32 ones further.
SIZES = {"normal": 1.0, "huge": 2e4, "tiny": 1e-5, "zero": 0.0}


def whole(format: str, k: int) -> int:
    """The fewest columns that are at least k and that the format can hold."""
    multiple = QUANT_FORMATS[format].multiple
    return -(-k // multiple) * multiple


def random_packed(
    g: torch.Generator, format: str, n: int, k: int, rows: int, size: str | float = "normal"
) -> tuple[Tensor, Tensor]:
    """(data, scales) of random codes and scales, padding rows zero.

    size: of `SIZES`, or what scales are multiplied by; with "zero" every third record is 0.
    """
    if format in layout.DENSE:
        return layout.pack_dense(torch.randn(n, k, generator=g), format, rows)
    kind = QUANT_FORMATS[format]
    words = torch.randint(0, 256, (n, k // layout.BLOCK, kind.words, 4), generator=g)
    words = words.to(torch.uint8)
    if kind.codes == "e4m3":
        words = torch.where(words & 127 == 127, words - 1, words)  # no NaN
    parts = random_scales(g, format, n, k)
    if size != "normal":
        parts = _resized(parts, format, SIZES[size] if isinstance(size, str) else size)
    return layout.interleave(words, rows), layout.join_scales(parts, format, rows)


def random_scales(g: torch.Generator, format: str, n: int, k: int) -> list[Tensor]:
    """Parts of records of scales whose d is of either sign and about 0.05 in size."""
    kind = QUANT_FORMATS[format]
    records = kind.scale_records(k)
    parts = []
    for dtype, count in kind.scale_fields(k):
        if dtype == torch.int8:
            part = torch.randint(-128, 128, (n, records, count), generator=g)
        elif dtype == torch.uint8:
            top = 64 if kind.scales == "super_min" else 256
            part = torch.randint(0, top, (n, records, count), generator=g)
        else:
            size = 0.05 / {"super_min": 32, "super": 64, "double": 128}.get(kind.scales, 1)
            part = torch.randn(n, records, count, generator=g) * size
        parts.append(part.to(dtype))
    if kind.scales == "half_zero":
        parts[0][:, :, 1] = torch.randint(0, 16, (n, records), generator=g).half()
    if kind.scales == "double":
        parts[1][:, :, k // kind.group :] = 0  # padding
    return parts


def _resized(parts: list[Tensor], format: str, factor: float) -> list[Tensor]:
    """Scales times `factor`; with 0 every third record is 0 and the others stay."""
    found = []
    for i, part in enumerate(parts):
        new = part.clone()
        if part.is_floating_point():
            last = 1 if QUANT_FORMATS[format].scales == "half_zero" else part.shape[2]
            values = part[:, :, :last].float() * (factor or 1.0)
            new[:, :, :last] = values.to(part.dtype)
            if not factor:
                new[:, i::3, :last] = 0
        found.append(new)
    return found


def weight64(data: Tensor, scales: Tensor, format: str, n: int, k: int, mode: str = "") -> Tensor:
    """The packed weight's values in float64 [n, k]; of nf4 in mode "int8" those of that mode."""
    if format in layout.DENSE:
        return layout.dense_rows(data, format, n, k).double()
    d, m = layout.block_scales(scales, format, n, k)
    if mode == "int8" and QUANT_FORMATS[format].codes == "nf4":
        codes = torch.tensor(NF4_INT8).double()[layout.stored_codes(data, format, n).int()]
        return codes * layout.spread(d * torch.tensor(1 / 127), format, k).double()
    values = layout.codes(data, format, n).flatten(1).double() * layout.spread(d, format, k)
    return values if m is None else values + layout.spread(m, format, k)
