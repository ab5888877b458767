"""Properties of quant_matmul: a row's bits depend on the row alone; hostile input is named."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllm import _C
from fastllm.ops import linear, quant_matmul, swiglu
from fastllm.ops import packed_layout as layout
from fastllm.ops.gated_activation import gated_activation
from fastllm.ops.quant_format import QUANT_FORMATS
from fastllm.ops.quant_matmul import quant_matmul_ref
from fastllm.quantize.packed import pack_codes
from fastllm.testing.infos.quant_matmul import VARIANTS, random_packed
from fastllm.testing.opinfo import generator

INTEGER = tuple(f for f in layout.QUANTIZED if "int8" in QUANT_FORMATS[f].modes)


def _columns(format: str, k: int) -> int:
    """The next K that the format can hold."""
    multiple = QUANT_FORMATS[format].multiple
    return -(-k // multiple) * multiple


def _dtype(variant: str) -> torch.dtype:
    return torch.float32 if variant.endswith(("fp32", "f32")) else torch.bfloat16


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("n", "k"), [(100, 576), (33, 96)])
def test_a_row_has_the_same_bits_alone_and_among_others(variant: str, n: int, k: int) -> None:
    format, _, activation = variant.partition("/")
    k = _columns(format, k)
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


@pytest.mark.parametrize("format", INTEGER)
def test_int8_sums_equal_the_definition_bit_for_bit(format: str) -> None:
    g, k = generator(1), _columns(format, 576)
    data, scales = random_packed(g, format, 48, k, 16)
    x = torch.randn(9, k, generator=g).bfloat16()  # bf16 rows meet ties of the quantizer
    want = quant_matmul_ref(x, data, scales, format, 48, None, "int8", torch.float32)
    for isa in _C.isas():
        _C.set_isa(isa)
        got = quant_matmul(x, data, scales, format, 48, None, "int8", torch.float32)
        assert torch.equal(got, want), isa


def test_extreme_codes_do_not_saturate() -> None:
    for format in INTEGER:
        k = _columns(format, 64)
        data, scales = random_packed(generator(), format, 16, k, 16)
        if not QUANT_FORMATS[format].mixed:
            scales.fill_(1.0)
        for byte in (0x00, 0x7F, 0x80, 0x88, 0xFF):
            data.fill_(byte)
            for x in (torch.full((1, k), 3.0), torch.full((1, k), -3.0)):
                want = quant_matmul_ref(x, data, scales, format, 16, None, "int8")
                for isa in _C.isas():
                    _C.set_isa(isa)
                    assert torch.equal(quant_matmul(x, data, scales, format, 16), want)


@pytest.mark.parametrize("others", ["ordinary", "any"])
@pytest.mark.parametrize("format", ["fp8", "fp8_block"])
def test_each_e4m3_keeps_its_value_whatever_stands_beside_it(format: str, others: str) -> None:
    """Row c of the weight holds code c; its neighbours are 1.0, or any code but NaN."""
    k = _columns(format, 64)
    codes = torch.full((256, k), 0x38, dtype=torch.uint8)
    if others == "any":
        codes.random_(0, 256, generator=generator())
        codes[codes & 0x7F == 0x7F] = 0
    every = torch.arange(256)
    codes[every, every % k] = every.to(torch.uint8)
    scales = torch.ones(256, 1)
    packed = pack_codes(format, codes, scales)
    want = codes.view(torch.float8_e4m3fn).float().T.contiguous()
    want[:, [0x7F, 0xFF]] = torch.nan  # 0 * NaN
    x = torch.eye(k, dtype=torch.bfloat16)
    for isa in _C.isas():
        _C.set_isa(isa)
        for rows in (1, 3, k):
            parts = [
                quant_matmul(
                    part, packed.data, packed.scales, format, 256, None, "bf16", torch.float32
                )
                for part in x.split(rows)
            ]
            assert torch.equal(torch.cat(parts).nan_to_num(7e5), want.nan_to_num(7e5)), isa


def test_each_int8_keeps_its_value_for_any_number_of_rows() -> None:
    """Also -128, which our own quantizer never writes; one and two rows decode by tables."""
    codes = torch.randint(-128, 128, (256, 64), generator=generator()).to(torch.int8)
    codes[:, 5] = torch.arange(-128, 128)
    packed = pack_codes("int8", codes, torch.ones(256, 1))
    x = torch.eye(64, dtype=torch.bfloat16)
    for isa in _C.isas():
        _C.set_isa(isa)
        for rows in (1, 2, 3, 8, 64):
            parts = [
                quant_matmul(
                    part, packed.data, packed.scales, "int8", 256, None, "bf16", torch.float32
                )
                for part in x.split(rows)
            ]
            assert torch.equal(torch.cat(parts), codes.float().T), (isa, rows)


def test_strides_of_x_and_bias_do_not_matter() -> None:
    g = generator(5)
    data, scales = random_packed(g, "q4_1", 20, 64, 16)
    x, bias = torch.randn(64, 5, generator=g).t(), torch.randn(40, generator=g)[::2]
    want = quant_matmul(x.contiguous(), data, scales, "q4_1", 20, bias.contiguous())
    assert torch.equal(quant_matmul(x, data, scales, "q4_1", 20, bias), want)
    weight = torch.randn(20, 64, generator=g)
    assert torch.equal(linear(x, weight, bias), linear(x, weight, bias.contiguous()))


@pytest.mark.parametrize("gated", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("n", [2, 34, 602])
def test_gate_and_up_may_share_a_panel(n: int, gated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the reference was called")

    module = importlib.import_module("fastllm.ops.quant_matmul")
    monkeypatch.setattr(module, "finished_ref", refuse)
    g = generator(6)
    data, scales = random_packed(g, "q4_1", n, 64, 16)
    x = torch.randn(13, 64, generator=g)
    for isa in _C.isas():
        _C.set_isa(isa)
        gate, up = quant_matmul(x, data, scales, "q4_1", n).chunk(2, dim=-1)
        y = quant_matmul(x, data, scales, "q4_1", n, gated=gated)
        torch.testing.assert_close(y, gated_activation(gate, up, gated), rtol=1e-5, atol=1e-5)
        assert torch.equal(quant_matmul(x[5:6], data, scales, "q4_1", n, gated=gated), y[5:6])


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", ["q4_1", "q6_k", "fp8", "bf16", "f32"])
def test_what_follows_a_product_rounds_where_separate_ops_would(
    format: str, dtype: torch.dtype
) -> None:
    dtype = layout.DENSE.get(format, dtype)
    mode, g = QUANT_FORMATS[format].modes[0], generator(2)
    x, residual = torch.randn(2, 5, 256, generator=g).to(dtype), torch.randn(2, 5, 70, generator=g)
    data, scales = random_packed(g, format, 70, 256, 16)
    bias = torch.randn(70, generator=g)
    plain = quant_matmul(x, data, scales, format, 70, bias, mode)
    added = quant_matmul(x, data, scales, format, 70, bias, mode, residual=residual)
    near = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-4}  # of one backend or of two
    torch.testing.assert_close(added, residual + plain.float(), **near)
    gate, up = plain.chunk(2, dim=-1)
    silu = quant_matmul(x, data, scales, format, 70, bias, mode, gated="silu")
    torch.testing.assert_close(silu, swiglu(gate, up), **near)
    gelu = quant_matmul(x, data, scales, format, 70, bias, mode, gated="gelu_tanh")
    want = gated_activation(gate.float(), up.float(), "gelu_tanh").to(dtype)
    torch.testing.assert_close(gelu, want, **near)


def test_compiled_and_eager_calls_agree_with_options() -> None:
    g = generator(3)
    data, scales = random_packed(g, "q4_0", 32, 64, 16)
    residual = torch.randn(3, 32, generator=g)

    def loss(x: Tensor, residual: Tensor) -> Tensor:
        a = quant_matmul(x, data, scales, "q4_0", 32, gated="silu")
        b = quant_matmul(x, data, scales, "q4_0", 32, residual=residual)
        return a.square().sum() + b.square().sum()

    def gradients(fn: Any) -> list[Tensor]:
        leaves = torch.randn(3, 64, generator=generator(4)), residual.clone()
        for leaf in leaves:
            leaf.requires_grad_()
        return list(torch.autograd.grad(fn(*leaves), leaves))

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for a, b in zip(gradients(loss), gradients(compiled), strict=True):
        assert torch.equal(a, b)


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
        ({"activation": "fp8"}, "activation"),
        ({"format": "q4"}, "format"),
        ({"gated": "gelu"}, "gated"),
        ({"gated": "silu", "out_dtype": torch.bfloat16}, "out_dtype"),
        ({"gated": "silu", "residual": torch.zeros(2, 20)}, "residual"),
        ({"residual": torch.zeros(2, 19)}, "residual"),
        ({"residual": torch.zeros(2, 20).bfloat16()}, "residual"),
        ({"residual": torch.zeros(2, 20), "out_dtype": torch.bfloat16}, "out_dtype"),
    ]:
        arguments = {"x": x, "data": data, "scales": scales, "format": "q4_1", "n": 20} | change
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            quant_matmul(**arguments)
    odd = random_packed(generator(), "q4_1", 19, 64, 16)
    with pytest.raises(ValueError, match=r"\bn is 19"):
        quant_matmul(x, *odd, "q4_1", 19, gated="silu")
    fp8 = random_packed(generator(), "fp8", 20, 64, 16)
    with pytest.raises(ValueError, match=r"activation 'int8'.*use fp8, bf16, fp32"):
        quant_matmul(x, *fp8, "fp8", 20)
