"""The definition of products with packed weights, in plain PyTorch: what every kernel computes."""

from __future__ import annotations

import torch
from torch import Tensor

from . import packed_layout as layout
from .quant_format import NF4_INT8, QUANT_FORMATS, SUPER_BLOCK, WIDEST_CHUNK

E4M3_MAX = 448.0
MANY = 16  # rows


def quantize_activation_ref(x: Tensor) -> tuple[Tensor, Tensor]:
    """x `[M, K]` -> integers as float32 `[M, K/32, 32]` and their scale dx `[M, K/32]`.

    dx = amax / 127 and q = round-to-nearest-even(x * (127 / amax)) over every 32 columns. A block
    of zeros (or of values below 4e-37) gives 0; NaN or infinity makes its dx NaN or infinite.
    """
    blocks = x.float().unflatten(-1, (-1, layout.BLOCK))
    amax = blocks.abs().amax(-1)
    inverse = torch.full_like(amax, 127.0) / amax  # a number / tensor is rounded twice by torch
    inverse = torch.where(torch.isinf(inverse), 0.0, inverse)  # zeros, or too small a block
    return torch.round(blocks * inverse.unsqueeze(-1)), amax / 127.0


def quantize_activation_fp8_ref(x: Tensor) -> tuple[Tensor, Tensor]:
    """x `[M, K]` -> e4m3 values as float32 `[M, K]` and their scale dx `[M, ceil(K/128)]`.

    dx = amax / 448 and q = e4m3(x * (448 / amax)) over every 128 columns; zeros, NaN and infinity
    are as in `quantize_activation_ref`.
    """
    k = x.shape[1]
    padded = torch.nn.functional.pad(x.float(), (0, -k % WIDEST_CHUNK))
    blocks = padded.unflatten(-1, (-1, WIDEST_CHUNK))
    amax = blocks.abs().amax(-1)
    inverse = torch.full_like(amax, E4M3_MAX) / amax
    inverse = torch.where(torch.isinf(inverse), 0.0, inverse)
    q = (blocks * inverse.unsqueeze(-1)).to(torch.float8_e4m3fn).float()
    return q.flatten(1)[:, :k], amax / E4M3_MAX


def dot_ref(a: Tensor, b: Tensor) -> Tensor:
    """a `[M, C]` @ b.T, b `[N, C]`, both float32, as torch multiplies many rows."""
    # torch multiplies a few rows by another routine, in more partial sums, than it does many. What
    # a row is must not depend on how many others there are, nor what it may err by.
    m, n = len(a), len(b)
    if min(m, n) < MANY:
        a, b = (t.repeat(-(-MANY // max(1, len(t))), 1) if len(t) < MANY else t for t in (a, b))
    return (a @ b.T)[:m, :n]


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    # The product of two floats is exact in float64, so this is an fp32 FMA (up to double rounding).
    return (a.double() * b.double() + c.double()).float()


def products_ref(x: Tensor, data: Tensor, scales: Tensor, format: str, n: int, mode: str) -> Tensor:
    """float32 x `[M, K]` @ W.T `[M, n]` of a quantized format, chunk by chunk in ascending K."""
    k = x.shape[1]
    codes, d, minimum = operands_ref(data, scales, format, n, k, mode)
    q, dx = x.float(), None
    if mode == "int8":
        q, dx = quantize_activation_ref(x)
        q = q.flatten(1)
    elif mode == "fp8":
        q, dx = quantize_activation_fp8_ref(x)
    acc = torch.zeros(x.shape[0], n, dtype=torch.float32, device=x.device)
    chunk = QUANT_FORMATS[format].chunk(mode, k)
    for c, start in enumerate(range(0, k, chunk)):
        part = q[:, start : start + chunk]
        dot = dot_ref(part, codes[:, start : start + chunk])  # exact for int8: below 2^24
        acc = _fma(dot, d[:, c] if dx is None else d[:, c] * dx[:, c, None], acc)
        if minimum is not None:
            total = _column_sums(part)
            acc = _fma(minimum[:, c], (total if dx is None else total * dx[:, c])[:, None], acc)
    return acc


def operands_ref(
    data: Tensor, scales: Tensor, format: str, n: int, k: int, mode: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a mode's products are made of: codes float32 [n, k], and d and m [n, chunks].

    In mode "int8" a q6_k code is multiplied by its sub-block's integer scale, so that one sum
    serves 32 columns, and nf4 has integer codes, 127 to its 1.
    """
    kind = QUANT_FORMATS[format]
    stored = layout.stored_codes(data, format, n)
    codes, group = layout.code_values(stored, format), kind.columns_per_scale(k)
    minimum: Tensor | None = None
    if mode == "int8" and kind.scales == "super":
        wide, sub = (part.float() for part in layout.split_scales(scales, format, n, k))
        codes = codes * layout.spread(sub.flatten(1), format, k)
        d, group = wide[:, :, 0], SUPER_BLOCK
    else:
        d, minimum = layout.block_scales(scales, format, n, k)
    if mode == "int8" and kind.codes == "nf4":
        codes = torch.tensor(NF4_INT8, dtype=torch.float32, device=data.device)[stored.int()]
        d = d * torch.tensor(1 / 127, dtype=torch.float32, device=data.device)
    starts = torch.arange(0, k, kind.chunk(mode, k), device=data.device) // group
    return codes, d[:, starts], None if minimum is None else minimum[:, starts]


def _column_sums(part: Tensor) -> Tensor:
    """[M, C] -> [M]: sums of every 32 columns, added in ascending order."""
    total = part[:, : layout.BLOCK].sum(-1)
    for start in range(layout.BLOCK, part.shape[1], layout.BLOCK):
        total = total + part[:, start : start + layout.BLOCK].sum(-1)
    return total
