"""Kernels of packed weights under the interpreter, against the definitions in fastllm.ops.

Runs as interpreter_cases.py does.
"""

from __future__ import annotations

import math
import sys
from itertools import product

import torch
from interpreter_cases import BF16, F32, NAMES, Case, excess, main, randn, same
from torch import Tensor

from fastllm.ops import packed_layout as layout
from fastllm.ops.gated_activation import gated_activation
from fastllm.ops.quant_format import QUANT_FORMATS
from fastllm.ops.quant_matmul import quant_matmul_ref
from fastllm.ops.quant_products import quantize_activation_fp8_ref, quantize_activation_ref
from fastllm.testing.packed_weights import random_packed

FORMATS = layout.QUANTIZED


def columns(format: str) -> int:
    """A few of the format's smallest rows: 160 columns, 192, 384 or 512."""
    return {64: 192, 128: 384, 256: 512}.get(QUANT_FORMATS[format].multiple, 160)


def pack(
    format: str, n: int, k: int, seed: int = 0, size: str | float = "normal"
) -> tuple[Tensor, Tensor]:
    """(data, scales) of a random weight, one row a group."""
    generator = torch.Generator().manual_seed(n + k + 1000 * seed)
    data, scales = random_packed(generator, format, n, k, 1, size)
    return data.contiguous(), scales.contiguous()


def pack_dense(dtype: torch.dtype, n: int, k: int) -> tuple[Tensor, Tensor]:
    """(data, weight[n, k]) of a dense packed weight; bf16 pads columns to an even number."""
    weight = randn(n, k, dtype=dtype)
    if dtype == F32:
        return weight.view(n, k, 1), weight
    padded = torch.nn.functional.pad(weight, (0, k % 2))
    return padded.view(n, -1, 1, 2), weight


def embedding_case(format: str, out: torch.dtype) -> float:
    """Rows of a table are dequantized bit for bit; ids outside it give zeros."""
    from fastllm.kernels.embedding import quant_embedding

    k = columns(format)
    data, scales = pack(format, 9, k)
    ids = torch.tensor([8, 0, 5, 9, -1])
    value = layout.dequantize(data, scales, format, 9, k)
    ref = torch.cat((value[ids[:3]], torch.zeros(2, k))).to(out)
    return same(quant_embedding(ids, data, scales, format, 9, out), ref)


def input_grad_case(format: str, dtype: torch.dtype, m: int, n: int) -> float:
    from fastllm.kernels.quant_matmul_input_grad import quant_matmul_input_grad

    k = columns(format)
    data, scales = pack(format, n, k)
    dy = randn(m, n, dtype=dtype)
    value = layout.dequantize(data, scales, format, n, k).to(dtype)
    y = quant_matmul_input_grad(dy, data, scales, format, F32)
    return excess(y, dy.double() @ value.double(), F32)


def product_case(
    format: str,
    mode: str,
    m: int,
    n: int = 70,
    k: int = 0,
    bias: bool = False,
    batch_invariant: bool = True,
) -> float:
    from fastllm.kernels.quant_matmul import quant_matmul

    k = k or columns(format)
    data, scales = pack(format, n, k)
    x = randn(m, k, dtype=F32 if mode == "fp32" else BF16)
    x[0, :32] = 0
    b = randn(n, seed=4) if bias else None
    ref = quant_matmul_ref(x, data, scales, format, n, b, mode, F32)
    y = quant_matmul(x, data, scales, format, n, b, mode, F32, batch_invariant=batch_invariant)
    return excess(y, ref.double(), F32)


def everything_case(format: str, mode: str, dtype: torch.dtype, m: int) -> float:
    """A format's rows, input gradient and product in one mode."""
    return max(
        embedding_case(format, dtype),
        input_grad_case(format, dtype, 9, 70),
        product_case(format, mode, m),
    )


def gated_case(format: str, mode: str, m: int, gated: str, **options: bool) -> float:
    """Halves of the outputs are rounded and activated; in bf16 to the last bit but one."""
    from fastllm.kernels.quant_matmul import quant_matmul

    k, bias = columns(format), randn(80, seed=4)
    data, scales = pack(format, 80, k) if format != "bf16" else (pack_dense(BF16, 80, k)[0],) * 2
    x = randn(m, k, dtype=F32 if mode == "fp32" else BF16) * 0.1
    plain = quant_matmul(x, data, scales, format, 80, bias, mode, **options)
    gate, up = plain.double().chunk(2, -1)
    y = quant_matmul(x, data, scales, format, 80, bias, mode, gated=gated, **options)
    return excess(y, gated_activation(gate, up, gated), x.dtype)


def residual_case(format: str, mode: str, m: int, **options: bool) -> float:
    """The product is rounded to x's dtype, then added to the fp32 residual: the same bits."""
    from fastllm.kernels.quant_matmul import quant_matmul

    k, bias, residual = columns(format), randn(70, seed=4), randn(m, 70, seed=8)
    data, scales = pack(format, 70, k) if format != "bf16" else (pack_dense(BF16, 70, k)[0],) * 2
    x = randn(m, k, dtype=F32 if mode == "fp32" else BF16)
    plain = quant_matmul(x, data, scales, format, 70, bias, mode, **options)
    y = quant_matmul(x, data, scales, format, 70, bias, mode, None, residual, **options)
    return same(y, residual + plain.float())


def dense_case(dtype: torch.dtype, k: int) -> float:
    from fastllm.kernels.embedding import quant_embedding
    from fastllm.kernels.quant_matmul import quant_matmul

    data, weight = pack_dense(dtype, 20, k)
    x = randn(3, k, dtype=dtype, seed=5)
    mode = "bf16" if dtype == BF16 else "fp32"
    y = quant_matmul(x, data, torch.empty(0), NAMES[dtype], 18, None, mode)
    ids = torch.tensor([8, 0, 5], dtype=torch.int32)
    rows = quant_embedding(ids, data, torch.empty(0), NAMES[dtype], 20, dtype)[:, :k]
    return max(excess(y, x.double() @ weight[:18].double().T, dtype), same(rows, weight[ids]))


def rows_case(format: str, mode: str) -> float:
    """A row alone and among 20 others: the same bits, through different tiles."""
    from fastllm.kernels.quant_matmul import quant_matmul

    k = columns(format)
    data, scales = pack(format, 40, k)
    x = randn(21, k, dtype=F32 if mode == "fp32" else BF16)
    all_rows = quant_matmul(x, data, scales, format, 40, None, mode)
    one = quant_matmul(x[13:14], data, scales, format, 40, None, mode)
    return same(all_rows[13:14], one)


def int8_activation_exact() -> float:
    """Codes, scales and sums equal the definition bit for bit, ties and zero blocks included."""
    from fastllm.kernels.quant_activation import quantize_activation

    x = randn(5, 96)
    x[0, :32] = 0
    x[1, :32] = torch.arange(32) + 0.5  # 127 / amax scales these; ties come from the next row
    x[2, :3] = torch.tensor([127.0, 2.5, 3.5])
    x[2, 3:32] = 0
    x[3, :32] *= 1e-39  # 127 / amax is infinite
    codes, scale = quantize_activation_ref(x)
    q, dx, sums = quantize_activation(x, paired=False)
    paired, _, _ = quantize_activation(x, paired=True)
    halves = torch.stack((codes[..., :16], codes[..., 16:]), -1).reshape(5, 96)
    return max(
        same(q, codes.reshape(5, 96).to(torch.int8)),
        same(paired, halves.to(torch.int8)),
        same(dx, scale),
        same(sums, scale * codes.sum(-1)),
    )


def e4m3_activation_exact() -> float:
    """Values and bits equal the definition: 20 binades, ties, subnormals, zeros, a short block."""
    from fastllm.kernels.quant_activation import quantize_e4m3

    x = randn(6, 160) * torch.exp2(-(torch.arange(160) % 21).float())
    x[0] = 0
    x[1, :128] = torch.arange(128).float() / 512  # with 448: subnormals and ties between them
    x[1, 0] = 448
    x[2, :128] = torch.arange(128).float() * 3.5 + 3.5  # to 448, halves of units among them
    x[3, :128] *= 1e-38
    q, dx = quantize_activation_fp8_ref(x)
    bits, scales = quantize_e4m3(x, native=True)
    values, _ = quantize_e4m3(x, native=False)
    assert bits.dtype == torch.float8_e4m3fn
    signed = bits.view(torch.uint8) == q.to(torch.float8_e4m3fn).view(torch.uint8)
    return max(same(bits.float(), q), same(values.float(), q), same(scales, dx), *~signed.flatten())


def sums_exact() -> float:
    """Sums of 32 columns are added in ascending order."""
    from fastllm.kernels.quant_activation import sum_activation

    x = randn(3, 384, dtype=BF16)
    parts = sum_activation(x, 32)
    found = sum_activation(x, 128)
    ref = torch.zeros(3, 3)
    for i in range(4):
        ref += parts.view(3, 3, 4)[..., i]
    return max(same(found, ref), excess(parts, x.double().view(3, 12, 32).sum(-1), F32))


def not_finite_case(format: str, mode: str, value: float) -> float:
    """A value of x that is not finite makes its row's outputs not finite, and no other row's."""
    from fastllm.kernels.quant_matmul import quant_matmul

    k = columns(format)
    data, scales = pack(format, 40, k)
    x = randn(3, k, dtype=BF16)
    clean = quant_matmul(x, data, scales, format, 40, None, mode)
    x[1, 5] = value
    y = quant_matmul(x, data, scales, format, 40, None, mode)
    bad = math.inf if y[1].isfinite().any() else 0.0
    return max(bad, same(y[::2], clean[::2]))


def strides_case() -> float:
    """Columns of x and a bias that do not lie side by side; a weight without columns."""
    from fastllm.kernels.linear import linear
    from fastllm.kernels.quant_matmul import quant_matmul

    x, bias, worst = randn(160, 3).t(), randn(80)[::2], 0.0
    for format, mode in (("q4_1", "int8"), ("q4_1", "fp32"), ("fp8", "fp8")):
        data, scales = pack(format, 40, 160)
        y = quant_matmul(x, data, scales, format, 40, bias, mode)
        whole = (x.contiguous(), data, scales, format, 40, bias.contiguous(), mode)
        worst = max(worst, same(y, quant_matmul(*whole)))
        none = quant_matmul(x[:, :0], *pack(format, 40, 0), format, 40, bias, mode)
        worst = max(worst, same(none, bias.expand(3, 40)))
    weight = randn(160, 40).t()
    want = linear(x.contiguous(), weight.contiguous(), bias.contiguous())
    return max(worst, same(linear(x, weight, bias), want))


def quick_cases() -> dict[str, Case]:
    """Every format, each mode in turn; every mode, epilogue and quantizer."""
    cases: dict[str, Case] = {}
    for i, format in enumerate(FORMATS):
        modes = QUANT_FORMATS[format].modes
        a = (format, modes[i % len(modes)], (BF16, F32)[i % 2], (3, 19)[i // 2 % 2])
        cases[f"packed {format} {a[1]} m={a[3]}"] = lambda a=a: everything_case(*a)
    split = {"k": 1280, "bias": True, "batch_invariant": False}
    for format, mode in (("q4_1", "int8"), ("int4_asym_g128", "bf16")):
        name = f"quant_matmul {format} {mode} split K"
        cases[name] = lambda a=(format, mode): product_case(*a, 2, **split)
    fast = {"batch_invariant": False}
    cases["quant_matmul gated"] = lambda: max(
        gated_case("q4_k", "int8", 3, "silu"),
        gated_case("nf4_dq", "bf16", 19, "gelu_tanh"),
        gated_case("fp8", "fp8", 2, "silu", **fast),
        gated_case("bf16", "bf16", 2, "silu"),
    )
    cases["quant_matmul residual"] = lambda: max(
        residual_case("q4_0", "int8", 3),
        residual_case("q6_k", "bf16", 19),
        residual_case("int8", "fp32", 2, **fast),
        residual_case("bf16", "bf16", 2),
    )
    for dtype in (F32, BF16):
        cases[f"quant_matmul {NAMES[dtype]} odd K"] = lambda d=dtype: dense_case(d, 37)
    for format, mode in (("q6_k", "int8"), ("nf4", "bf16")):
        cases[f"quant_matmul {format} {mode} rows"] = lambda a=(format, mode): rows_case(*a)
    cases["quant_matmul not finite"] = lambda: max(
        not_finite_case("q4_1", "int8", math.nan),
        not_finite_case("q6_k", "int8", math.inf),
        not_finite_case("fp8", "fp8", math.nan),
    )
    cases["quant_matmul strides"] = strides_case
    cases["quant_matmul_input_grad empty"] = lambda: input_grad_case("q4_0", F32, 0, 20)
    cases["quantize_activation"] = int8_activation_exact
    cases["quantize_e4m3"] = e4m3_activation_exact
    cases["sum_activation"] = sums_exact
    return cases


def full_cases() -> dict[str, Case]:
    """Every format in every mode, through every tile."""
    cases: dict[str, Case] = {}
    for format in FORMATS:
        for mode, m in product(QUANT_FORMATS[format].modes, (1, 17, 33, 65, 129)):
            name = f"quant_matmul {format} {mode} m={m}"
            cases[name] = lambda a=(format, mode, m): product_case(*a, n=130, bias=True)
        for mode in QUANT_FORMATS[format].modes:
            name = f"quant_matmul {format} {mode}"
            cases[f"{name} rows"] = lambda a=(format, mode): rows_case(*a)
            cases[f"{name} gated"] = lambda a=(format, mode): gated_case(*a, 21, "silu")
            cases[f"{name} residual"] = lambda a=(format, mode): residual_case(*a, 5)
        for dtype in (BF16, F32):
            name = f"{format} {NAMES[dtype]}"
            cases[f"quant_embedding {name}"] = lambda a=(format, dtype): embedding_case(*a)
            cases[f"quant_matmul_input_grad {name}"] = lambda a=(format, dtype): input_grad_case(
                *a, 33, 129
            )
        if QUANT_FORMATS[format].codes in ("int8", "e4m3"):
            for mode, value in product(QUANT_FORMATS[format].modes[:2], (math.nan, math.inf)):
                name = f"quant_matmul {format} {mode} {value}"
                cases[name] = lambda a=(format, mode, value): not_finite_case(*a)
    return cases


if __name__ == "__main__":
    sys.exit(main(quick_cases, full_cases))
