"""How packed weights lie in memory, in plain PyTorch: one layout, R rows interleaved.

With G = ceil(n / R) groups of rows (rows beyond n are zero bytes), codes of 4, 5, 6 or 8 bits are
data uint8 [G, K/32, W, R, 4], W words of 4 bytes for 32 columns, W being the bits of a code. Byte
[g, b, i, r, j] is of row gR + r:

    bytes   column 32b + 4i + j
    i < 4   the low 4 bits of column 32b + 4i + j, and in its high nibble those of column
            32b + 16 + 4i + j (with R = 1 GGUF's own order)
    5 bits  word 4: bit w is bit 4 of column 32b + 4w + j
    6 bits  words 4 and 5: bits 2w and 2w + 1 of word 4 are bits 4 and 5 of column 32b + 4w + j,
            those of word 5 of column 32b + 16 + 4w + j

    bf16    data bf16 [G, ceil(K/2), R, 2]: pairs of columns, zero padded; scales empty
    f32     data f32 [G, K, R]; scales empty

A record of scales (see `quant_format`) serves g columns; its parts lie one after another, each for
all R rows: fp16 [G, K/g, S, R], fp32 [G, ceil(K/g), 1, R], or bytes where a record mixes types:

    q4_k, q5_k  uint8 [G, K/256, 20 R]: R fp16 d, R fp16 dmin, and 8 times R bytes sc, R bytes mn
    q6_k        uint8 [G, K/256, 18 R]: R fp16 d, 16 times R int8 sc
    nf4_dq      uint8 [G, (4 + roundup(K/64, 4)) R]: R fp32, and for every 64 columns R bytes

A CPU kernel reads R = 16 rows with one vector load, so that each of 16 lanes owns one output; on a
GPU R = 1, which is also what files and `state_dict` hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .quant_format import BLOCK, NF4_TABLE, QUANT_FORMATS, format_of

FORMATS = tuple(QUANT_FORMATS)
QUANTIZED = tuple(name for name, format in QUANT_FORMATS.items() if not format.dense)
DENSE = {"bf16": torch.bfloat16, "f32": torch.float32}
ROWS_PER_GROUP = {"cpu": 16, "cuda": 1}

__all__ = ["BLOCK", "DENSE", "FORMATS", "QUANTIZED", "ROWS_PER_GROUP"]


def check_format(format: str) -> None:
    """Raise ValueError unless `format` is a packed format, by its own name and not an alias."""
    if format not in QUANT_FORMATS:
        found = format_of(format).name
        raise ValueError(f"format {format!r} is written {found!r} here")


def data_shape(format: str, n: int, k: int, rows: int) -> tuple[int, ...]:
    """Shape of `data` for a weight of n rows and k columns, `rows` of them interleaved."""
    groups = -(-n // rows)
    if format == "bf16":
        return groups, -(-k // 2), rows, 2
    if format == "f32":
        return groups, k, rows
    return groups, k // BLOCK, QUANT_FORMATS[format].words, rows, 4


def scales_shape(format: str, n: int, k: int, rows: int) -> tuple[int, ...]:
    """Shape of `scales`; `(0,)` for the dense formats."""
    kind, groups = QUANT_FORMATS[format], -(-n // rows)
    if kind.dense:
        return (0,)
    if kind.scales == "double":
        return groups, kind.scale_bytes(k) * rows
    records = kind.scale_records(k)
    if kind.mixed:
        return groups, records, kind.record_bytes(k) * rows
    return groups, records, kind.scale_fields(k)[0][1], rows


def scales_dtype(format: str) -> torch.dtype:
    """Dtype of `scales`: of its numbers, or uint8 where records mix types."""
    return QUANT_FORMATS[format].scale_dtype


def code_bytes(format: str, k: int) -> int:
    """Bytes that the codes of a row of k columns take in a quantized format.

    Those of its scales are `QuantFormat.scale_bytes`.
    """
    return math.prod(data_shape(format, 1, k, 1))


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


def as_type(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of t read as another type along its last dimension; a copy."""
    # Contiguous tensors may have any stride where a size is 1, and `view` minds it.
    return t.clone(memory_format=torch.contiguous_format).view(dtype)


def code_words(codes: Tensor, format: str) -> Tensor:
    """Stored codes uint8 [n, K] -> the words of every block of 32, uint8 [n, K/32, W, 4]."""
    bits, n, k = QUANT_FORMATS[format].bits, *codes.shape
    blocks = codes.reshape(n, k // BLOCK, 8, 4)  # column 4w + j at [w, j]
    if bits == 8:
        return blocks
    low = blocks & 15
    words = [low[:, :, :4] | (low[:, :, 4:] << 4)]
    high = blocks >> 4
    if bits == 5:
        words.append(_joined(high, 1))
    elif bits == 6:
        words += [_joined(high[:, :, :4], 2), _joined(high[:, :, 4:], 2)]
    return torch.cat(words, 2)


def _joined(parts: Tensor, bits: int) -> Tensor:
    """[n, b, P, 4] parts of so many bits -> [n, b, 1, 4] bytes, the first part lowest."""
    byte = torch.zeros_like(parts[:, :, 0])
    for i in range(parts.shape[2]):
        byte |= (parts[:, :, i] & ((1 << bits) - 1)) << (bits * i)
    return byte.unsqueeze(2)


def stored_codes(data: Tensor, format: str, n: int) -> Tensor:
    """The codes as they are stored, uint8 [n, K]: the inverse of `code_words` and `interleave`."""
    bits = QUANT_FORMATS[format].bits
    words = deinterleave(data, n)  # [n, K/32, W, 4]
    if bits == 8:
        return words.flatten(1)
    low = torch.cat([words[:, :, :4] & 15, words[:, :, :4] >> 4], 2)
    if bits == 5:
        low |= torch.stack([(words[:, :, 4] >> w) & 1 for w in range(8)], 2) << 4
    elif bits == 6:
        pairs = [(words[:, :, 4 + w // 4] >> (2 * (w % 4))) & 3 for w in range(8)]
        low |= torch.stack(pairs, 2) << 4
    return low.flatten(1)


def code_values(stored: Tensor, format: str) -> Tensor:
    """What a scale multiplies, float32 in the shape of `stored`: u - offset, s, v or T[u]."""
    kind = QUANT_FORMATS[format]
    if kind.codes == "unsigned":
        return stored.float() - kind.offset
    if kind.codes == "int8":
        return stored.view(torch.int8).float()
    if kind.codes == "e4m3":
        return stored.view(torch.float8_e4m3fn).float()
    return torch.tensor(NF4_TABLE, dtype=torch.float32, device=stored.device)[stored.int()]


def codes(data: Tensor, format: str, n: int) -> Tensor:
    """`code_values` of a packed weight, float32 [n, K/32, 32]."""
    return code_values(stored_codes(data, format, n), format).unflatten(1, (-1, BLOCK))


def split_scales(scales: Tensor, format: str, n: int, k: int) -> tuple[Tensor, ...]:
    """The parts of every record of scales, each [n, records, count] in its own dtype."""
    kind = QUANT_FORMATS[format]
    fields, records = kind.scale_fields(k), kind.scale_records(k)
    if not kind.mixed:
        return (scales.movedim(-1, 1).flatten(0, 1)[:n],)
    rows = scales.shape[-1] // max(kind.record_bytes(k), 1)
    flat = scales.reshape(scales.shape[0], records, kind.record_bytes(k) * rows)
    found, start = [], 0
    for dtype, count in fields:
        size = dtype.itemsize * count * rows
        part = as_type(flat[:, :, start : start + size], dtype)
        part = part.reshape(scales.shape[0], records, count, rows)
        found.append(part.movedim(-1, 1).flatten(0, 1)[:n])
        start += size
    return tuple(found)


def join_scales(parts: Sequence[Tensor], format: str, per_group: int) -> Tensor:
    """The inverse of `split_scales`, `per_group` rows interleaved."""
    kind = QUANT_FORMATS[format]
    lanes = [interleave(part.unsqueeze(-1), per_group).squeeze(-1) for part in parts]
    if not kind.mixed:
        return lanes[0]
    flat = torch.cat([as_type(lane.flatten(2), torch.uint8) for lane in lanes], 2)
    return flat.flatten(1) if kind.scales == "double" else flat


def block_scales(scales: Tensor, format: str, n: int, k: int) -> tuple[Tensor, Tensor | None]:
    """`scales_of_parts` of a packed weight."""
    return scales_of_parts(split_scales(scales, format, n, k), format, k)


def scales_of_parts(parts: Sequence[Tensor], format: str, k: int) -> tuple[Tensor, Tensor | None]:
    """(d, m) as float32 [n, groups of columns]; m is None where the format has none.

    Products are rounded once to fp32; those of K-quants and the minimum of a zero point are exact.
    """
    kind = QUANT_FORMATS[format]
    parts = [part.float() for part in parts]
    if kind.scales == "double":
        groups = -(-k // kind.group)
        return (parts[0] * parts[1])[:, 0, :groups], None
    if kind.scales == "super":
        return (parts[0] * parts[1]).flatten(1), None
    if kind.scales == "super_min":
        pairs = parts[2].unflatten(2, (8, 2))
        d, m = parts[0] * pairs[..., 0], -(parts[1] * pairs[..., 1])
        return d.flatten(1), m.flatten(1)
    d = parts[0][:, :, 0]
    if kind.scales == "half_min":
        return d, parts[0][:, :, 1]
    return d, -(d * parts[0][:, :, 1]) if kind.scales == "half_zero" else None


def spread(of_groups: Tensor, format: str, k: int) -> Tensor:
    """[n, groups] -> [n, k]: every column's scale or minimum."""
    group = QUANT_FORMATS[format].columns_per_scale(k)
    n, groups = of_groups.shape
    return of_groups.unsqueeze(2).expand(n, groups, group).reshape(n, groups * group)[:, :k]


def dense_rows(data: Tensor, format: str, n: int, k: int) -> Tensor:
    """[n, k] in the stored dtype of a weight packed as bf16 or f32."""
    if format == "f32":
        return deinterleave(data.unsqueeze(-1), n).flatten(1)[:, :k]
    return deinterleave(data, n).flatten(1)[:, :k]


def dequantize(data: Tensor, scales: Tensor, format: str, n: int, k: int) -> Tensor:
    """float32 [n, k], every product and sum rounded once to fp32."""
    if format in DENSE:
        return dense_rows(data, format, n, k).float()
    parts = split_scales(scales, format, n, k)
    return dequantize_parts(stored_codes(data, format, n), parts, format)


def dequantize_parts(stored: Tensor, parts: Sequence[Tensor], format: str) -> Tensor:
    """`dequantize` of stored codes uint8 [n, k] and the parts of `split_scales`."""
    k = stored.shape[1]
    d, m = scales_of_parts(parts, format, k)
    values = code_values(stored, format) * spread(d, format, k)
    return values if m is None else values + spread(m, format, k)


def pack_dense(values: Tensor, format: str, per_group: int) -> tuple[Tensor, Tensor]:
    """(data, scales) of dense values [n, k], converted to the format's dtype."""
    values = values.to(DENSE[format])
    if format == "bf16":
        values = torch.nn.functional.pad(values, (0, values.shape[1] % 2)).unflatten(1, (-1, 2))
        data = interleave(values, per_group)
    else:
        data = interleave(values.unsqueeze(-1), per_group).squeeze(-1)
    return data, torch.empty(0, dtype=torch.float16, device=values.device)


def pack_parts(
    codes: Tensor, parts: Sequence[Tensor], format: str, per_group: int
) -> tuple[Tensor, Tensor]:
    """(data, scales) of stored codes uint8 [n, K] and the parts of `split_scales`."""
    data = interleave(code_words(codes, format), per_group)
    return data, join_scales(parts, format, per_group)


def check_packed(
    data: Tensor, scales: Tensor, format: str, n: int, k: int | None = None, of: str = "x has"
) -> None:
    """Raise ValueError unless data and scales are a packed weight of `n` rows (and k columns).

    `of` says in the message where k comes from.
    """
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
        raise ValueError(f"data holds rows of {columns} columns, {of} {k}")
    multiple = QUANT_FORMATS[format].multiple
    if columns % multiple:
        raise ValueError(
            f"data holds rows of {columns} columns, {format} takes multiples of {multiple}"
        )
    wanted = scales_dtype(format)
    if format in QUANTIZED and scales.dtype != wanted:
        raise ValueError(f"scales of {format} must be {wanted}, got {scales.dtype}")
    if tuple(scales.shape) != scales_shape(format, n, columns, rows):
        raise ValueError(
            f"scales of a {format} weight of {n} x {columns} must have shape "
            f"{scales_shape(format, n, columns, rows)}, got {tuple(scales.shape)}"
        )
    if not data.is_contiguous() or not scales.is_contiguous():
        raise ValueError("data and scales must be contiguous")
    if scales.device != data.device:
        raise ValueError(f"data is on {data.device} and scales on {scales.device}")
