"""GGUF blocks taken apart into codes and scales, and put together again: exact both ways.

    q4_0  d, 16 bytes of nibbles        q5_0  d, 4 bytes of high bits, 16 bytes
    q4_1  d, m, 16 bytes                q5_1  d, m, 4 bytes of high bits, 16 bytes
    q8_0  d, 32 int8
    q4_k  d, dmin, 12 bytes of 6-bit scales and minima, 128 bytes
    q5_k  d, dmin, 12 bytes, 32 bytes of high bits, 128 bytes
    q6_k  128 bytes of low nibbles, 64 of high pairs, 16 int8 scales, d

Byte j of the 4-bit part of a block of 32 holds column j in its low and column 16 + j in its high
nibble; a K-quant does so over 64 columns (q6_k: over 128).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.packed_layout import as_type

Parts = tuple[Tensor, ...]  # as of `fastllm.ops.packed_layout.split_scales`

_HEAD = {"q4_0": 2, "q4_1": 4, "q8_0": 2, "q5_0": 2, "q5_1": 4}  # bytes of the fp16 scales
GGUF_FORMATS = (*_HEAD, "q4_k", "q5_k", "q6_k")


def split_blocks(format: str, blocks: Tensor) -> tuple[Tensor, Parts]:
    """Blocks uint8 [n, B, bytes of one] -> stored codes uint8 [n, K] and the parts of scales.

    Raises KeyError on a format outside `GGUF_FORMATS`.
    """
    if format in ("q4_k", "q5_k"):
        return _split_super_min(blocks, format == "q5_k")
    if format == "q6_k":
        return _split_q6_k(blocks)
    head = _HEAD[format]
    scales = as_type(blocks[..., :head], torch.float16)
    body = blocks[..., head:]
    if format == "q8_0":
        return body.flatten(1), (scales,)
    codes = _low_high(body[..., -16:])
    if format in ("q5_0", "q5_1"):
        codes |= _bits(body[..., :4]) << 4
    return codes.flatten(1), (scales,)


def join_blocks(format: str, codes: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """The inverse of `split_blocks`: uint8 [n, B, bytes of one]."""
    if format in ("q4_k", "q5_k"):
        return _join_super_min(codes.unflatten(1, (-1, 256)), parts, format == "q5_k")
    if format == "q6_k":
        return _join_q6_k(codes.unflatten(1, (-1, 256)), parts)
    head = as_type(parts[0], torch.uint8)
    if format == "q8_0":
        return torch.cat([head, codes.unflatten(1, (-1, 32))], -1)
    blocks = codes.unflatten(1, (-1, 32))
    body = (blocks[..., :16] & 15) | (blocks[..., 16:] << 4)
    if format in ("q5_0", "q5_1"):
        body = torch.cat([_bytes(blocks >> 4), body], -1)
    return torch.cat([head, body], -1)


def _low_high(packed: Tensor) -> Tensor:
    """[..., B] bytes -> [..., 2 B]: the low nibbles, then the high ones."""
    return torch.cat([packed & 15, packed >> 4], -1)


def _bits(packed: Tensor) -> Tensor:
    """[..., B] bytes -> [..., 8 B] bits, lowest first."""
    return torch.stack([(packed >> i) & 1 for i in range(8)], -1).flatten(-2)


def _bytes(bits: Tensor) -> Tensor:
    """The inverse of `_bits`; only the lowest bit of every byte counts."""
    eights = bits.unflatten(-1, (-1, 8)) & 1
    out = torch.zeros_like(eights[..., 0])
    for i in range(8):
        out |= eights[..., i] << i
    return out


def _split_super_min(blocks: Tensor, five: bool) -> tuple[Tensor, Parts]:
    d = as_type(blocks[..., :2], torch.float16)
    dmin = as_type(blocks[..., 2:4], torch.float16)
    low, middle, high = (blocks[..., 4 + 4 * i : 8 + 4 * i] for i in range(3))
    scales = torch.cat([low & 63, (high & 15) | ((low >> 6) << 4)], -1)
    minima = torch.cat([middle & 63, (high >> 4) | ((middle >> 6) << 4)], -1)
    codes = _low_high(blocks[..., -128:].unflatten(-1, (4, 32)))  # [n, B, 4, 64]
    if five:
        planes = blocks[..., 16:48]  # bit i of byte j is of column 32 i + j
        bits = torch.stack([(planes >> i) & 1 for i in range(8)], -2)
        codes |= bits.flatten(-2).unflatten(-1, (4, 64)) << 4
    return codes.flatten(1), (d, dmin, torch.stack([scales, minima], -1).flatten(-2))


def _join_super_min(codes: Tensor, parts: Sequence[Tensor], five: bool) -> Tensor:
    d, dmin = (as_type(part, torch.uint8) for part in parts[:2])
    scales, minima = parts[2].unflatten(-1, (8, 2)).unbind(-1)
    packed = [
        (scales[..., :4] & 63) | ((scales[..., 4:] >> 4) << 6),
        (minima[..., :4] & 63) | ((minima[..., 4:] >> 4) << 6),
        (scales[..., 4:] & 15) | (minima[..., 4:] << 4),
    ]
    pairs = codes.unflatten(-1, (4, 2, 32))
    found = [d, dmin, *packed]
    if five:
        planes = torch.zeros_like(codes[..., :32])
        for i in range(8):
            planes |= ((codes[..., 32 * i : 32 * i + 32] >> 4) & 1) << i
        found.append(planes)
    found.append(((pairs[..., 0, :] & 15) | (pairs[..., 1, :] << 4)).flatten(-2))
    return torch.cat(found, -1)


def _split_q6_k(blocks: Tensor) -> tuple[Tensor, Parts]:
    scales = blocks[..., 192:208].view(torch.int8)
    d = as_type(blocks[..., 208:], torch.float16)
    low = _low_high(blocks[..., :128].unflatten(-1, (2, 64)))  # [n, B, 2, 128]
    pairs = blocks[..., 128:192].unflatten(-1, (2, 32))
    high = torch.cat([(pairs >> (2 * i)) & 3 for i in range(4)], -1)
    return (low | (high << 4)).flatten(1), (d, scales)


def _join_q6_k(codes: Tensor, parts: Sequence[Tensor]) -> Tensor:
    d, scales = as_type(parts[0], torch.uint8), as_type(parts[1], torch.uint8)
    halves = codes.unflatten(-1, (2, 128))
    low = (halves[..., :64] & 15) | (halves[..., 64:] << 4)
    high = torch.zeros_like(halves[..., :32])
    for i in range(4):
        high |= (halves[..., 32 * i : 32 * i + 32] >> 4) << (2 * i)
    return torch.cat([low.flatten(-2), high.flatten(-2), scales, d], -1)
