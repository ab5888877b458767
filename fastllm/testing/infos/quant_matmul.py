"""Cases of quant_matmul: every format and activation mode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...ops import packed_layout as layout
from ...ops.quant_format import NATIVE_FORMATS, QUANT_FORMATS
from ...ops.quant_matmul import quant_matmul_ref, quantize_activation_ref, variants
from ..opinfo import Args, Case, OpInfo

VARIANTS = variants(NATIVE_FORMATS["quant_matmul"])
SHAPES = (
    (0, 17, 64),
    (1, 1, 32),
    (1, 100, 576),
    (2, 15, 96),
    (3, 16, 64),
    (5, 17, 32),
    (8, 33, 576),
    (17, 100, 96),
    (33, 48, 64),
)
DENSE_SHAPES = ((0, 17, 3), (1, 100, 33), (3, 16, 1), (5, 17, 31), (13, 33, 576), (33, 15, 3))
BENCH_SHAPES = tuple(
    (m, n, k) for m in (1, 8, 512) for n, k in ((576, 576), (3072, 576), (576, 1536), (49152, 576))
)


def random_packed(g: torch.Generator, format: str, n: int, k: int, rows: int) -> Args:
    """(data, scales) of random codes and scales, padding rows zero."""
    if format in layout.DENSE:
        return layout.pack_dense(torch.randn(n, k, generator=g), format, rows)
    kind = QUANT_FORMATS[format]
    words = torch.randint(0, 256, (n, k // layout.BLOCK, kind.words, 4), generator=g)
    words = words.to(torch.uint8)
    if kind.codes == "e4m3":
        words = torch.where(words & 127 == 127, words - 1, words)  # no NaN
    scales = layout.join_scales(random_scales(g, format, n, k), format, rows)
    return layout.interleave(words, rows), scales


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


def _case(shape: tuple[int, int, int], dtype: torch.dtype, variant: str, bias: bool) -> Case:
    m, n, k = shape
    format, _, activation = variant.partition("/")

    def make(g: torch.Generator) -> Args:
        x = torch.randn(m, k, generator=g).to(dtype)
        data, scales = random_packed(g, format, n, k, layout.ROWS_PER_GROUP["cpu"])
        b = torch.randn(n, generator=g) if bias else None
        return x, data, scales, format, n, b, activation or "int8", None

    return Case(label=f"{variant}-{m}x{n}x{k}" + ("-bias" if bias else ""), make=make)


def _variants(dtype: torch.dtype) -> list[str]:
    other = "bf16" if dtype == torch.float32 else "fp32"
    dense = "bf16" if dtype == torch.float32 else "f32"
    return [v for v in VARIANTS if not v.endswith(f"/{other}") and v != dense]


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    for variant in _variants(dtype):
        shapes = DENSE_SHAPES if variant in layout.DENSE else SHAPES
        for i, shape in enumerate(shapes):
            yield _case(shape, dtype, variant, bias=i % 2 == 0)

    def strided_rows(g: torch.Generator) -> Args:
        x = torch.randn(7, 80, generator=g).to(dtype)[:, 3:67]
        data, scales = random_packed(g, "q4_1", 20, 64, layout.ROWS_PER_GROUP["cpu"])
        return x, data, scales, "q4_1", 20, None, "int8", torch.float32

    def blocks_of_zeros(g: torch.Generator) -> Args:
        x = torch.randn(2, 3, 64, generator=g).to(dtype)
        x[..., :32] = 0
        data, scales = random_packed(g, "q8_0", 20, 64, layout.ROWS_PER_GROUP["cpu"])
        return x, data, scales, "q8_0", 20, None, "int8", torch.bfloat16

    yield Case(label="strided-rows-f32-out", make=strided_rows)
    yield Case(label="zero-blocks-3d-bf16-out", make=blocks_of_zeros)


def weight64(data: Tensor, scales: Tensor, format: str, n: int, k: int) -> Tensor:
    """The packed weight's values in float64 [n, k]."""
    if format in layout.DENSE:
        return layout.dense_rows(data, format, n, k).double()
    d, m = layout.block_scales(scales, format, n, k)
    values = layout.codes(data, format, n).flatten(1).double() * layout.spread(d, format, k)
    return values if m is None else values + layout.spread(m, format, k)


def exact_product(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    format: str,
    n: int,
    bias: Tensor | None,
    activation: str,
    out_dtype: Any,
) -> Tensor:
    """`quant_matmul` in float64."""
    x64 = x.double()
    if activation == "int8" and format in layout.QUANTIZED:
        # The quantizer belongs to the definition; its gradient is passed straight through.
        q, dx = quantize_activation_ref(x.detach().float().reshape(-1, x.shape[-1]))
        rounded = (q.double() * dx.double().unsqueeze(-1)).reshape(x.shape)
        x64 = x64 + (rounded - x64.detach())
    y = x64 @ weight64(data, scales, format, n, x.shape[-1]).T
    return y if bias is None else y + bias.double()


def _peer(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    format: str,
    n: int,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype | None,
) -> Tensor:
    y = quant_matmul_ref(x.detach(), data, scales, format, n, bias, activation, out_dtype)
    if not x.requires_grad:
        return y
    slope = x.float() @ layout.dequantize(data, scales, format, n, x.shape[-1]).T
    return y + (slope - slope.detach()).to(y.dtype)


INFOS = [
    OpInfo(
        name="quant_matmul",
        cases=_cases,
        exact=exact_product,
        peer=_peer,
        grad_args=(0,),
        bench_cases=lambda dtype: (
            _case(shape, dtype, variant, bias=False)
            for variant in ("q4_1/int8", "q8_0/int8")
            for shape in BENCH_SHAPES
        ),
        bytes_moved=lambda x, data, scales, *_: x.nbytes + data.nbytes + scales.nbytes,
        flops=lambda x, data, scales, format, n, *_: 2 * x.numel() * n,
        variants=VARIANTS,
    ),
]
