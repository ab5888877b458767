"""The quantizers under the interpreter, bit for bit the definitions in fastllm.ops.

Runs as interpreter_cases.py does.
"""

from __future__ import annotations

import sys

import torch
from interpreter_cases import BF16, F32, Case, main, same
from quant_cases import columns, pack
from torch import Tensor

from fastllm.ops import packed_layout as layout
from fastllm.ops.quant_format import QUANT_FORMATS
from fastllm.ops.quantize_rules import encode

FORMATS = layout.QUANTIZED


def dequantize_case(format: str, dtype: torch.dtype) -> float:
    from fastllm.kernels import dequantize as dequantizer

    n, k = 3, columns(format)
    data, scales = pack(format, n, k)
    want = layout.dequantize(data, scales, format, n, k).to(dtype)
    return same(dequantizer.dequantize(data, scales, format, n, dtype), want)


def quantize_case(format: str, dtype: torch.dtype, importance: tuple[str, ...]) -> float:
    """Rows of normal values, with zeros, constants, an offset and an outlier.

    `importance` names its dimensions; one column of the third block counts.
    """
    from fastllm.kernels import quantize as quantizer

    n, k = 3, QUANT_FORMATS[format].multiple + (32 if QUANT_FORMATS[format].multiple == 32 else 0)
    generator = torch.Generator().manual_seed(k)
    w = 0.05 * torch.randn(n, k, generator=generator)
    w[1, :32], w[2, 5] = 0.0, 3.0
    w[0, 32:64], w[1, 32:64] = 0.05, -0.05
    w[1, 64:96] += 1.0
    weights: Tensor | None = None
    if importance:
        weights = torch.rand([n, k][-len(importance) :], generator=generator).pow(3)
        weights[..., :32] = 0.0
        weights[..., 64:96], weights[..., 70:71] = 1e-8, 1.0
    w = w.to(dtype)
    codes, parts = encode(w.float() + 0.0, format, weights)
    want = layout.pack_parts(codes, parts, format, 1)
    data, scales = (torch.full_like(t, 7) for t in want)
    quantizer.quantize(w, format, weights, data, scales)
    as_bytes = [t.contiguous().flatten().view(torch.uint8) for t in (scales, want[1])]
    return max(same(data, want[0]), same(*as_bytes))


def quick_cases() -> dict[str, Case]:
    """Every rule, and a search of each kind."""
    cases: dict[str, Case] = {}
    for format in FORMATS:
        cases[f"dequantize {format}"] = lambda f=format: dequantize_case(f, BF16)
    for format in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "int8", "nf4", "nf4_dq", "fp8_block"):
        cases[f"quantize {format}"] = lambda f=format: quantize_case(f, F32, ())
    cases["quantize q4_k importance"] = lambda: quantize_case("q4_k", BF16, ("k",))
    cases["quantize q6_k"] = lambda: quantize_case("q6_k", F32, ())
    cases["quantize q8_0 importance"] = lambda: quantize_case("q8_0", BF16, ("n", "k"))
    cases["quantize int4_asym_g32"] = lambda: quantize_case("int4_asym_g32", F32, ())
    return cases


def full_cases() -> dict[str, Case]:
    """Every format, with importances of columns and of values too."""
    cases: dict[str, Case] = {}
    for format in FORMATS:
        for dtype, importance in ((F32, ()), (torch.float16, ("k",)), (BF16, ("n", "k"))):
            if importance and QUANT_FORMATS[format].scale_dtype == F32:
                continue
            name = f"quantize {format} {dtype} {len(importance)}d"
            cases[name] = lambda a=(format, dtype, importance): quantize_case(*a)
        cases[f"dequantize {format} f32"] = lambda f=format: dequantize_case(f, F32)
    return cases


if __name__ == "__main__":
    sys.exit(main(quick_cases, full_cases))
