"""The command as a user meets it: help, errors, exit statuses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import fastllm
from fastllm.cli import main as cli
from fastllm.cli.console import human_bytes
from fastllm.cli.inspect import shorten
from fastllm.tables import plain_table


def test_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"  {name} " in text


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_has_help_with_examples(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status: object
    try:
        status = cli.main([name, "--help"])
    except SystemExit as leaving:
        status = leaving.code
    assert status == 0
    text = capsys.readouterr().out
    assert f"usage: fastllm {name}" in text
    assert f"examples:\n  fastllm {name}" in text


def test_help_loads_neither_torch_nor_the_package_s_parts() -> None:
    program = (
        "import sys; from fastllm.cli.main import main; main(['--help']); "
        "print(sorted({'torch', 'rich', 'jsonargparse'} & set(sys.modules)), file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stderr.strip() == "[]"


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generat"]) == 2
    assert "did you mean generate?" in capsys.readouterr().err


def test_an_unknown_option_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.main(["generate", "smollm2", "hello", "--temprature", "1"])
    assert leaving.value.code == 2
    assert "did you mean --temperature?" in capsys.readouterr().err


def test_a_wrong_model_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "no-such-model"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fastllm: error: model 'no-such-model' not found")
    assert err.count("\n") == 1


def test_debug_lets_the_error_through() -> None:
    with pytest.raises(LookupError, match="no-such-model"):
        cli.main(["inspect", "no-such-model", "--debug"])


def test_bad_sampling_options_are_refused_before_loading(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["generate", "no-such-model", "hello", "--temperature", "-1"]) == 2
    assert "temperature" in capsys.readouterr().err


def test_python_m_fastllm_is_the_command() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "fastllm", "--version"], capture_output=True, text=True
    )
    assert run.returncode == 0 and run.stdout.strip() == fastllm.__version__


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m fastllm bench | head -n 0"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert run.stderr == ""


def test_doctor_reports_every_op_right(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from fastllm.ops.registry import OPS

    file = tmp_path / "doctor.json"
    assert cli.main(["doctor", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    report = json.loads(file.read_text())
    assert {outcome["op"] for outcome in report["self_test"]} == set(OPS)
    assert all(
        outcome["cases"] and "native" in outcome["backends"] for outcome in report["self_test"]
    )
    assert report["isa"] in text and report["thread_runtime"] in text
    tables = text[text.index("Backends") : text.index("Self-test")].splitlines()
    assert max(map(len, tables)) <= 100 and len(tables) < 400
    for row in report["backends"]:
        assert row["op"] in text


def test_doctor_fails_when_an_op_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastllm.ops.registry import OPS

    (row,) = OPS["rms_norm"].tables["cpu"]
    broken = [replace(row, fn=lambda x, *rest: 1.5 * row.fn(x, *rest))]
    monkeypatch.setitem(OPS["rms_norm"].tables, "cpu", broken)
    monkeypatch.setattr(OPS["rms_norm"], "_rows", {})
    assert cli.main(["doctor", "--short"]) == 1


def test_bench_lists_its_suites(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench"]) == 0
    text = capsys.readouterr().out
    for suite in ("decode", "linear", "ops", "prefill"):
        assert suite in text
    assert cli.main(["bench", "nothing"]) == 2
    assert cli.main(["bench", "moe", "--case", "nothing of that name"]) == 2
    assert "--case 'nothing of that name'" in capsys.readouterr().err


def test_plain_tables_are_aligned() -> None:
    assert plain_table(["a", "n"], [["long", "1"], ["x", "12"]], right=["n"]) == [
        "a      n",
        "long   1",
        "x     12",
    ]


def test_wide_tables_are_wrapped() -> None:
    lines = plain_table(["name", "what it does"], [["a", "one two three"], ["bb", "x"]], width=13)
    assert lines == ["name  what it", "      does", "a     one two", "      three", "bb    x"]
    assert plain_table(["a"], [["x y"]], width=9) == ["a", "x y"]


def test_bytes_are_written_for_people() -> None:
    assert [human_bytes(n) for n in (0, 999, 98_100_000, 3.2e12)] == [
        "0 B",
        "999 B",
        "98.1 MB",
        "3.2 TB",
    ]


def test_long_metadata_is_shortened() -> None:
    assert shorten(list(range(100))) == "100 values: 0, 1, 2, 3, ..."
    assert len(shorten("word " * 100)) == 80
    assert shorten([1, 2]) == "1, 2"
    assert shorten("\x1b[31mred\x9b") == "\\x1b[31mred\\x9b"
