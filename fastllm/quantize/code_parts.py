"""Codes and scales that others give, checked, as the parts that packed weights are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.quant_format import QuantFormat


def stored_codes(kind: QuantFormat, codes: Tensor) -> Tensor:
    """Checked codes as the bytes that are packed, uint8 [n, k]. Raises ValueError."""
    wanted = {"int8": (torch.int8,), "e4m3": (torch.float8_e4m3fn, torch.uint8)}
    dtypes = wanted.get(kind.codes, (torch.uint8,))
    if codes.dim() != 2 or codes.dtype not in dtypes:
        raise ValueError(
            f"codes of {kind.name} must be {' or '.join(map(str, dtypes))} [n, k], "
            f"got {codes.dtype} of {tuple(codes.shape)}"
        )
    stored = codes.contiguous().view(torch.uint8)
    if kind.bits < 8 and stored.numel() and int(stored.max()) >> kind.bits:
        raise ValueError(f"codes of {kind.name} must be below {1 << kind.bits}")
    return stored


def scale_parts(
    kind: QuantFormat, scales: Tensor | tuple[Tensor, Tensor], zeros: Tensor | None, n: int, k: int
) -> list[Tensor]:
    """The parts of records of scales, checked, each [n, records, count]."""
    if (zeros is not None) != (kind.scales == "half_zero"):
        raise ValueError(f"zeros are of int4_asym formats alone, format is {kind.name!r}")
    if kind.scales == "double":
        return _double_parts(kind, scales, n, k)
    if not isinstance(scales, Tensor):
        raise ValueError(f"scales of {kind.name} must be one tensor")
    shape = (n, kind.scale_records(k))
    _check_scales("scales", scales, shape)
    d = scales.to(kind.scale_dtype)
    if bool((d.isinf() & scales.isfinite()).any()):
        raise ValueError(f"scales hold values too large for {kind.scale_dtype}")
    if zeros is None:
        return [d.unsqueeze(-1)]
    if tuple(zeros.shape) != shape or bool(((zeros < 0) | (zeros > 15)).any()):
        raise ValueError(f"zeros must be integers 0..15 of shape {shape}, got {tuple(zeros.shape)}")
    if not torch.equal(zeros, zeros.round()):
        raise ValueError("zeros must be integers: a fractional zero point would be rounded")
    return [torch.stack([d, zeros.to(d.dtype)], -1)]


def _double_parts(
    kind: QuantFormat, scales: Tensor | tuple[Tensor, Tensor], n: int, k: int
) -> list[Tensor]:
    if isinstance(scales, Tensor) or len(scales) != 2:
        raise ValueError(f"scales of {kind.name} must be a pair: uint8 [n, groups], float32 [n]")
    groups, row = scales
    count = k // kind.group
    if tuple(groups.shape) != (n, count) or groups.dtype != torch.uint8:
        raise ValueError(
            f"scales[0] must be uint8 [{n}, {count}], got {groups.dtype} {tuple(groups.shape)}"
        )
    _check_scales("scales[1]", row, (n,))
    padded = torch.nn.functional.pad(groups, (0, -count % 4))
    return [row.float().view(n, 1, 1), padded.unsqueeze(1)]


def _check_scales(name: str, scales: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(scales.shape) != shape or not scales.is_floating_point():
        raise ValueError(
            f"{name} must be a floating tensor of shape {shape}, "
            f"got {scales.dtype} of {tuple(scales.shape)}"
        )
