"""Properties of quant_matmul: a row's bits depend on the row alone; hostile input is named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastllm import _C
from fastllm.ops import packed_layout as layout
from fastllm.ops import quant_matmul
from fastllm.ops.quant_format import NATIVE_FORMATS
from fastllm.ops.quant_matmul import quant_matmul_ref
from fastllm.testing.infos.quant_matmul import VARIANTS, random_packed
from fastllm.testing.opinfo import generator

QUANTIZED = tuple(f for f in NATIVE_FORMATS["quant_matmul"] if f in layout.QUANTIZED)


def _dtype(variant: str) -> torch.dtype:
    return torch.float32 if variant.endswith(("fp32", "f32")) else torch.bfloat16


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("n", "k"), [(100, 576), (33, 96)])
def test_a_row_has_the_same_bits_alone_and_among_others(variant: str, n: int, k: int) -> None:
    format, _, activation = variant.partition("/")
    g = generator()
    x = torch.randn(40, k, generator=g).to(_dtype(variant))
    data, scales = random_packed(g, format, n, k, 16)

    def run(rows: Tensor, threads: int) -> Tensor:
        torch.set_num_threads(threads)
        return quant_matmul(
            rows, data, scales, format, n, None, activation or "int8", torch.float32
        )

    for isa in _C.isas():
        _C.set_isa(isa)
        whole = run(x, 2)
        for count in (1, 2, 3, 5, 8, 13, 17):
            for threads in (1, 2):
                assert torch.equal(run(x[7 : 7 + count], threads), whole[7 : 7 + count]), isa


@pytest.mark.parametrize("format", QUANTIZED)
def test_int8_sums_equal_the_definition_bit_for_bit(format: str) -> None:
    g = generator(1)
    data, scales = random_packed(g, format, 48, 576, 16)
    x = torch.randn(9, 576, generator=g).bfloat16()  # bf16 rows meet ties of the quantizer
    want = quant_matmul_ref(x, data, scales, format, 48, None, "int8", torch.float32)
    for isa in _C.isas():
        _C.set_isa(isa)
        got = quant_matmul(x, data, scales, format, 48, None, "int8", torch.float32)
        assert torch.equal(got, want), isa


def test_extreme_codes_do_not_saturate() -> None:
    for format in QUANTIZED:
        data, scales = random_packed(generator(), format, 16, 64, 16)
        scales.fill_(1.0)
        for byte in (0x00, 0x7F, 0x80, 0x88, 0xFF):
            data.fill_(byte)
            for x in (torch.full((1, 64), 3.0), torch.full((1, 64), -3.0)):
                want = quant_matmul_ref(x, data, scales, format, 16, None, "int8")
                for isa in _C.isas():
                    _C.set_isa(isa)
                    assert torch.equal(quant_matmul(x, data, scales, format, 16), want)


def test_nan_and_infinity_stay_in_their_row() -> None:
    data, scales = random_packed(generator(), "q4_1", 16, 64, 16)
    x = torch.ones(3, 64)
    x[1, 40] = float("nan")
    x[2, 3] = float("inf")
    for isa in _C.isas():
        _C.set_isa(isa)
        y = quant_matmul(x, data, scales, "q4_1", 16)
        assert y[0].isfinite().all()
        assert not y[1].isfinite().any()
        assert not y[2].isfinite().any()


def test_bad_arguments_are_named() -> None:
    data, scales = random_packed(generator(), "q4_1", 20, 64, 16)
    x = torch.zeros(2, 64)
    for change, name in [
        ({"format": "q5_x"}, "format"),
        ({"format": "q8_0"}, "data"),
        ({"n": 40}, "data"),
        ({"n": -1}, "n"),
        ({"x": torch.zeros(2, 32)}, "x"),
        ({"x": torch.zeros(2, 64, dtype=torch.float64)}, "x"),
        ({"activation": "int4"}, "activation"),
        ({"activation": "bf16"}, "x"),
        ({"scales": scales.float()}, "scales"),
        ({"scales": scales[:1]}, "scales"),
        ({"bias": torch.zeros(19)}, "bias"),
        ({"out_dtype": torch.float16}, "out_dtype"),
    ]:
        arguments = {"x": x, "data": data, "scales": scales, "format": "q4_1", "n": 20} | change
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            quant_matmul(**arguments)
