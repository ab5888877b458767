"""tools/transformers_tests.py on a small checkout made here: it counts, compares and refuses."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers

TOOL = Path(__file__).parents[2] / "tools" / "transformers_tests.py"
# A test that fails once transformers' default attention is not its own any more.
TESTS = """
import pytest
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def test_attention_is_the_original():
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward, "another attention"


def test_generate_works():
    pass


@pytest.mark.skip(reason="no accelerator")
def test_training_on_an_accelerator():
    pass


@pytest.mark.slow
def test_generate_slowly():
    raise AssertionError("slow tests are not run")


def test_tokenizer_is_not_selected():
    raise AssertionError("no test of attention, generation, training or batching")
"""


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("transformers_tests", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    source = tmp_path / "src" / "transformers" / "__init__.py"
    source.parent.mkdir(parents=True)
    source.write_text(f'__version__ = "{transformers.__version__}"\n')
    tests = tmp_path / "tests" / "models" / "llama" / "test_modeling_llama.py"
    tests.parent.mkdir(parents=True)
    tests.write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    return tmp_path


def test_a_test_that_only_fails_with_fastllm_is_told(
    tool: ModuleType, checkout: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(tool, "NEEDED", ("pytest",))
    file = checkout / "found.json"
    assert tool.main([str(checkout), "--models", "llama", "--json", str(file)]) == 1
    found = json.loads(file.read_text())
    assert found["counts"] == {
        "plain": {"llama": {"passed": 2, "skipped": 1}},
        "registered": {"llama": {"failed": 1, "passed": 1, "skipped": 1}},
    }
    (difference,) = found["differences"]
    assert difference["id"].endswith("::test_attention_is_the_original")
    assert (difference["plain"], difference["patched"]) == ("passed", "failed")
    assert "another attention" in difference["line"] in capsys.readouterr().out


def row(outcome: str, line: str = "") -> dict[str, Any]:
    return {"outcome": outcome, "line": line}


def test_known_and_harmless_differences_are_told_and_do_not_count(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "REASONS", {"whole": {"test_known": "it asks for sdpa's own error"}})
    plain = {"a::test_known": row("passed"), "a::test_fixed": row("failed"), "a::b": row("passed")}
    patched = {"a::test_known": row("failed", "E"), "a::test_fixed": row("passed")}
    known, fixed, absent = tool.differences(plain, patched, "whole")
    assert tool.is_worse(known) and known.reason
    assert not tool.is_worse(fixed)
    assert tool.is_worse(absent) and absent.patched == "absent" and not absent.reason
    unexcused, *_ = tool.differences(plain, patched, "registered")
    assert tool.is_worse(unexcused) and not unexcused.reason
    (skipped,) = tool.differences({"a::c": row("passed")}, {"a::c": row("skipped")}, "whole")
    assert tool.is_worse(skipped)


def test_without_a_checkout_it_says_how_to_get_one(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in ([], [str(tmp_path)]):
        assert tool.main(arguments) == 2
        assert (
            f"git clone --depth 1 --branch v{transformers.__version__}" in capsys.readouterr().err
        )


def test_tests_of_another_version_are_named(
    tool: ModuleType, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tool.read_checkout(str(checkout))
    assert found.version == transformers.__version__ and found.commit == "no git work tree"
    tool.warn_of_version(found)
    assert capsys.readouterr().err == ""
    tool.warn_of_version(tool.Checkout(checkout, "4.0.0", "c"))
    assert "are of transformers 4.0.0" in capsys.readouterr().err


def test_a_model_without_tests_and_missing_packages_are_refused(
    tool: ModuleType, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(tool.UnusableError, match="test_modeling_qwen9"):
        tool.test_files(checkout, ["qwen9"])
    monkeypatch.setattr(tool, "NEEDED", ("pytest", "no_such_package"))
    with pytest.raises(tool.UnusableError, match="pip install no_such_package"):
        tool.check_packages()
