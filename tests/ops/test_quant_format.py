"""The table of formats, and packed weights of every one of them: there and back, and by hand."""

from __future__ import annotations

from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

from fastllm.ops import packed_layout as layout
from fastllm.ops.quant_format import (
    ALIASES,
    NF4_INT8,
    NF4_TABLE,
    QUANT_FORMATS,
    QuantFormat,
    fit,
    format_of,
)
from fastllm.quantize.gguf_blocks import QUANTIZED_FORMATS, block_type, dequantize
from fastllm.quantize.packed import (
    PackedWeight,
    canonical,
    concat,
    from_canonical,
    gguf_rows,
    pack,
    pack_codes,
    pack_ref,
    unpack,
)
from fastllm.testing.opinfo import generator
from fastllm.testing.packed_weights import random_packed, random_scales

CODED = tuple(f for f in layout.QUANTIZED if f not in QUANTIZED_FORMATS)


def columns(format: str, blocks: int = 1) -> int:
    """K of so many of the smallest rows that the format takes."""
    return QUANT_FORMATS[format].multiple * blocks


def random_weight(format: str, n: int, k: int) -> PackedWeight:
    data, scales = random_packed(generator(n), format, n, k, 16)
    return PackedWeight(data, scales, format, n, k)


def test_codes_of_formats_are_those_of_the_native_core() -> None:
    assert layout.FORMATS == (
        "q4_0", "q4_1", "q8_0", "bf16", "f32", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k",
        "int4_g32", "int4_g64", "int4_g128", "int4_asym_g32", "int4_asym_g64", "int4_asym_g128",
        "int8", "nf4", "nf4_dq", "fp8", "fp8_block",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "k", "bits"),
    [
        ("q4_0", 4096, 4.5), ("q4_1", 4096, 5.0), ("q5_0", 4096, 5.5), ("q5_1", 4096, 6.0),
        ("q8_0", 4096, 8.5), ("q4_k", 4096, 4.625), ("q5_k", 4096, 5.625), ("q6_k", 4096, 6.5625),
        ("int4", 4096, 4.125), ("int4_g32", 4096, 4.5), ("int4_asym_g64", 4096, 4.5),
        ("int8", 4096, 8 + 32 / 4096), ("nf4", 4096, 4.5), ("nf4_dq", 4096, 4.125 + 32 / 4096),
        ("nf4_dq", 64, 5.0), ("fp8", 4096, 8 + 32 / 4096), ("fp8_block", 4096, 8.25),
        ("fp8_block", 160, 8 + 64 / 160), ("bf16", 4096, 16.0), ("f32", 4096, 32.0),
    ],
)  # fmt: skip
def test_bits_per_weight_count_the_scales(name: str, k: int, bits: float) -> None:
    format = format_of(name)
    assert format.bits_per_weight(k) == bits
    if not format.dense:
        data, scales = random_packed(generator(), format.name, 32, k, 16)
        assert 8 * (data.nbytes + scales.nbytes) / (32 * k) == bits
    assert format.bits_per_weight(0) == format.bits


def test_a_format_that_does_not_fit_falls_to_one_that_does() -> None:
    falls = {
        ("q4_k", 576): "q5_0", ("q5_k", 576): "q5_1", ("q6_k", 576): "q8_0", ("q4_k", 512): "q4_k",
        ("int4", 576): "int4_g64", ("int4", 96): "int4_g32", ("int4_asym", 96): "int4_asym_g32",
        ("nf4", 96): "int4_g32", ("nf4_dq", 32): "int4_g32", ("nf4", 576): "nf4",
        ("q4_0", 33): "bf16", ("q6_k", 40): "bf16", ("fp8_block", 160): "fp8_block",
        ("fp8", 40): "bf16", ("bf16", 7): "bf16", ("f32", 7): "f32",
    }  # fmt: skip
    assert {key: fit(*key) for key in falls} == falls
    for name, format in QUANT_FORMATS.items():
        for k in (1, 32, 64, 96, 128, 160, 192, 256, 320):
            assert k % QUANT_FORMATS[fit(name, k)].multiple == 0
        assert fit(name, format.multiple) == name


def test_names_are_found_and_unknown_ones_get_the_nearest() -> None:
    assert format_of("Q4_K").name == "q4_k"
    assert {alias: format_of(alias).name for alias in ALIASES} == ALIASES
    with pytest.raises(ValueError, match=r"'q4_K_M'.*did you mean.*q4_k"):
        format_of("q4_K_M")
    with pytest.raises(ValueError, match="formats are q4_0, "):
        format_of("?")
    with pytest.raises(ValueError, match="int4_g128"):
        layout.check_format("int4")


def test_modes_and_what_a_models_activation_means() -> None:
    assert format_of("fp8").mode("int8") == format_of("fp8_block").mode("int8") == "fp8"
    assert format_of("fp8").mode("bf16") == "bf16" and format_of("nf4").mode("int8") == "int8"
    assert format_of("q4_k").modes == ("int8", "bf16", "fp32")
    assert format_of("bf16").modes == ("bf16",)


def test_nf4_entries_are_exact_in_bfloat16_and_near_the_published_ones() -> None:
    table = torch.tensor(NF4_TABLE)
    assert torch.equal(table, table.bfloat16().float())
    # quantiles of a normal distribution: 8 for the negatives, 9 for the positives, 0 in both
    normal, offset = torch.distributions.Normal(0, 1), 0.9677083
    high = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    low = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    exact = torch.cat([low, torch.zeros(1), high.flip(0)]) / normal.icdf(torch.tensor(offset))
    assert ((table - exact).abs() <= 2**-9).all()
    assert torch.equal(torch.tensor(NF4_INT8), (127 * table).round().int())


def by_hand(format: QuantFormat, codes: Tensor, parts: list[Tensor]) -> Tensor:
    """float32 values of stored codes [n, k], column by column as the table defines them."""
    n, k = codes.shape
    out = torch.empty(n, k)
    parts = [p.float() for p in parts]
    for c in range(k):
        code = codes[:, c]
        if format.codes == "unsigned":
            v = code.float() - format.offset
        elif format.codes == "int8":
            v = torch.where(code > 127, code.float() - 256, code.float())
        elif format.codes == "e4m3":
            v = code.view(torch.float8_e4m3fn).float()
        else:
            v = torch.tensor([NF4_TABLE[u] for u in code.tolist()])
        m = torch.zeros(n)
        if format.scales == "super_min":
            b, s = c // 256, c % 256 // 32
            d = parts[0][:, b, 0] * parts[2][:, b, 2 * s]
            m = -(parts[1][:, b, 0] * parts[2][:, b, 2 * s + 1])
        elif format.scales == "super":
            d = parts[0][:, c // 256, 0] * parts[1][:, c // 256, c % 256 // 16]
        elif format.scales == "double":
            d = parts[0][:, 0, 0] * parts[1][:, 0, c // 64]
        else:
            record = parts[0][:, c // format.group if format.group else 0]
            d = record[:, 0]
            if format.scales == "half_min":
                m = record[:, 1]
            elif format.scales == "half_zero":
                m = -(d * record[:, 1])
        out[:, c] = v * d + m
    return out


@pytest.mark.parametrize("per_group", [1, 16])
@pytest.mark.parametrize("format", layout.QUANTIZED)
def test_values_and_codes_come_back_from_both_layouts(format: str, per_group: int) -> None:
    kind = QUANT_FORMATS[format]
    for n, k in ((1, columns(format)), (19, columns(format, 3)), (32, columns(format, 2))):
        g = generator(n)
        codes = torch.randint(0, 1 << kind.bits, (n, k), generator=g).to(torch.uint8)
        if kind.codes == "e4m3":
            codes = torch.where(codes & 127 == 127, codes - 1, codes)
        parts = random_scales(g, format, n, k)
        data, scales = layout.pack_parts(codes, parts, format, per_group)
        layout.check_packed(data, scales, format, n, k)
        assert layout.rows_of(data, format) == per_group
        assert layout.columns_of(data, format) == k
        assert torch.equal(layout.stored_codes(data, format, n), codes)
        for found, part in zip(layout.split_scales(scales, format, n, k), parts, strict=True):
            assert torch.equal(found, part)
        want = by_hand(kind, codes, parts)
        assert torch.equal(layout.dequantize(data, scales, format, n, k), want)
        words = layout.stored_codes(torch.zeros_like(data), format, n)
        assert not words.any()
        padding = layout.deinterleave(data, data.shape[0] * per_group)[n:]
        assert not padding.any(), "rows beyond n are zero bytes"


def test_the_bits_of_words_lie_as_the_layout_says() -> None:
    """One set bit of one code at a time, with one row: where its byte is, and which bit of it."""

    def place(format: str, column: int, bit: int) -> tuple[int, int, int]:
        codes = torch.zeros(1, columns(format), dtype=torch.uint8)
        codes[0, column] = 1 << bit
        words = layout.code_words(codes, format)[0, column // 32]
        (word, byte), value = words.nonzero()[0].tolist(), int(words.sum())
        assert value & (value - 1) == 0
        return word, byte, value.bit_length() - 1

    for format in ("q4_0", "q5_0", "q6_k"):
        assert place(format, 0, 3) == (0, 0, 3)
        assert place(format, 7, 0) == (1, 3, 0)
        assert place(format, 16 + 13, 2) == (3, 1, 6)
    assert place("q5_0", 4 * 2 + 1, 4) == (4, 1, 2)
    assert place("q5_1", 16 + 4 * 3 + 2, 4) == (4, 2, 7)
    assert place("q6_k", 4 * 3 + 1, 5) == (4, 1, 7)
    assert place("q6_k", 16 + 4 * 1 + 3, 4) == (5, 3, 2)
    assert place("q8_0", 4 * 6 + 3, 7) == place("fp8", 27, 7) == (6, 3, 7)


@pytest.mark.parametrize("format", layout.FORMATS)
def test_canonical_form_and_back(format: str) -> None:
    for n, k in ((1, columns(format)), (35, columns(format, 2))):
        k += 1 if format == "bf16" else 0
        packed = random_weight(format, n, k)
        data, scales = canonical(packed)
        assert data.shape[0] == n and layout.rows_of(data, format) == 1
        again = from_canonical(format, data, scales, n, k)
        assert torch.equal(again.data, packed.data) and torch.equal(again.scales, packed.scales)
        one = PackedWeight(data, scales, format, n, k)
        assert torch.equal(unpack(one), unpack(packed))
        for wrong in (data[:, 1:], packed.data, data.flatten()):
            with pytest.raises(ValueError, match="data"):
                from_canonical(format, wrong, scales, n, k)
        if format in layout.QUANTIZED:
            with pytest.raises(ValueError, match="scales"):
                from_canonical(format, data, scales[..., :-1], n, k)


def random_rows(format: str, n: int, k: int, seed: int = 0) -> Tensor:
    """Random bytes as GGUF rows, scales made finite."""
    kind = block_type(format)
    rows = torch.randint(0, 256, (n, k // kind.values * kind.nbytes), generator=generator(seed))
    rows = rows.to(torch.uint8)
    for start in (
        (208,) if format == "q6_k" else (0,) if format in ("q4_0", "q5_0", "q8_0") else (0, 2)
    ):
        rows[:, start + 1 :: kind.nbytes] &= 0xBF
    return rows


@pytest.mark.parametrize("format", QUANTIZED_FORMATS)
def test_gguf_blocks_come_back_and_mean_what_the_gguf_package_says(format: str) -> None:
    for n, k in ((1, columns(format)), (18, columns(format, 3))):
        rows = random_rows(format, n, k, seed=n)
        packed = pack(format, rows, n, k)
        assert torch.equal(gguf_rows(packed), rows)
        assert torch.equal(gguf_rows(pack_ref(format, rows, n, k, 1)), rows)
        kind = gguf.GGMLQuantizationType[format.upper()]
        want = torch.from_numpy(gguf.dequantize(rows.numpy(), kind))
        assert torch.equal(unpack(packed), want)
        assert torch.equal(dequantize(format, rows), want)
    with pytest.raises(ValueError, match="GGUF has no format 'int8'"):
        gguf_rows(random_weight("int8", 2, 32))


def coded(format: str, n: int, k: int) -> dict[str, Any]:
    """Arguments of pack_codes."""
    kind, g = QUANT_FORMATS[format], generator(n)
    codes = torch.randint(0, 1 << kind.bits, (n, k), generator=g).to(torch.uint8)
    if kind.codes == "int8":
        codes = codes.view(torch.int8)
    if kind.codes == "e4m3":
        codes = torch.where(codes & 127 == 127, codes - 1, codes).view(torch.float8_e4m3fn)
    groups = kind.scale_records(k)
    scales: Any = torch.randn(n, groups, generator=g).to(kind.scale_dtype)
    zeros = None
    if kind.scales == "double":
        bytes_ = torch.randint(0, 256, (n, k // 64), generator=g).to(torch.uint8)
        scales = (bytes_, torch.rand(n, generator=g))
    if kind.scales == "half_zero":
        zeros = torch.randint(0, 16, (n, groups), generator=g)
    return {"format": format, "codes": codes, "scales": scales, "zeros": zeros}


@pytest.mark.parametrize("format", CODED)
def test_packing_codes_keeps_codes_and_scales(format: str) -> None:
    kind = QUANT_FORMATS[format]
    n, k = 21, columns(format, 5)
    given = coded(format, n, k)
    packed = pack_codes(**given)
    assert (packed.format, packed.n, packed.k, packed.rows_per_group) == (format, n, k, 16)
    codes = given["codes"]
    assert torch.equal(
        layout.stored_codes(packed.data, format, n), codes.contiguous().view(torch.uint8)
    )
    d, m = layout.block_scales(packed.scales, format, n, k)
    if isinstance(given["scales"], tuple):
        bytes_, row = given["scales"]
        assert torch.equal(d, bytes_.float() * row[:, None])
    else:
        assert torch.equal(d, given["scales"].float())
    if kind.scales == "half_zero":
        assert m is not None
        assert torch.equal(m, -(d * given["zeros"]))


def test_what_cannot_be_packed_from_codes_is_named() -> None:
    good = coded("int4_asym_g32", 4, 64)
    for change, name in [
        ({"format": "q4_0"}, "format"),
        ({"format": "bf16"}, "format"),
        ({"format": "int5"}, "format"),
        ({"format": "int4_g32"}, "zeros"),
        ({"codes": torch.zeros(4, 64)}, "codes"),
        ({"codes": torch.full((4, 64), 16, dtype=torch.uint8)}, "codes.*below 16"),
        ({"codes": torch.zeros(4, 40, dtype=torch.uint8)}, "codes.*multiple of 32"),
        ({"scales": torch.zeros(4, 3)}, "scales"),
        ({"scales": torch.zeros(4, 2, dtype=torch.int32)}, "scales"),
        ({"scales": torch.full((4, 2), 1e6)}, "scales.*too large"),
        ({"scales": (torch.zeros(4, 2), torch.zeros(4))}, "scales"),
        ({"zeros": None}, "zeros"),
        ({"zeros": torch.full((4, 2), 16)}, "zeros"),
        ({"zeros": torch.full((4, 2), 7.5)}, "zeros.*integers"),
        ({"zeros": torch.zeros(4, 1)}, "zeros"),
        ({"device": "meta"}, "device"),
    ]:
        with pytest.raises(ValueError, match=name):
            pack_codes(**{**good, **change})
    double = coded("nf4_dq", 4, 128)
    groups, row = double["scales"]
    for scales in (groups, (groups.int(), row), (groups[:, :1], row), (groups, row[:3])):
        with pytest.raises(ValueError, match="scales"):
            pack_codes(**(double | {"scales": scales}))


@pytest.mark.parametrize("format", CODED)
@pytest.mark.parametrize("counts", [(16, 32, 5), (7, 20, 3)])
def test_stacked_weights_are_the_weight_of_all_rows(format: str, counts: tuple[int, ...]) -> None:
    k = columns(format, 2)
    parts = [random_weight(format, n, k) for n in counts]
    whole = concat(parts)
    assert torch.equal(unpack(whole), torch.cat([unpack(part) for part in parts]))
    data, scales = (torch.cat(t) for t in zip(*map(canonical, parts), strict=True))
    want = from_canonical(format, data, scales, sum(counts), k)
    assert torch.equal(whole.data, want.data) and torch.equal(whole.scales, want.scales)
