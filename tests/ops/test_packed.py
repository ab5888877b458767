"""Packing: every format against the gguf package's own dequantization, and there and back."""

from __future__ import annotations

import gguf
import pytest
import torch

from fastllm import _C
from fastllm.ops import packed_layout as layout
from fastllm.ops import quant_embedding
from fastllm.ops.pages import Arena
from fastllm.quantize.gguf_blocks import QUANTIZED_FORMATS, block_type, row_bytes
from fastllm.quantize.packed import (
    PackedWeight,
    concat,
    pack,
    pack_ref,
    repack_,
    rows_per_group,
    unpack,
)
from fastllm.testing.opinfo import generator

SIZES = [(1, 32), (16, 64), (17, 96), (100, 64)]


def _blocks(format: str, n: int, k: int, seed: int = 0) -> torch.Tensor:
    """Random bytes as GGUF rows, scales made finite."""
    rows = torch.randint(0, 256, (n, row_bytes(format, k)), generator=generator(seed))
    rows = rows.to(torch.uint8)
    kind = block_type(format)
    starts = {"q4_1": (0, 2), "q5_1": (0, 2), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,)}
    for start in starts.get(format, (0,)):
        rows[:, start + 1 :: kind.nbytes] &= 0xBF  # clears an exponent bit: neither inf nor NaN
    return rows


def _columns(format: str, k: int) -> int:
    """k, or as many blocks of a K-quant."""
    return k // 32 * 256 if format.endswith("_k") else k


@pytest.mark.parametrize("format", QUANTIZED_FORMATS)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_unpack_equals_the_gguf_package(format: str, n: int, k: int) -> None:
    k = _columns(format, k)
    rows = _blocks(format, n, k)
    kind = gguf.GGMLQuantizationType[format.upper()]
    want = torch.from_numpy(gguf.dequantize(rows.numpy(), kind))
    packed = pack(format, rows, n, k)
    assert packed.rows_per_group == rows_per_group("cpu") == 16
    assert torch.equal(unpack(packed), want)
    assert torch.equal(unpack(pack_ref(format, rows, n, k, 1)), want)
    ids = torch.arange(n)
    assert torch.equal(quant_embedding(ids, packed.data, packed.scales, format, n), want)


def _same(a: PackedWeight, b: PackedWeight) -> bool:
    return torch.equal(a.data, b.data) and torch.equal(a.scales, b.scales) and a.n == b.n


@pytest.mark.parametrize("format", (*QUANTIZED_FORMATS, *layout.DENSE))
@pytest.mark.parametrize("counts", [(16, 32, 5), (7, 20, 3), (1,)])
def test_concat_equals_packing_all_rows(format: str, counts: tuple[int, ...]) -> None:
    k = _columns(format, 64)
    if format in layout.DENSE:
        parts = [torch.randn(n, k, generator=generator(n)) for n in counts]
    else:
        parts = [_blocks(format, n, k, seed=n) for n in counts]
    whole = pack(format, torch.cat(parts), sum(counts), k)
    packs = [pack(format, rows, n, k) for rows, n in zip(parts, counts, strict=True)]
    assert _same(concat(packs), whole)
    assert _same(whole, pack_ref(format, torch.cat(parts), sum(counts), k, 16))


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_weights_are_rounded_once_and_padded_with_zeros(source: torch.dtype) -> None:
    w = torch.randn(19, 33, generator=generator()).to(source)
    for format, dtype in layout.DENSE.items():
        packed = pack(format, w[:, 1:32:2], 19, 16)
        assert torch.equal(unpack(packed), w[:, 1:32:2].to(dtype).float())
        odd = pack(format, w, 19, 33)
        assert _same(odd, pack_ref(format, w, 19, 33, 16))
        assert odd.nbytes == 32 * (34 * 2 if format == "bf16" else 33 * 4)


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isa", _C.isas())
def test_dense_weights_are_packed_alike_at_every_level(source: torch.dtype, isa: str) -> None:
    _C.set_isa(isa)
    for n, k in ((1, 1), (16, 8), (17, 3), (35, 70), (33, 515)):
        w = torch.randn(n, k + 5, generator=generator(k)).to(source)[:, 2 : k + 2]
        for format in layout.DENSE:
            want, packed = pack_ref(format, w, n, k, 16), pack(format, w, n, k)
            assert _same(packed, want), (format, n, k)
            packed.data.fill_(7)
            repack_(packed, w)
            assert _same(packed, want), (format, n, k)


def test_an_arena_changes_nothing_but_where_the_bytes_lie() -> None:
    arena = Arena(chunk_bytes=4096)
    for format in (*QUANTIZED_FORMATS, *layout.DENSE):
        k = _columns(format, 64)
        if format in layout.DENSE:
            rows = torch.randn(32, k, generator=generator())
        else:
            rows = _blocks(format, 32, k)
        packed = pack(format, rows, 32, k)
        inside = pack(format, rows, 32, k, arena=arena)
        assert inside.data.data_ptr() % 64 == 0
        assert _same(inside, packed)
        assert _same(concat([inside, inside], arena), concat([packed, packed]))


def test_bits_per_weight() -> None:
    assert pack("q4_1", _blocks("q4_1", 32, 64), 32, 64).bits_per_weight == 5.0
    assert pack("q4_0", _blocks("q4_0", 32, 64), 32, 64).bits_per_weight == 4.5
    assert pack("q8_0", _blocks("q8_0", 32, 64), 32, 64).bits_per_weight == 8.5


def test_bad_arguments_are_named() -> None:
    rows = _blocks("q4_0", 4, 64)
    for arguments, name in [
        (("q7_k", rows, 4, 64), "format"),
        (("int8", rows, 4, 64), "format"),
        (("q6_k", rows, 4, 64), "multiple of 256"),
        (("q4_0", rows, 5, 64), "rows"),
        (("q4_0", rows, 4, 48), "multiple of 32"),
        (("q8_0", rows, 4, 64), "rows"),
        (("bf16", rows, 4, 64), "rows"),
        (("q4_0", rows, -4, 64), "n"),
        (("q4_0", rows, 4, 64, "meta"), "device"),
    ]:
        with pytest.raises(ValueError, match=name):
            pack(*arguments)
    with pytest.raises(ValueError, match="empty"):
        concat([])
    with pytest.raises(ValueError, match="differ"):
        concat([pack("q4_0", rows, 4, 64), pack("f32", torch.zeros(4, 64), 4, 64)])
