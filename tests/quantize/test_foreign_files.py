"""Layouts of other libraries' checkpoints: read exactly, written back bit for bit, refused by name.

The files are made here one code at a time, from what each library's reader computes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from fastllm.ops import packed_layout as layout
from fastllm.ops.quant_format import format_of
from fastllm.quantize import (
    awq_files,
    bitsandbytes_files,
    compressed_tensors,
    fastllm_files,
    gptq_files,
)
from fastllm.quantize.coded import CodedWeight, coded
from fastllm.quantize.packed import PackedWeight, canonical, from_canonical, unpack

N, K = 32, 256
AWQ_ROWS = (0, 2, 4, 6, 1, 3, 5, 7)


def random(*shape: int, top: int = 16, seed: int = 0) -> Tensor:
    return torch.randint(0, top, shape, generator=torch.Generator().manual_seed(seed))


def scales_of(n: int, groups: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return (torch.rand(n, groups, generator=torch.Generator().manual_seed(9)) * 0.02 + 0.001).to(
        dtype
    )


def words(codes: Tensor, bits: int) -> Tensor:
    """int32 words of consecutive codes along the last dimension, the first one lowest."""
    count = 32 // bits
    parts = codes.long().unflatten(-1, (-1, count)) << (bits * torch.arange(count))
    total = parts.sum(-1)
    return torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)


def gptq(
    codes: Tensor, zeros: Tensor, scales: Tensor, bits: int, version: int, g_idx: Tensor
) -> dict[str, Tensor]:
    """codes [n, k], zeros and scales [n, groups]."""
    stored = words(zeros.t(), bits)
    if version == 1:  # 1 less in every field, with what that borrows from the next
        ones = sum(1 << (bits * i) for i in range(32 // bits))
        stored = stored - ones
    return {
        "qweight": words(codes, bits).t().contiguous(),
        "qzeros": stored,
        "scales": scales.t().contiguous(),
        "g_idx": g_idx.int(),
    }


def test_gptq_is_read_exactly_and_written_back() -> None:
    for group in (32, 64, 128, K):
        groups = K // group
        g_idx = torch.arange(K) // group
        for bits, version in ((4, 1), (4, 2), (8, 1), (8, 2)):
            codes, scales = random(N, K, top=1 << bits), scales_of(N, groups)
            middle = torch.full((N, groups), 1 << (bits - 1))
            for zeros in (middle, random(N, groups, seed=1)):
                if bits == 8 and zeros is not middle:
                    continue
                files = gptq(codes, zeros, scales, bits, version, g_idx)
                read = gptq_files.from_files(files, version=version)
                expected = scales.float()[:, g_idx] * (codes - zeros[:, g_idx])
                assert torch.equal(read.values(), expected)
                again = gptq_files.to_files(read, version=version)
                assert torch.equal(gptq_files.from_files(again, version=version).values(), expected)
                if (group < K or groups == 1) and read.scales.shape[1] == groups:
                    assert all(torch.equal(again[name], files[name]) for name in files)


def test_gptq_columns_in_any_order_come_out_with_their_order() -> None:
    codes, scales, zeros = random(N, K), scales_of(N, 4), random(N, 4, seed=1)
    g_idx = (torch.arange(K) // 64)[torch.randperm(K, generator=torch.Generator().manual_seed(2))]
    files = gptq(codes, zeros, scales, 4, 1, g_idx)
    read = gptq_files.from_files(files)
    assert read.order is not None and read.format == "int4_asym_g64"
    assert torch.equal(read.values(), scales.float()[:, g_idx] * (codes - zeros[:, g_idx]))
    again = gptq_files.to_files(read)
    assert all(torch.equal(again[name], files[name]) for name in files)
    with pytest.raises(ValueError, match="g_idx does not put 64 columns in each of 4 groups"):
        gptq_files.from_files(files | {"g_idx": torch.zeros(K, dtype=torch.int32)})


def awq(codes: Tensor, zeros: Tensor, scales: Tensor) -> dict[str, Tensor]:
    order = [8 * word + row for word in range(N // 8) for row in AWQ_ROWS]
    return {
        "qweight": words(codes.t()[:, order], 4),
        "qzeros": words(zeros.t()[:, order], 4),
        "scales": scales.t().contiguous(),
    }


def test_awq_is_read_exactly_and_written_back() -> None:
    for group in (32, 64, 128, K):
        codes, scales = random(N, K), scales_of(N, K // group)
        zeros = random(N, K // group, seed=1)
        files = awq(codes, zeros, scales)
        read = awq_files.from_files(files)
        g = torch.arange(K) // group
        assert torch.equal(read.values(), scales.float()[:, g] * (codes - zeros[:, g]))
        if group < K:
            again = awq_files.to_files(read)
            assert all(torch.equal(again[name], files[name]) for name in files)


def nf4(codes: Tensor, absmax: Tensor, **more: object) -> dict[str, Tensor]:
    n, k = codes.shape
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [n, k], **more}
    pairs = codes.reshape(-1, 2)
    return {
        "weight": (16 * pairs[:, :1] + pairs[:, 1:]).to(torch.uint8),
        "absmax": absmax,
        "quant_map": torch.tensor(bitsandbytes_files.TABLE),
        bitsandbytes_files.STATE: torch.tensor(list(json.dumps(state).encode())).to(torch.uint8),
    }


def test_nf4_codes_and_scales_are_read_exactly_and_the_table_to_bfloat16() -> None:
    codes, absmax = random(N, K), scales_of(N * K // 64, 1, torch.float32).flatten()
    files = nf4(codes, absmax)
    read = bitsandbytes_files.from_files(files)
    assert read.format == "nf4" and torch.equal(read.codes, codes.to(torch.uint8))
    spread = absmax.view(N, -1).repeat_interleave(64, 1)
    table = torch.tensor(bitsandbytes_files.TABLE)
    assert torch.equal(read.values(), table.bfloat16().float()[codes] * spread)
    assert bool(((read.values() - table[codes] * spread).abs() <= spread * 2**-9).all())
    again = bitsandbytes_files.to_files(read)
    assert all(torch.equal(again[f"weight.{n}".replace("weight.weight", "weight")], files[n])
               for n in files)  # fmt: skip


def test_nested_nf4_scales_are_expanded_with_two_roundings() -> None:
    count = N * K // 64
    codes, indices = random(N, K), random(count, top=256, seed=4)
    table = torch.linspace(-1, 1, 256) ** 3
    outer = torch.rand(-(-count // 100), generator=torch.Generator().manual_seed(5))
    files = nf4(codes, indices.to(torch.uint8), nested_blocksize=100, nested_offset=0.0173,
                nested_dtype="float32")  # fmt: skip
    files |= {"nested_absmax": outer, "nested_quant_map": table}
    read = bitsandbytes_files.from_files(files)
    expected = table[indices] * outer[torch.arange(count) // 100] + torch.tensor(0.0173)
    assert torch.equal(read.scales.flatten(), expected)
    one = nf4(codes, indices.to(torch.uint8), nested_blocksize=10**30, nested_offset=0)
    one |= {"nested_absmax": outer[:1], "nested_quant_map": table}
    read = bitsandbytes_files.from_files(one)  # a block that no memory holds is all there is
    assert torch.equal(read.scales.flatten(), table[indices] * outer[0])


def packed_ct(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> dict[str, Tensor]:
    files = {
        "weight_packed": words(codes, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(codes.shape),
    }
    if zeros is not None:
        files["weight_zero_point"] = words(zeros.t(), bits).t().contiguous()
    return files


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_packed_compressed_tensors_are_read_exactly_and_written_back(dtype: torch.dtype) -> None:
    for group in (32, 64, 128, K):
        g = torch.arange(K) // group
        scales = scales_of(N, K // group, dtype)
        for bits, zeros in ((4, None), (4, random(N, K // group, seed=1)), (8, None)):
            codes = random(N, K, top=1 << bits)
            files = packed_ct(codes, scales, zeros, bits)
            read = compressed_tensors.from_files(files)
            middle = torch.full((N, K // group), 1 << (bits - 1)) if zeros is None else zeros
            expected = scales.float()[:, g] * (codes - middle[:, g])
            assert torch.equal(read.values(), expected)
            again = compressed_tensors.to_files(read)
            assert torch.equal(compressed_tensors.from_files(again).values(), expected)
            if read.scales.shape == scales.shape:
                assert set(again) == set(files)
                for name in files:
                    assert torch.equal(again[name].to(files[name].dtype), files[name]), name


def test_one_scale_may_serve_a_row_or_a_whole_matrix() -> None:
    codes = random(N, K, top=256).sub(128).to(torch.int8)
    for scales in (scales_of(N, 1, torch.float32), scales_of(1, 1).flatten()):
        files = {"weight": codes, "weight_scale": scales}
        read = compressed_tensors.from_files(files)
        assert read.format == "int8"
        assert torch.equal(read.values(), scales.float().reshape(-1, 1) * codes)


def test_fp8_by_row_by_matrix_by_group_and_by_block() -> None:
    bytes_ = random(200, K, top=256).to(torch.uint8)
    bytes_[(bytes_ & 127) == 127] = 0
    codes = bytes_.view(torch.float8_e4m3fn)
    rows, columns = torch.arange(200), torch.arange(K)
    for shape, format, index in (
        ((200, 1), "fp8", (rows[:, None], 0)),
        ((1,), "fp8", (0,)),
        ((200, 2), "fp8_block", (rows[:, None], columns // 128)),
        ((2, 2), "fp8_block", (rows[:, None] // 128, columns // 128)),
    ):
        for name in ("weight_scale", "weight_scale_inv"):
            scales = scales_of(*(*shape, 1)[:2], torch.float32).reshape(shape)
            read = compressed_tensors.from_files({"weight": codes, name: scales})
            assert read.format == format
            assert torch.equal(read.values(), codes.float() * scales[index])
            if shape != (200, 2):
                again = compressed_tensors.to_files(read)
                assert torch.equal(compressed_tensors.from_files(again).values(), read.values())
    powers = (random(2, 2, top=20, seed=3) + 110).to(torch.uint8).view(torch.float8_e8m0fnu)
    read = compressed_tensors.from_files({"weight": codes, "weight_scale_inv": powers})
    assert torch.equal(
        read.values(), codes.float() * powers.float()[rows[:, None] // 128, columns // 128]
    )


def random_weight(format: str, n: int) -> PackedWeight:
    kind, parts = format_of(format), []
    for dtype, count in kind.scale_fields(K):
        shape = n, kind.scale_records(K), count
        numbers = random(*shape, top=16)
        parts.append(numbers.to(dtype) if dtype.itemsize == 1 else (numbers + 1).to(dtype))
    codes = random(n, K, top=min(1 << kind.bits, 127)).to(torch.uint8)
    data, scales = layout.pack_parts(codes, parts, format, 16)
    return PackedWeight(data, scales, format, n, K)


def test_codes_survive_packing_and_our_own_layout() -> None:
    for format in ("q4_k", "q6_k", "q4_0", "int4_asym_g64", "nf4", "nf4_dq", "fp8_block", "int8"):
        packed = random_weight(format, 40)
        files = fastllm_files.to_files(*canonical(packed))
        assert {t.dtype for t in files.values()} == {torch.uint8}
        parts = fastllm_files.from_files(files, format)
        assert torch.equal(unpack(from_canonical(format, *parts, 40, K)), unpack(packed))
        if format in ("int4_asym_g64", "nf4", "fp8_block", "int8"):
            plain = coded(packed.data, packed.scales, format, 40, K)
            assert torch.equal(plain.values(), unpack(packed))
            data, scales = plain.canonical()
            assert torch.equal(data, canonical(packed)[0]) and torch.equal(
                scales, canonical(packed)[1]
            )


def test_scales_without_a_float16_are_refused_unless_nothing_depends_on_them() -> None:
    codes, scales = random(N, K), scales_of(N, 4, torch.float32)
    with pytest.raises(ValueError, match=r"scales, for example .* float16.*dequantize the check"):
        compressed_tensors.from_files(packed_ct(codes, scales, None, 4))
    scales = scales.half().float()
    scales[3, 1] = 1e-30
    codes[3, 64:128] = 8  # every value of the group is 0
    read = compressed_tensors.from_files(packed_ct(codes, scales, None, 4))
    assert torch.equal(read.values(), scales.repeat_interleave(64, 1) * (codes - 8))
    scales[3, 1] = 1e9
    codes[3, 64] = 9
    with pytest.raises(ValueError, match="1e\\+09"):
        compressed_tensors.from_files(packed_ct(codes, scales, None, 4))


Change = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]


def _with(**tensors: Tensor) -> Change:
    return lambda files: files | tensors


BAD: list[tuple[str, Change, str]] = [
    ("gptq", _with(scales=torch.full((4, N), float("nan"))), "scales hold NaN or infinity"),
    ("gptq", _with(scales=torch.ones(3, N)), "scales have shape"),
    ("gptq", _with(qzeros=torch.zeros(4, 3).int()), "not codes of 4 or 8 bits"),
    ("gptq", _with(qweight=torch.zeros(K // 8, N)), "qweight is torch.float32"),
    ("gptq", _with(g_idx=torch.zeros(3).int()), "g_idx has shape"),
    ("awq", _with(scales=torch.full((4, N), float("inf"))), "scales hold NaN or infinity"),
    ("awq", _with(scales=torch.ones(4, N + 8)), "no 4-bit weight of version 'gemm'"),
    ("awq", _with(qweight=torch.zeros(K, N // 8).long()), "qweight is torch.int64"),
    ("nf4", _with(absmax=torch.ones(7)), "7 scales for 128 blocks"),
    ("nf4", _with(absmax=torch.full((128,), float("nan"))), "NaN"),
    ("nf4", _with(absmax=torch.zeros(128).byte()), "nested_blocksize None"),
    ("nf4", _with(quant_map=torch.linspace(-1, 1, 16)), "not the table of NormalFloat-4"),
    ("nf4", _with(weight=torch.zeros(8, 1).byte()), "holds 16 codes"),
    ("ct", _with(weight_scale=torch.full((N, 4), float("nan"))), "NaN"),
    ("ct", _with(weight_scale=torch.ones(N, 3)), "does not divide"),
    ("ct", _with(weight_shape=torch.tensor([N, 4 * K])), "do not hold"),
    ("ct", _with(weight_packed=torch.zeros(N, 32).byte()), "weight_packed is torch.uint8"),
    ("ct", _with(weight_zero_point=torch.zeros(N, 4).int()), "weight_zero_point is"),
]


@pytest.mark.parametrize(("kind", "change", "message"), BAD)
def test_damaged_files_are_refused_by_the_name_of_the_tensor(
    kind: str, change: Change, message: str
) -> None:
    codes, scales, zeros = random(N, K), scales_of(N, 4), random(N, 4, seed=1)
    read: dict[str, tuple[dict[str, Tensor], Callable[[Mapping[str, Tensor]], CodedWeight]]] = {
        "gptq": (
            gptq(codes, zeros, scales, 4, 1, torch.arange(K) // 64),
            gptq_files.from_files,
        ),
        "awq": (awq(codes, zeros, scales), awq_files.from_files),
        "nf4": (nf4(codes, torch.ones(N * K // 64)), bitsandbytes_files.from_files),
        "ct": (packed_ct(codes, scales, None, 4), compressed_tensors.from_files),
    }
    files, reader = read[kind]
    reader(files)
    with pytest.raises(ValueError, match=message):
        reader(change(files))


def test_variants_without_a_format_are_refused_with_the_remedy() -> None:
    codes = random(N, K)
    with pytest.raises(ValueError, match=r"groups of 16 .*multiples of 32"):
        compressed_tensors.from_files(packed_ct(codes, scales_of(N, 16), None, 4))
    for change, message in (
        ({"blocksize": 128}, "blocksize is 128; 64 is supported"),
        ({"quant_type": "fp4"}, "'fp4'; 'nf4' is supported"),
        ({"shape": [N * 8, K // 8]}, "rows of 32 columns are not whole blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            bitsandbytes_files.from_files(nf4(codes, torch.ones(128), **change))
    eight = random(N, K, top=256)
    files = gptq(eight, torch.zeros(N, 4).long(), scales_of(N, 4), 8, 2, torch.arange(K) // 64)
    with pytest.raises(ValueError, match=r"zero points other than 128.*sym=True"):
        gptq_files.from_files(files, version=2)
    nan = torch.full((N, K), 127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="holds NaN"):
        compressed_tensors.from_files({"weight": nan, "weight_scale": torch.ones(1)})
    e5m2 = torch.zeros(N, K, dtype=torch.float8_e5m2)
    with pytest.raises(ValueError, match=r"float8_e5m2.*e4m3fn is supported"):
        compressed_tensors.from_files({"weight": e5m2, "weight_scale": torch.ones(1)})
    mixed = CodedWeight("fp8_block", torch.zeros(N, K).byte(), torch.rand(N, 2))
    with pytest.raises(ValueError, match="differ within 128 rows"):
        compressed_tensors.to_files(mixed)


def test_configurations_are_those_of_the_libraries() -> None:
    one = compressed_tensors.config({"a": "int4_g128", "b": "int4_g128"}, ["lm_head"])
    assert one["format"] == "pack-quantized" and one["ignore"] == ["lm_head"]
    group = one["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"] and group["weights"]["group_size"] == 128
    two = compressed_tensors.config({"a": "fp8_block", "b": "int4_asym_g32"})
    assert two["format"] == "mixed-precision"
    assert [g["targets"] for g in two["config_groups"].values()] == [["a"], ["b"]]
    with pytest.raises(ValueError, match="does not hold q4_k"):
        compressed_tensors.config({"a": "q4_k"})
