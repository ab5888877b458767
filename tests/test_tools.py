"""The scripts in tools/."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


def tool(name: str) -> ModuleType:
    """A script of tools/, imported without running it."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_requirements_hold_build_run_time_and_extras_once() -> None:
    requirements = tool("requirements").requirements
    lines = requirements(ROOT / "pyproject.toml", ["test", "lint"])
    names = [line.split(">")[0].split("<")[0] for line in lines]
    assert {"pybind11", "torch", "hypothesis", "ruff"} <= set(names)
    assert len(lines) == len(set(lines))
    with pytest.raises(SystemExit, match="nothing"):
        requirements(ROOT / "pyproject.toml", ["nothing"])


ROW = {
    "suite": "decode", "case": "128 tokens", "device": "d", "dtype": "int8", "unit": "tok/s",
    "value": 200.0, "peers": {"llama.cpp": 100.0}, "ratio": {"llama.cpp": 2.0},
    "bound": 300.0, "percent_of_bound": 66.7, "commit": "c",
}  # fmt: skip


def test_readme_tables_are_written_between_the_marks_only() -> None:
    table = tool("readme_table")
    rows = [ROW, {**ROW, "suite": "ops"}, {**ROW, "case": "memory"}]
    text = table.markdown(table.shown(rows, ("decode",), ("",)), table.WORDS["README.md"])
    assert text.splitlines() == [
        "| case | activation | fastllm | llama.cpp | of the bound |",
        "|---|---|---|---|---|",
        "| decode: 128 tokens | int8 | **200** tok/s | 100 (2x) | 67% |",
    ]
    page = "before\n<!-- measured:begin -->\n{}\n<!-- measured:end -->\nafter\n"
    assert table.replace(page.format("old"), "new") == page.format("new")
    with pytest.raises(ValueError, match="measured:begin"):
        table.replace("no marks", "new")


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_readmes_have_the_marks(name: str) -> None:
    table = tool("readme_table")
    page = (ROOT / name).read_text(encoding="utf-8")
    for mark in table.NAMES:
        assert "new" in table.replace(page, "new", mark)


def test_a_printed_table_of_formats_is_taken_without_its_notes() -> None:
    table_of = tool("readme_table").table_of
    assert table_of("| a | b |\n| --- | ---: |\n| f32 | 1 |\n\n- notes") == (
        "| a | b |\n| --- | ---: |\n| f32 | 1 |"
    )
    with pytest.raises(ValueError, match="no Markdown table"):
        table_of("nothing\n")


def test_gpu_results_of_another_commit_are_not_kept(tmp_path: Path) -> None:
    gpu = tool("gpu")
    path = tmp_path / "results" / "gpu.json"
    assert gpu.load(path, "abc") == {}
    gpu.save(path, {"commit": "abc", "tests": {"tests/ops": {"tests": 3}}})
    assert gpu.load(path, "abc")["tests"]["tests/ops"]["tests"] == 3
    assert gpu.load(path, "def") == {}
    assert [p.name for p in path.parent.iterdir()] == ["gpu.json"]


def test_a_folder_without_gpu_tests_counts_none_and_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "test_nothing.py").write_text("def test_cpu():\n    assert True\n")
    outcome = tool("gpu").run_tests(tmp_path)
    assert (outcome["tests"], outcome["failures"], outcome["errors"]) == (0, 0, 0)
