"""Kernels of packed weights on a GPU: their definitions, and a row's bits in any company.

Every format meets one mode, one of each kind of codes and scales all of them: some 100 kernels.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastllm.ops import packed_layout as layout
from fastllm.ops.embedding import quant_embedding
from fastllm.ops.gated_activation import gated_activation
from fastllm.ops.quant_format import QUANT_FORMATS
from fastllm.testing.packed_weights import random_packed

pytestmark = pytest.mark.gpu

BF16, F32 = torch.bfloat16, torch.float32
COVERING = ("q4_1", "q6_k", "q8_0", "int4_asym_g128", "nf4_dq", "fp8_block")
IN_TURN = [(name, QUANT_FORMATS[name].modes[i % 3]) for i, name in enumerate(layout.QUANTIZED)]
ALL_MODES = [(name, mode) for name in COVERING for mode in QUANT_FORMATS[name].modes]


def problem(format: str, mode: str, m: int, n: int = 130) -> tuple[Tensor, Tensor, Tensor]:
    """(x, data, scales) on the GPU."""
    g = torch.Generator().manual_seed(m + n)
    k = {64: 192, 128: 384, 256: 512}.get(QUANT_FORMATS[format].multiple, 160)
    data, scales = random_packed(g, format, n, k, 1)
    x = torch.randn(m, k, generator=g).to(F32 if mode == "fp32" else BF16)
    return x.cuda(), data.cuda(), scales.cuda()


def judge(y: Tensor, exact: Tensor, peer: Tensor) -> None:
    """Within twice the peer's error, or a unit in the last place of bf16 of the largest value."""
    bound = max(2 * (peer.double() - exact).abs().max(), exact.abs().max() * 2.0**-9)
    assert (y.double() - exact).abs().max() <= bound


@pytest.mark.parametrize(
    ("format", "mode", "m"),
    [*((*pair, 3) for pair in IN_TURN), *((*pair, 200) for pair in ALL_MODES)],
)
def test_products_are_right(format: str, mode: str, m: int) -> None:
    from fastllm.kernels.quant_matmul import quant_matmul
    from fastllm.ops.quant_matmul import quant_matmul_ref

    x, data, scales = problem(format, mode, m)
    y = quant_matmul(x, data, scales, format, 130, None, mode, F32)
    ref = quant_matmul_ref(x.cpu(), data.cpu(), scales.cpu(), format, 130, None, mode, F32)
    size = ref.abs().max()
    bound = 2.0**-12 if mode == "fp8" else 2.0**-18  # Hopper adds e4m3 products in 14 bits
    assert (y.cpu() - ref).abs().max() <= size * bound
    again = quant_matmul(x, data, scales, format, 130, None, mode, F32)
    assert torch.equal(y, again)


@pytest.mark.parametrize(("format", "mode"), ALL_MODES)
def test_rows_have_the_same_bits_among_few_and_many(format: str, mode: str) -> None:
    from fastllm.kernels.quant_matmul import quant_matmul

    x, data, scales = problem(format, mode, 200)
    y = quant_matmul(x, data, scales, format, 130, None, mode, F32)
    few = quant_matmul(x[77:80], data, scales, format, 130, None, mode, F32)
    assert torch.equal(few, y[77:80])


@pytest.mark.parametrize("format", layout.QUANTIZED)
def test_rows_are_dequantized_bit_for_bit(format: str) -> None:
    _, data, scales = problem(format, "", 1)
    ids = torch.tensor([3, 129, 0], device="cuda")
    k = layout.columns_of(data, format)
    value = layout.dequantize(data.cpu(), scales.cpu(), format, 130, k)
    assert torch.equal(quant_embedding(ids, data, scales, format, 130).cpu(), value[ids.cpu()])


@pytest.mark.parametrize("format", COVERING)
def test_input_gradients_are_right(format: str) -> None:
    from fastllm.kernels.quant_matmul_input_grad import quant_matmul_input_grad

    _, data, scales = problem(format, "", 1)
    dy = torch.randn(150, 130, device="cuda").bfloat16()
    value = layout.dequantize(data, scales, format, 130, layout.columns_of(data, format)).to(BF16)
    exact = dy.double() @ value.double()
    judge(quant_matmul_input_grad(dy, data, scales, format), exact, dy @ value)


@pytest.mark.parametrize(("format", "mode"), [("q4_k", "int8"), ("nf4", "bf16"), ("fp8", "fp8")])
@pytest.mark.parametrize("m", [3, 200])
def test_epilogues_round_as_separate_ops(format: str, mode: str, m: int) -> None:
    from fastllm.kernels.quant_matmul import quant_matmul

    x, data, scales = problem(format, mode, m)
    pre = quant_matmul(x, data, scales, format, 130, None, mode)
    residual = torch.randn(m, 130, device="cuda")
    added = quant_matmul(x, data, scales, format, 130, None, mode, None, residual)
    assert torch.equal(added, residual + pre.float())
    gate, up = pre.double().chunk(2, -1)
    exact = gated_activation(gate, up, "silu")
    y = quant_matmul(x, data, scales, format, 130, None, mode, gated="silu")
    judge(y, exact, exact.to(BF16))
