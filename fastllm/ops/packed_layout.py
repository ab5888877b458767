"""How packed weights lie in memory, in plain PyTorch: one layout, R rows interleaved.

With G = ceil(n / R) groups of rows (rows beyond n are zero):

    q4_0, q4_1  data uint8 [G, K/32, 4, R, 4]: byte [g, b, i, r, j] is of row gR + r; its low
                nibble is column 32b + 4i + j, its high nibble column 32b + 16 + 4i + j
                (R = 1 is GGUF's own order)
    q8_0        data uint8 [G, K/32, 8, R, 4]: byte [g, b, i, r, j] is the int8 column 32b + 4i + j
    scales      fp16 [G, K/32, S, R]: d, or d and m for q4_1
    bf16        data bf16 [G, ceil(K/2), R, 2]: pairs of columns, zero padded; scales empty
    f32         data f32 [G, K, R]; scales empty

Values: q4_0 d * (q - 8), q4_1 d * q + m, q8_0 d * q. A CPU kernel reads R = 16 rows with one vector
load, so that each of 16 lanes owns one output; on a GPU R = 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32
QUANTIZED = ("q4_0", "q4_1", "q8_0")
DENSE = {"bf16": torch.bfloat16, "f32": torch.float32}
FORMATS = (*QUANTIZED, *DENSE)
ROWS_PER_GROUP = {"cpu": 16, "cuda": 1}
WORDS = {"q4_0": 4, "q4_1": 4, "q8_0": 8}  # groups of 4 bytes in a block
SCALES = {"q4_0": 1, "q4_1": 2, "q8_0": 1}


def check_format(format: str) -> None:
    """Raise ValueError unless `format` is a packed format."""
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is not one of {', '.join(FORMATS)}")


def data_shape(format: str, n: int, k: int, rows: int) -> tuple[int, ...]:
    """Shape of `data` for a weight of n rows and k columns, `rows` of them interleaved."""
    groups = -(-n // rows)
    if format == "bf16":
        return groups, -(-k // 2), rows, 2
    if format == "f32":
        return groups, k, rows
    return groups, k // BLOCK, WORDS[format], rows, 4


def scales_shape(format: str, n: int, k: int, rows: int) -> tuple[int, ...]:
    """Shape of `scales`; `(0,)` for the dense formats."""
    if format in DENSE:
        return (0,)
    return -(-n // rows), k // BLOCK, SCALES[format], rows


def rows_of(data: Tensor, format: str) -> int:
    """R, the number of rows that `data` interleaves."""
    return data.shape[2 if format == "f32" else -2]


def rows_of_experts(data: Tensor, format: str) -> int:
    """R of the weights `[E, ...]` of all experts of a layer, of which there may be none."""
    return data.shape[3 if format == "f32" else -2]


def columns_of(data: Tensor, format: str) -> int:
    """K as `data` tells it; for bf16 rounded up to even."""
    if format in DENSE:
        return data.shape[1] * (2 if format == "bf16" else 1)
    return data.shape[1] * BLOCK


def interleave(rows: Tensor, per_group: int) -> Tensor:
    """[n, A, ..., tail] -> [G, A, ..., R, tail], zero padded."""
    n = rows.shape[0]
    groups = -(-n // per_group)
    if groups * per_group != n:
        padding = rows.new_zeros(groups * per_group - n, *rows.shape[1:])
        rows = torch.cat([rows, padding])
    split = rows.unflatten(0, (groups, per_group))
    return split.movedim(1, -2).contiguous()


def deinterleave(data: Tensor, n: int) -> Tensor:
    """The inverse of `interleave`: [G, A, ..., R, tail] -> [n, A, ..., tail]."""
    return data.movedim(-2, 1).flatten(0, 1)[:n]


def codes(data: Tensor, format: str, n: int) -> Tensor:
    """Signed integer codes [n, K/32, 32] as float32: q - 8 for q4_0, q otherwise."""
    words = deinterleave(data, n).flatten(2)  # [n, K/32, bytes of a block], in column order
    if format == "q8_0":
        return words.view(torch.int8).float()
    both = torch.cat([words & 15, words >> 4], -1).float()
    return both - 8 if format == "q4_0" else both


def block_scales(scales: Tensor, n: int) -> tuple[Tensor, Tensor | None]:
    """(d, m) as float32 [n, K/32]; m is None where the format has none."""
    rows = scales.movedim(-1, 1).flatten(0, 1)[:n].float()
    return rows[:, :, 0], rows[:, :, 1] if rows.shape[2] == 2 else None


def dense_rows(data: Tensor, format: str, n: int, k: int) -> Tensor:
    """[n, k] in the stored dtype of a weight packed as bf16 or f32."""
    if format == "f32":
        return deinterleave(data.unsqueeze(-1), n).flatten(1)[:, :k]
    return deinterleave(data, n).flatten(1)[:, :k]


def dequantize(data: Tensor, scales: Tensor, format: str, n: int, k: int) -> Tensor:
    """float32 [n, k], every product and sum rounded once to fp32."""
    if format in DENSE:
        return dense_rows(data, format, n, k).float()
    d, m = block_scales(scales, n)
    values = codes(data, format, n) * d.unsqueeze(-1)
    if m is not None:
        values = values + m.unsqueeze(-1)
    return values.flatten(1)


def check_packed(data: Tensor, scales: Tensor, format: str, n: int, k: int | None = None) -> None:
    """Raise ValueError unless data and scales are a packed weight of `n` rows (and k columns)."""
    check_format(format)
    if n < 0:
        raise ValueError(f"n must not be negative, got {n}")
    dtype = DENSE.get(format, torch.uint8)
    dims = {"f32": 3, "bf16": 4}.get(format, 5)
    if data.dtype != dtype or data.dim() != dims:
        raise ValueError(
            f"data of format {format!r} must be {dtype} with {dims} dimensions, "
            f"got {data.dtype} of {tuple(data.shape)}"
        )
    rows = rows_of(data, format)
    columns = columns_of(data, format)
    if k is not None and format == "bf16" and k % 2:
        k += 1
    if rows < 1 or tuple(data.shape) != data_shape(format, n, columns, rows):
        raise ValueError(f"data of shape {tuple(data.shape)} is not a {format} weight of {n} rows")
    if k is not None and columns != k:
        raise ValueError(f"data holds rows of {columns} columns, x has {k}")
    if format in QUANTIZED and scales.dtype != torch.float16:
        raise ValueError(f"scales must be float16, got {scales.dtype}")
    if tuple(scales.shape) != scales_shape(format, n, columns, rows):
        raise ValueError(
            f"scales of a {format} weight of {n} x {columns} must have shape "
            f"{scales_shape(format, n, columns, rows)}, got {tuple(scales.shape)}"
        )
    if not data.is_contiguous() or not scales.is_contiguous():
        raise ValueError("data and scales must be contiguous")
    if scales.device != data.device:
        raise ValueError(f"data is on {data.device} and scales on {scales.device}")
