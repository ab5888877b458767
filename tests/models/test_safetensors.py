"""Hugging Face directories: reading, refusing, saving."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fastllm.errors import ModelFileError
from fastllm.models.safetensors_files import INDEX_FILE, SafetensorsFiles, save_directory


def write_raw(path: Path, header: object, data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def entry(dtype: str = "F32", shape: Any = (2,), span: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(4, 6, generator=generator),
        "b": torch.randn(3, generator=generator).bfloat16(),
        "c": torch.randn(2, 2, generator=generator).half(),
        "empty": torch.empty(0, 3),
    }


def assert_holds(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    files = SafetensorsFiles.open(directory)
    assert set(files.entries) == set(tensors)
    for name, tensor in tensors.items():
        stored = files.get(name)
        assert (stored.shape, stored.data.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(stored.data, tensor)
        assert files.entries[name].nbytes == tensor.nbytes


@pytest.mark.parametrize("limit", [1 << 30, 60, 1])
def test_saved_directory_reads_back(
    limit: int, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    target = tmp_path / "nested" / "model"
    save_directory(target, tensors, {"model_type": "x"}, files={"tokenizer.json": b"{}"},
                   max_shard_bytes=limit)  # fmt: skip
    assert_holds(target, tensors)
    assert (target / INDEX_FILE).exists() == (limit < 1 << 30)
    assert json.loads((target / "config.json").read_text()) == {"model_type": "x"}
    assert (target / "tokenizer.json").read_bytes() == b"{}"
    assert [p.name for p in target.parent.iterdir()] == ["model"]  # nothing is left aside


def test_released_files_are_opened_again(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_directory(tmp_path / "m", tensors, {})
    files = SafetensorsFiles.open(tmp_path / "m")
    kept = files.get("a").data
    files.release()
    assert torch.equal(kept, tensors["a"])
    assert torch.equal(files.get("a").data, kept)


def test_files_can_be_read_by_those_who_may_read_the_folder(tmp_path: Path) -> None:
    save_directory(tmp_path / "m", {"w": torch.ones(2)}, {})
    (tmp_path / "plain").touch()  # as the umask has it
    modes = {file.stat().st_mode for file in [*(tmp_path / "m").iterdir(), tmp_path / "plain"]}
    assert len(modes) == 1


def test_an_existing_directory_is_kept_unless_told(
    tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save_directory(tmp_path / "m", tensors, {})
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_directory(tmp_path / "m", {}, {})
    assert_holds(tmp_path / "m", tensors)
    save_directory(tmp_path / "m", {"a": tensors["a"]}, {}, overwrite=True)
    assert_holds(tmp_path / "m", {"a": tensors["a"]})


def test_only_a_model_s_directory_is_replaced(
    tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save_directory(tmp_path / "m", tensors, {})
    (tmp_path / "m" / "notes.txt").write_text("kept")
    with pytest.raises(FileExistsError, match=r"no model's file: notes.txt"):
        save_directory(tmp_path / "m", {}, {}, overwrite=True)
    assert_holds(tmp_path / "m", tensors)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("kept")
    with pytest.raises(FileExistsError, match="no model's directory"):
        save_directory(tmp_path / "other", tensors, {}, overwrite=True)
    (tmp_path / "empty").mkdir()
    save_directory(tmp_path / "empty", tensors, {}, overwrite=True)
    assert_holds(tmp_path / "empty", tensors)


def test_a_link_is_followed(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    for _ in range(2):
        save_directory(tmp_path / "link", tensors, {}, overwrite=True)
    assert {p.name for p in tmp_path.iterdir()} == {"link", "real"}
    assert (tmp_path / "link").is_symlink()
    assert_holds(tmp_path / "real", tensors)


def test_a_failed_save_leaves_the_old_directory(
    tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save_directory(tmp_path / "m", tensors, {})
    with pytest.raises(ValueError, match="JSON"):
        save_directory(tmp_path / "m", tensors, {"x": float("nan")}, overwrite=True)
    assert_holds(tmp_path / "m", tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_views_are_saved_alone_and_shared_tensors_refused(tmp_path: Path) -> None:
    big = torch.arange(100.0)
    views = {"first": big[:10], "second": big[10:20], "turned": big.view(10, 10).t()}
    save_directory(tmp_path / "m", {k: views[k] for k in ("second", "turned")}, {})
    assert_holds(tmp_path / "m", {k: views[k] for k in ("second", "turned")})
    with pytest.raises(ValueError, match="turned and first share memory"):
        save_directory(tmp_path / "n", views, {})
    with pytest.raises(TypeError, match=r"x has dtype torch\.int64"):
        save_directory(tmp_path / "n", {"x": torch.arange(3)}, {})
    with pytest.raises(ValueError, match=r"\.\./evil"):
        save_directory(tmp_path / "n", {}, {}, files={"../evil": b""})


HEADERS: dict[str, tuple[object, bytes, str]] = {
    "unknown dtype": ({"w": entry("Q9")}, bytes(8), "w: has the unknown dtype 'Q9'"),
    "no dtype": ({"w": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8), "dtype None"),
    "no object": ({"w": 3}, b"", "w: must be described by an object"),
    "2^60 dimension": ({"w": entry(shape=[1 << 60])}, bytes(8), "does not take 8 bytes"),
    "overflowing shape": ({"w": entry(shape=[1 << 33, 1 << 33])}, bytes(8), "does not take"),
    "huge size": ({"w": entry(shape=[1 << 64])}, bytes(8), "shape is not a list"),
    "negative size": ({"w": entry(shape=[-1, -2])}, bytes(8), "shape is not a list"),
    "text shape": ({"w": entry(shape="ab")}, bytes(8), "shape is not a list"),
    "many dimensions": ({"w": entry(shape=[1] * 9)}, bytes(4), "at most 8"),
    "descending": ({"w": entry(span=[8, 0])}, bytes(8), "ascending"),
    "outside": ({"w": entry(span=[8, 16])}, bytes(8), "expected at 0"),
    "beyond the end": ({"w": entry(shape=[4], span=[0, 16])}, bytes(8), "describes 16 bytes"),
    "hole at the end": ({"w": entry()}, bytes(16), "describes 8 bytes"),
    "overlap": ({"v": entry(), "w": entry()}, bytes(8), "expected at 8"),
    "twice": (b'{"w": {"dtype": "F32"}, "w": {"dtype": "F32"}}', b"", "'w' appears twice"),
    "list": (b"[1]", b"", "must be an object"),
    "no JSON": (b"{{{{", b"", "not valid JSON"),
    "deep": (b'{"a":' * 50_000, b"", "nested too deeply"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_bad_headers_are_refused_by_name(case: str, tmp_path: Path) -> None:
    header, data, message = HEADERS[case]
    write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(ModelFileError, match=message) as caught:
        SafetensorsFiles.open(tmp_path)
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize("length", [0, 9, 1 << 40, (1 << 64) - 1])
def test_header_lengths_are_checked_against_the_file(length: int, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(ModelFileError, match=r"model\.safetensors"):
        SafetensorsFiles.open(tmp_path)


def test_a_dtype_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    save_file({"i": torch.arange(3), "w": torch.ones(2)}, tmp_path / "model.safetensors")
    files = SafetensorsFiles.open(tmp_path)  # a stray integer tensor is no reason to refuse
    assert files.get("w").shape == (2,)
    with pytest.raises(ModelFileError, match=r"i: has dtype I64.*Supported: F32, F16, BF16"):
        files.get("i")


@pytest.mark.parametrize(
    "file",
    ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "x.bin", "", 5, None,
     ".hidden.safetensors", "c:x.safetensors", "a\\b.safetensors", "a\0.safetensors"],
)  # fmt: skip
def test_an_index_cannot_lead_elsewhere(file: object, tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"w": file}}))
    save_file({"w": torch.ones(1)}, tmp_path.parent / "x.safetensors")
    with pytest.raises(ModelFileError, match=r"weight_map\.w: .*is not the name of"):
        SafetensorsFiles.open(tmp_path)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(1)}, tmp_path / "two.safetensors")

    def open_with(weight_map: object) -> None:
        (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
        SafetensorsFiles.open(tmp_path)

    one, two = "one.safetensors", "two.safetensors"
    for weight_map, message in [
        ({"a": one, "b": two}, "one.safetensors: b: is in this shard, but .* 'two.safetensors'"),
        ({"a": one, "b": one, "c": one}, "c: .*not found"),
        ({"a": one}, "b: is in this shard"),
        ({"a": one, "b": one, "c": "three.safetensors"}, "three.safetensors: file: does not exist"),
        ({}, "weight_map: must be an object"),
        (None, "weight_map: must be an object"),
    ]:
        with pytest.raises(ModelFileError, match=message):
            open_with(weight_map)
    open_with({"a": one, "b": one})


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ModelFileError, match="Pickled weights"):
        SafetensorsFiles.open(tmp_path)
