"""Cases of quant_matmul: every format and activation mode that a native row serves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...ops import packed_layout as layout
from ...ops.quant_matmul import GATED, VARIANTS, finished_ref, quant_matmul_ref
from ...ops.quant_products import quantize_activation_fp8_ref, quantize_activation_ref
from ..opinfo import Case, OpInfo
from ..packed_weights import random_packed, weight64
from ..quant_problem import Product, products

__all__ = ["INFOS", "VARIANTS", "exact_product", "peer_product", "random_packed", "weight64"]

# Per (format, mode): how many problems of the covering set every run and the full run see.
QUICK, FULL = 3, 9
DENSE_SHAPES = ((0, 17, 3), (1, 100, 33), (3, 16, 1), (5, 17, 31), (13, 33, 576), (33, 15, 3))
BENCH_SHAPES = tuple(
    (m, n, k) for m in (1, 8, 512) for n, k in ((576, 576), (3072, 576), (576, 1536), (49152, 576))
)


def _case(p: Product, full: bool = False) -> Case:
    return Case(label=p.label, make=p.make, full=full)


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    seen = set()
    for count, seed in ((QUICK, 3), (FULL, 4)):
        for p in products(count * len(VARIANTS), seed, layout.FORMATS):
            if p.option in GATED and p.n < 16:  # few products of errors: judged over more draws
                continue
            if p.dtype == dtype and p.label not in seen:
                seen.add(p.label)
                yield _case(p, full=count == FULL)
    dense = "bf16" if dtype == torch.bfloat16 else "f32"
    mode = "bf16" if dtype == torch.bfloat16 else "fp32"
    for i, (m, n, k) in enumerate(DENSE_SHAPES):
        bias = "float32" if i % 2 == 0 else ""
        yield _case(Product(format=dense, mode=mode, dtype=dtype, rows=(m,), n=n, k=k, bias=bias))


def _bench_case(shape: tuple[int, int, int], dtype: torch.dtype, variant: str) -> Case:
    m, n, k = shape
    format, _, mode = variant.partition("/")
    return _case(Product(format=format, mode=mode, dtype=dtype, rows=(m,), n=n, k=k))


def quantized_rows(x: Tensor, format: str, mode: str) -> Tensor:
    """float64 x as a mode's products see it; the gradient passes straight through."""
    x64 = x.double()
    if format in layout.DENSE or mode not in ("int8", "fp8"):
        return x64
    # The quantizer belongs to the definition.
    rows = x.detach().float().reshape(-1, x.shape[-1])
    if mode == "int8":
        q, dx = quantize_activation_ref(rows)
        seen = (q.double() * dx.double().unsqueeze(-1)).flatten(1)
    else:
        q, dx = quantize_activation_fp8_ref(rows)
        seen = q.double() * dx.double().repeat_interleave(128, 1)[:, : x.shape[-1]]
    return x64 + (seen.reshape(x.shape) - x64.detach())


def exact_product(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    format: str,
    n: int,
    bias: Tensor | None,
    activation: str,
    out_dtype: Any = None,
    residual: Tensor | None = None,
    gated: str = "",
) -> Tensor:
    """`quant_matmul` in float64."""
    weight = weight64(data, scales, format, n, x.shape[-1], activation)
    y = quantized_rows(x, format, activation) @ weight.T
    y = y if bias is None else y + bias.double()
    return finished_ref(y, torch.float64, None, residual, gated)


def peer_product(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    format: str,
    n: int,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype | None = None,
    residual: Tensor | None = None,
    gated: str = "",
) -> Tensor:
    """The definition of `quant_matmul`, differentiable in x."""
    sums = quant_matmul_ref(x.detach(), data, scales, format, n, None, activation, torch.float32)
    sums = sums if bias is None else sums + bias.float()
    if x.requires_grad:
        weight = layout.dequantize(data, scales, format, n, x.shape[-1]).to(x.dtype)
        slope = x.float() @ weight.float().T
        sums = sums + (slope - slope.detach())
    return finished_ref(sums, x.dtype, out_dtype, residual, gated)


INFOS = [
    OpInfo(
        name="quant_matmul",
        cases=_cases,
        exact=exact_product,
        peer=peer_product,
        grad_args=(0, 8),
        bench_cases=lambda dtype: (
            _bench_case(shape, dtype, variant)
            for variant in ("q4_1/int8", "q8_0/int8")
            for shape in BENCH_SHAPES
        ),
        bytes_moved=lambda x, data, scales, *_: x.nbytes + data.nbytes + scales.nbytes,
        flops=lambda x, data, scales, format, n, *_: 2 * x.numel() * n,
        variants=VARIANTS,
    ),
]
