"""Packing by the CPU core: every format, at every instruction set and thread count, bit for bit."""

from __future__ import annotations

import pytest
import torch

from fastllm import _C
from fastllm.ops import packed_layout as layout
from fastllm.ops.pages import Arena
from fastllm.quantize.gguf_blocks import row_bytes
from fastllm.quantize.gguf_codes import GGUF_FORMATS
from fastllm.quantize.packed import (
    PackedWeight,
    canonical,
    from_canonical,
    gguf_rows,
    pack,
    pack_ref,
)
from fastllm.testing.opinfo import generator
from fastllm.testing.packed_weights import random_packed, whole

ISAS = _C.isas()
SIZES = ((1, 32), (16, 256), (17, 96), (50, 544))  # stretches of 256 columns: whole, broken, none


def _same(a: PackedWeight, b: PackedWeight) -> bool:
    scales = (layout.as_type(t, torch.uint8) if t.numel() else t for t in (a.scales, b.scales))
    return torch.equal(a.data, b.data) and torch.equal(*scales)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", GGUF_FORMATS)
def test_file_blocks_are_packed_as_defined_and_come_back(format: str, isa: str) -> None:
    _C.set_isa(isa)
    for n, columns in SIZES:
        k = whole(format, columns)
        rows = torch.randint(0, 256, (n, row_bytes(format, k)), generator=generator(n))
        rows = rows.to(torch.uint8)
        want = pack_ref(format, rows, n, k, 16)
        assert _same(pack(format, rows, n, k), want)
        wide = torch.cat([rows, rows], 1)[:, : rows.shape[1]]  # rows with a stride
        assert _same(pack(format, wide, n, k), want)
        assert torch.equal(gguf_rows(want), rows)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", layout.FORMATS)
def test_canonical_weights_are_packed_and_come_back(format: str, isa: str) -> None:
    _C.set_isa(isa)
    arena = Arena(chunk_bytes=1 << 20)
    for n, columns in SIZES:
        k = whole(format, columns + (format in layout.DENSE))
        one = PackedWeight(*random_packed(generator(n), format, n, k, 1), format, n, k)
        many = PackedWeight(*random_packed(generator(n), format, n, k, 16), format, n, k)
        assert _same(from_canonical(format, one.data, one.scales, n, k), many)
        assert _same(from_canonical(format, one.data, one.scales, n, k, arena=arena), many)
        assert _same(PackedWeight(*canonical(many), format, n, k), one)


@pytest.mark.parametrize("format", layout.FORMATS)
def test_padding_rows_are_zero_bytes(format: str) -> None:
    k = whole(format, 64)
    one = random_packed(generator(3), format, 5, k, 1)
    packed = from_canonical(format, *one, 5, k)
    padding = packed.data.movedim(2 if format == "f32" else -2, 0)[5:]
    assert not padding.any()
    again = from_canonical(format, *one, 5, k)
    assert _same(packed, again)


def test_threads_change_no_byte() -> None:
    for format in ("q5_k", "q6_k", "nf4_dq"):
        one = random_packed(generator(4), format, 100, 512, 1)
        packs = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            packs.append(from_canonical(format, *one, 100, 512))
        assert _same(*packs)
        for data, scales in (canonical(packs[0]),):
            assert torch.equal(data, one[0])
            bytes_of = (layout.as_type(t, torch.uint8) for t in (scales, one[1]))
            assert torch.equal(*bytes_of)


def test_the_core_checks_what_it_is_given() -> None:
    data, scales = random_packed(generator(5), "q6_k", 4, 256, 16)
    index = layout.FORMATS.index("q6_k")
    rows = torch.zeros(4, 210, dtype=torch.uint8)
    _C.unpack_blocks(rows, data, scales, index, 4, 256)
    for call, message in (
        (lambda: _C.unpack_blocks(rows[:, 1:], data, scales, index, 4, 256), "rows"),
        (lambda: _C.unpack_blocks(rows[:, :209].clone(), data, scales, index, 4, 256), "blocks"),
        (lambda: _C.pack(data, scales, rows[:3], index, 4, 256), "rows"),
        (lambda: _C.pack(data, scales[:, :, 1:].clone(), rows, index, 4, 256), "scales"),
        (lambda: _C.pack_rows(data, scales, data, scales, index, 4, 256), "shape"),
        (lambda: _C.pack(data, scales, rows, 99, 4, 256), "format"),
        (
            lambda: _C.pack(
                *random_packed(generator(6), "nf4", 4, 256, 16), rows,
                layout.FORMATS.index("nf4"), 4, 256,
            ),
            "GGUF",
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
