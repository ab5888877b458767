"""GGUF files: read back what was written, agree with the `gguf` package, refuse what is wrong."""

from __future__ import annotations

import struct
import time
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from fastllm.errors import ModelFileError
from fastllm.models.gguf import GGUFFile
from fastllm.models.gguf_writer import encode_value, write_gguf
from fastllm.models.stored_tensor import StoredTensor
from fastllm.quantize.gguf_blocks import (
    GGUF_TYPES,
    QUANTIZERS,
    dequantize,
    quantize,
)

METADATA = {
    "general.architecture": "llama",
    "a.bool": True,
    "a.u32": 7,
    "a.i32": -7,
    "a.u64": 1 << 40,
    "a.i64": -(1 << 40),
    "a.f32": 0.5,
    "a.f64": np.float64(0.1),
    "a.strings": ["one", "", "日本"],
    "a.ints": [1, 2, 3],
    "a.floats": np.array([0.5, 1.5], np.float32),
    "a.bools": [True, False],
    "a.bytes": np.array([1, 2, 255], np.uint8),
}


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def info(name: str, sizes: list[int], type_id: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, type_id, offset)


def raw_file(
    path: Path,
    pairs: list[bytes] | None = None,
    infos: list[bytes] | None = None,
    data: bytes = bytes(256),
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> Path:
    """A file from hand-made parts, padded to 32 before the data."""
    pairs, infos = pairs or [], infos or []
    tensor_count, pair_count = counts or (len(infos), len(pairs))
    head = b"GGUF" + struct.pack("<IQQ", version, tensor_count, pair_count)
    head += b"".join(pairs) + b"".join(infos)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    tensors = {"dense": StoredTensor("f32", (4, 64), x), "vector": StoredTensor("f32", (64,), x[0])}
    for format in ("q4_0", "q4_1", "q8_0", "q5_0", "q5_1"):
        tensors[format] = StoredTensor(format, (4, 64), quantize(format, x))
    tensors["bf16"] = StoredTensor("bf16", (4, 64), x.bfloat16())
    write_gguf(tmp_path / "small.gguf", METADATA, tensors)
    return tmp_path / "small.gguf"


def test_values_and_tensors_are_those_that_the_gguf_package_reads(small: Path) -> None:
    ours, theirs = GGUFFile.open(small), gguf.GGUFReader(small)
    assert list(ours.metadata) == list(METADATA)
    for key, value in ours.metadata.items():
        expected = theirs.fields[key].contents()
        assert (value if isinstance(value, bool | int | float | str) else list(value)) == expected
    assert [t.name for t in theirs.tensors] == list(ours.tensors)
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.shape == tuple(int(n) for n in tensor.shape[::-1])
        assert (mine.type_name, mine.offset) == (tensor.tensor_type.name, tensor.data_offset)
        np.testing.assert_array_equal(mine.data.numpy(), tensor.data.view(np.uint8).reshape(-1))


def test_a_file_of_the_gguf_package_is_read(tmp_path: Path) -> None:
    path, data = tmp_path / "theirs.gguf", np.arange(96, dtype=np.float32).reshape(3, 32)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_array("tokens", ["a", "bc"])
    writer.add_tensor("x", data)
    writer.add_tensor("y", gguf.quantize(data, gguf.GGMLQuantizationType.Q8_0),
                      raw_dtype=gguf.GGMLQuantizationType.Q8_0)  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile.open(path)
    assert file.metadata["tokens"].tolist() == ["a", "bc"]
    assert file.tensors["y"].offset % 64 == 0
    torch.testing.assert_close(
        file.tensors["x"].data.view(torch.float32).view(3, 32), torch.from_numpy(data)
    )


def test_numeric_types_survive(small: Path) -> None:
    metadata = GGUFFile.open(small).metadata
    assert metadata["a.f64"] == 0.1  # not rounded to float32
    assert metadata["a.bytes"].numpy().dtype == np.uint8
    assert metadata["a.bools"].tolist() == [True, False]
    assert metadata["a.strings"][2] == "日本"
    assert len(metadata["a.strings"]) == 3
    with pytest.raises(TypeError, match=r"a\.strings"):
        metadata["a.strings"].numpy()


def test_views_need_no_warning_and_cannot_change_the_file(small: Path) -> None:
    before = small.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        file = GGUFFile.open(small)
        data = file.tensors["dense"].data
        assert data.data_ptr() == file.tensors["dense"].data.data_ptr()  # no copy
        data.zero_()
    assert small.read_bytes() == before


def test_released_pages_come_back(small: Path) -> None:
    file = GGUFFile.open(small)
    data = file.tensors["q8_0"].data
    before = data.clone()
    file.release(file.tensors["q8_0"])
    file.release()
    assert torch.equal(data, before)


def test_release_lowers_resident_memory(tmp_path: Path) -> None:
    path = tmp_path / "big.gguf"
    write_gguf(path, {}, {"x": StoredTensor("f32", (16 << 20,), torch.ones(16 << 20))})
    file = GGUFFile.open(path)
    assert file.tensors["x"].data.view(torch.float32).sum() == 16 << 20  # touches 64 MiB
    before = _resident()
    file.release()
    assert before - _resident() > 60 << 20


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def test_fifty_thousand_tokens_parse_quickly(tmp_path: Path) -> None:
    tokens = [f"token{i}" for i in range(50_000)]
    path = tmp_path / "tokens.gguf"
    write_gguf(path, {"tokens": tokens, "merges": tokens}, {})
    times = []
    for _ in range(3):
        start = time.process_time()  # of this process alone: other work cannot disturb it
        file = GGUFFile.open(path)
        times.append(time.process_time() - start)
    assert min(times) < 0.12
    assert file.metadata["merges"].tolist() == tokens


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    theirs = {int(t): (t.name, *size) for t, size in gguf.GGML_QUANT_SIZES.items()}
    ours = {number: (t.name, t.values, t.nbytes) for number, t in GGUF_TYPES.items()}
    assert ours == {n: theirs[n] for n in ours if n in theirs}
    assert set(theirs) <= set(ours) | {n for n in theirs if n > 41}  # later additions may come


@pytest.mark.parametrize("format", QUANTIZERS)
def test_dequantize_is_that_of_the_gguf_package(format: str) -> None:
    kind = gguf.GGMLQuantizationType[format.upper()]
    generator = np.random.default_rng(1)
    x = (generator.standard_normal((5, 96)) * 3).astype(np.float32)
    packed = gguf.quantize(x, kind).view(np.uint8)
    ours = dequantize(format, torch.from_numpy(packed.copy()))
    np.testing.assert_array_equal(ours.numpy(), gguf.dequantize(packed, kind))
    assert dequantize(format, torch.empty(0, packed.shape[1], dtype=torch.uint8)).shape == (0, 96)


@pytest.mark.parametrize("format", QUANTIZERS)
def test_quantize_gives_the_bytes_of_the_gguf_package(format: str) -> None:
    generator = np.random.default_rng(2)
    x = (generator.standard_normal((64, 256)) * generator.exponential(1, (64, 1))).astype("f4")
    x[0] = 0
    x[1, :32] = 2.5
    x[2] = np.round(x[2] * 4) / 4  # ties: halves between codes, equal magnitudes
    expected = gguf.quantize(x, gguf.GGMLQuantizationType[format.upper()]).view(np.uint8)
    np.testing.assert_array_equal(quantize(format, torch.from_numpy(x)).numpy(), expected)


def test_conversion_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"q3_k.*supported"):
        dequantize("q3_k", torch.zeros(1, 144, dtype=torch.uint8))
    with pytest.raises(ValueError, match="blocks of 18"):
        dequantize("q4_0", torch.zeros(1, 19, dtype=torch.uint8))
    with pytest.raises(ValueError, match="multiple of 32"):
        quantize("q8_0", torch.zeros(1, 33))
    with pytest.raises(ValueError, match="NaN"):
        quantize("q4_1", torch.full((1, 32), float("nan")))
    with pytest.raises(ValueError, match="fp16"):
        quantize("q8_0", torch.full((1, 32), 1e30))
    with pytest.raises(ValueError, match="float32"):
        quantize("q8_0", torch.zeros(1, 32, dtype=torch.float64))


def pair(key: str, value: object) -> bytes:
    return string(key) + encode_value(key, value)


HOSTILE = {
    "two keys": (dict(pairs=[pair("k", 1), pair("k", 2)]), "k: appears twice"),
    "two tensors": (dict(infos=[info("t", [8]), info("t", [8], 0, 32)]), "t: two tensors"),
    "overlap": (dict(infos=[info("t", [16]), info("u", [8], 0, 32)]), "u: its data overlaps"),
    "2^60 dimension": (dict(infos=[info("t", [1 << 60])]), "needs 4611686018427387904 bytes"),
    "product overflow": (dict(infos=[info("t", [1 << 32, 1 << 32])]), "impossible shape"),
    "zero dimension": (dict(infos=[info("t", [0, 4])]), "impossible shape"),
    "no dimension": (dict(infos=[info("t", [])]), "0 dimensions"),
    "five dimensions": (dict(infos=[info("t", [1] * 5)]), "5 dimensions"),
    "a billion dimensions": (
        dict(infos=[string("t") + struct.pack("<I", 10**9)], counts=(1, 0)), "t: has 1000000000"),
    "unknown type": (dict(infos=[info("t", [32], 4)]), "unknown type 4.*Q4_1"),
    "half a block": (dict(infos=[info("t", [33], 2)]), "not whole Q4_0 blocks"),
    "offset outside": (dict(infos=[info("t", [8], 0, 1 << 20)]), "needs 32 bytes at offset"),
    "offset overflow": (dict(infos=[info("t", [8], 0, (1 << 64) - 32)]), "needs 32 bytes"),
    "offset odd": (dict(infos=[info("t", [8], 0, 8)]), "offset 8 is not a multiple of 32"),
    "tensor count": (dict(counts=((1 << 64) - 1, 0)), "tensor_count: claims 18446744073709551615"),
    "pair count": (dict(counts=(0, 1 << 63)), "metadata_kv_count: claims 9223372036854775808"),
    "key length": (dict(pairs=[struct.pack("<Q", 1 << 62)], counts=(0, 1)), "key 0"),
    "string length": (
        dict(pairs=[string("k") + struct.pack("<IQ", 8, (1 << 64) - 1)]), "k: claims"),
    "array length": (
        dict(pairs=[string("k") + struct.pack("<IIQ", 9, 4, 1 << 62)]), "k: claims"),
    "string array": (
        dict(pairs=[string("k") + struct.pack("<IIQQ", 9, 8, 1, (1 << 64) - 1)]), "past the end"),
    "nested arrays": (
        dict(pairs=[string("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 1000]),
        "nests arrays"),
    "a million pairs": (
        dict(counts=(0, 1 << 20), data=bytes(16 << 20)),
        "metadata_kv_count: claims 1048576 items, more than the allowed 65536",
    ),
    "a million tensors": (
        dict(counts=(1 << 20, 0), data=bytes(64 << 20)),
        "tensor_count: claims 1048576 items, more than the allowed 65536",
    ),
    "a million nested arrays": (
        dict(
            pairs=[string("k") + struct.pack("<IIQ", 9, 9, 1 << 20)],
            data=bytes(16 << 20),
        ),
        "k: claims 1048576 items, more than the allowed 65536",
    ),
    "value type": (dict(pairs=[string("k") + struct.pack("<II", 13, 0)]), "unknown value type 13"),
    "element type": (
        dict(pairs=[string("k") + struct.pack("<IIQ", 9, 99, 0)]), "unknown element type 99"),
    "alignment 48": (dict(pairs=[pair("general.alignment", 48)]), "power of two"),
    "alignment 0": (dict(pairs=[pair("general.alignment", 0)]), "power of two"),
    "alignment text": (dict(pairs=[pair("general.alignment", "32")]), "power of two"),
    "alignment list": (dict(pairs=[pair("general.alignment", [32])]), "power of two"),
    "not UTF-8": (dict(pairs=[string("k") + struct.pack("<I", 8) + string(b"\xff")]), "UTF-8"),
    "version": (dict(version=1), "version 1 is not supported"),
    "big endian": (dict(version=3 << 24), "big endian"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_fields_are_refused_by_name(case: str, tmp_path: Path) -> None:
    parts, message = HOSTILE[case]
    path = raw_file(tmp_path / "hostile.gguf", **parts)
    with pytest.raises(ModelFileError, match=message) as caught:
        GGUFFile.open(path)
    assert "hostile.gguf" in str(caught.value)


def test_hand_made_file_without_faults_is_accepted(tmp_path: Path) -> None:
    nested = string("n") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 0, 2) + b"ab"
    path = raw_file(tmp_path / "good.gguf", [nested], [info("t", [8]), info("u", [4], 0, 32)])
    file = GGUFFile.open(path)
    assert [list(x) for x in file.metadata["n"]] == [[97, 98]]
    raw_file(tmp_path / "v2.gguf", [nested], [info("t", [8])], version=2)
    assert GGUFFile.open(tmp_path / "v2.gguf").version == 2


def test_strings_in_arrays_are_checked_when_decoded(tmp_path: Path) -> None:
    array = string("k") + struct.pack("<IIQ", 9, 8, 2) + string("ok") + string(b"\xff\xfe")
    file = GGUFFile.open(raw_file(tmp_path / "utf8.gguf", [array]))
    with pytest.raises(ModelFileError, match=r"utf8.gguf: k\[1\]: is not valid UTF-8"):
        file.metadata["k"].tolist()


def test_files_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "text.gguf").write_text("hello, I am not a model file at all")
    for name, message in [
        ("empty.gguf", "0 bytes"),
        ("text.gguf", "not a GGUF file"),
        ("absent.gguf", "cannot be opened"),
        (".", "not a regular file"),
    ]:
        with pytest.raises(ModelFileError, match=message):
            GGUFFile.open(tmp_path / name)


def test_every_truncation_is_refused(small: Path, tmp_path: Path) -> None:
    raw = small.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 1200, 7), len(raw) - 64]:
        cut.write_bytes(raw[:length])
        with pytest.raises(ModelFileError, match=r"cut\.gguf"):
            GGUFFile.open(cut)


def test_writer_refuses_what_the_format_cannot_hold(tmp_path: Path) -> None:
    for value in [{}, [1, "a"], np.zeros((2, 2)), np.zeros(2, np.complex64), None]:
        with pytest.raises(TypeError, match="metadata k"):
            write_gguf(tmp_path / "x.gguf", {"k": value}, {})
    with pytest.raises(ValueError, match="64 bits"):
        write_gguf(tmp_path / "x.gguf", {"k": 1 << 70}, {})
    assert list(tmp_path.iterdir()) == []  # nothing half-written is left
