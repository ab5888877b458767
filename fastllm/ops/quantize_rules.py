"""What a weight's codes and scales are in every quantized format: plain PyTorch.

Formats of one rule take it from their definition: GGUF's 32-column formats without importances (the
bytes that files have), int8, fp8 and nf4. The others search (see `quantize_search`).

The fp32 scales of int8, fp8 and nf4_dq are rounded to 16 significant bits: a code times its scale
is then exact in fp32, and values that are quantized again give the same bytes. That moves the
largest code by 1/1000 of a step at most.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from . import quantize_search as search
from .quant_format import NF4_TABLE, QUANT_FORMATS
from .quantize_search import inverse

Coded = tuple[Tensor, list[Tensor]]  # codes uint8 [n, k], the parts of `packed_layout.split_scales`
INT8_PEAK, FP8_PEAK = 127.0, 448.0
# What a column counts in groups without importance, where the largest of a weight is 1: enough that
# no sum underflows, too little to move the scales that a super-block shares with others.
UNSEEN = 2.0**-40
TILE = 128  # rows and columns of an fp8_block tile
# A comparison with the middle of two entries: exact, as the sum of two bfloat16 is.
NF4_MIDDLES = tuple((a + b) / 2 for a, b in pairwise(NF4_TABLE))


def encode(x: Tensor, format: str, importance: Tensor | None) -> Coded:
    """Codes and scales of x float32 [n, k]; `importance` [k] or [n, k], or None."""
    kind = QUANT_FORMATS[format]
    if kind.scales == "float" or kind.scales == "double":
        return _FLOAT_RULES[format](x)
    if importance is None and format in _GGUF_RULES:
        return _GGUF_RULES[format](x)
    columns = _columns_first(x, kind.group)
    weights = _weights(x, importance, kind.group)
    if kind.scales == "super_min":
        return _super_min(columns, weights, (1 << kind.bits) - 1)
    if kind.scales == "super":
        return _super(columns, weights)
    if kind.scales == "half_min":
        return _affine(columns, weights, (1 << kind.bits) - 1)
    if kind.scales == "half_zero":
        return _zero_point(columns, weights)
    return _signed(columns, weights, kind.offset)


def _columns_first(x: Tensor, group: int) -> Tensor:
    """[n, k] -> [group, n, k / group]."""
    return x.unflatten(1, (x.shape[1] // group, group)).movedim(2, 0).contiguous()


def _rows(codes: Tensor) -> Tensor:
    """The inverse of `_columns_first`, as uint8."""
    return codes.movedim(0, 2).flatten(1).to(torch.uint8)


def _weights(x: Tensor, importance: Tensor | None, group: int) -> Tensor:
    """Importances as `_columns_first` of x; groups of (almost) none count every column alike."""
    if importance is None:
        return torch.ones_like(_columns_first(x, group))
    w = _columns_first(importance.expand_as(x), group)
    return torch.where(search.column_sum(w) > UNSEEN, w, UNSEEN)


def _halves(*parts: Tensor) -> list[Tensor]:
    return [torch.stack(parts, -1).to(torch.float16)]


def _signed(x: Tensor, w: Tensor, offset: int) -> Coded:
    # Format q8_0 has no offset: its codes are bytes with a sign.
    low, high = (-offset, offset - 1) if offset else (-127, 127)
    d = search.half(search.fit_signed(x, w, low, high, search.SIGNED_STARTS[offset or 127])[0])
    codes = torch.round(x * inverse(d)).clamp(low, high)
    stored = codes + offset if offset else torch.where(codes < 0, codes + 256, codes)
    return _rows(stored), _halves(d)


def _zero_point(x: Tensor, w: Tensor) -> Coded:
    d, z = search.fit_zero(x, w, 15)
    d = search.half(d)
    return _rows((torch.round(x * inverse(d)) + z).clamp(0, 15)), _halves(d, z)


def _affine(x: Tensor, w: Tensor, levels: int) -> Coded:
    d, m = (search.half(part) for part in search.fit_affine(x, w, levels, free=True)[:2])
    return _rows(torch.round((x - m) * inverse(d)).clamp(0, levels)), _halves(d, m)


def _subs(x: Tensor, count: int) -> Tensor:
    """[columns, n, sub-blocks of a row] -> [columns, sub-blocks of a super-block, n, K/256]."""
    return x.unflatten(2, (x.shape[2] // count, count)).movedim(3, 1).contiguous()


def _super_min(x: Tensor, w: Tensor, levels: int) -> Coded:
    x, w = _subs(x, 8), _subs(w, 8)
    d, dmin, sc, mn = search.fit_super_min(x, w, levels)
    u = torch.round((x + dmin * mn) * inverse(d * sc)).clamp(0, levels)
    pairs = torch.stack([sc, mn], -1).movedim(0, 2).flatten(2).to(torch.uint8)
    parts = [*_halves(d), *_halves(dmin), pairs]
    return _rows(u.movedim(1, 3).flatten(2)), parts


def _super(x: Tensor, w: Tensor) -> Coded:
    x, w = _subs(x, 16), _subs(w, 16)
    d, sc = search.fit_super(x, w)
    v = torch.round(x * inverse(d * sc)).clamp(-32, 31)
    return _rows((v + 32).movedim(1, 3).flatten(2)), [*_halves(d), sc.movedim(0, 2).to(torch.int8)]


def _around_zero(x: Tensor, zero: int) -> Coded:
    # The value of largest magnitude, sign kept, becomes code 0: it is represented exactly.
    blocks = _columns_first(x, 32)
    peak = blocks.gather(0, blocks.abs().argmax(0, keepdim=True))[0]
    d = peak / -zero
    codes = (blocks * inverse(d) + (zero + 0.5)).trunc()
    return _rows(codes.clamp(0, 2 * zero - 1)), _halves(d)


def _from_minimum(x: Tensor, top: int) -> Coded:
    blocks = _columns_first(x, 32)
    low, high = blocks.amin(0), blocks.amax(0)
    d = (high - low) / top
    codes = ((blocks - low) * inverse(d) + 0.5).trunc()
    return _rows(codes.clamp(0, top)), _halves(d, low)


def _signed_bytes(x: Tensor) -> Coded:
    blocks = _columns_first(x, 32)
    d = blocks.abs().amax(0) / 127
    scaled = blocks * inverse(d)
    whole = scaled.abs().floor()
    whole = whole + (scaled.abs() - whole >= 0.5)  # halves go away from zero, as in the format
    codes = torch.where(scaled < 0, 256 - whole, whole)
    return _rows(torch.where(codes == 256, 0.0, codes)), _halves(d)


def short_scale(d: Tensor) -> Tensor:
    """d rounded to 16 significant bits, to nearest even."""
    bits = d.contiguous().view(torch.int32)
    return ((bits + 0x7F + ((bits >> 8) & 1)) & ~0xFF).view(torch.float32)


def _int8(x: Tensor) -> Coded:
    d = short_scale(_row_peaks(x) / INT8_PEAK)  # [n, 1]
    codes = torch.round(x * inverse(d)).clamp(-127, 127)
    return codes.to(torch.int8).view(torch.uint8), [d.unsqueeze(-1)]


def _fp8(x: Tensor) -> Coded:
    d = short_scale(_row_peaks(x) / FP8_PEAK)
    return _e4m3(x * inverse(d)), [d.unsqueeze(-1)]


def _fp8_block(x: Tensor) -> Coded:
    n, k = x.shape
    peaks = torch.nn.functional.pad(_peaks(x, TILE), (0, 0, 0, -n % TILE))
    tiles = peaks.unflatten(0, (-(-n // TILE), TILE)).amax(1)
    d = short_scale(tiles / FP8_PEAK).repeat_interleave(TILE, 0)[:n]  # [n, tiles]
    each = d.repeat_interleave(TILE, 1)[:, :k]
    return _e4m3(x * inverse(each)), [d.unsqueeze(-1)]


def _e4m3(x: Tensor) -> Tensor:
    return x.clamp(-FP8_PEAK, FP8_PEAK).to(torch.float8_e4m3fn).view(torch.uint8)


def _peaks(x: Tensor, group: int) -> Tensor:
    """The largest magnitude of every group of columns, the last one perhaps short."""
    padded = torch.nn.functional.pad(x.abs(), (0, -x.shape[1] % group))
    return padded.unflatten(1, (padded.shape[1] // group, group)).amax(2)


def _row_peaks(x: Tensor) -> Tensor:
    return x.abs().amax(1, keepdim=True) if x.shape[1] else x.new_zeros(x.shape[0], 1)


def _nf4(x: Tensor) -> Coded:
    d = _peaks(x, 64)
    return _nf4_codes(x, d), [d.unsqueeze(-1)]


def _nf4_dq(x: Tensor) -> Coded:
    peaks = _peaks(x, 64)
    row = short_scale(_row_peaks(x) / 255)
    steps = torch.round(peaks * inverse(row)).clamp(0, 255)
    steps = torch.where(peaks > 0, steps.clamp(min=1), steps)
    count = torch.nn.functional.pad(steps.to(torch.uint8), (0, -steps.shape[1] % 4))
    return _nf4_codes(x, row * steps), [row.unsqueeze(-1), count.unsqueeze(1)]


def _nf4_codes(x: Tensor, d: Tensor) -> Tensor:
    scaled = x * inverse(d).repeat_interleave(64, 1)
    middles = torch.tensor(NF4_MIDDLES, dtype=torch.float32, device=x.device)
    return torch.bucketize(scaled, middles, out_int32=True).to(torch.uint8)  # ties: the lower code


_FLOAT_RULES: dict[str, Callable[[Tensor], Coded]] = {
    "int8": _int8,
    "nf4": _nf4,
    "nf4_dq": _nf4_dq,
    "fp8": _fp8,
    "fp8_block": _fp8_block,
}
_GGUF_RULES: dict[str, Callable[[Tensor], Coded]] = {
    "q4_0": lambda x: _around_zero(x, 8),
    "q4_1": lambda x: _from_minimum(x, 15),
    "q5_0": lambda x: _around_zero(x, 16),
    "q5_1": lambda x: _from_minimum(x, 31),
    "q8_0": _signed_bytes,
}
