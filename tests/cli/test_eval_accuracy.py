"""`fastllm eval accuracy`: files and tasks, JSON beside the table, kill -9, what it refuses."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fastllm.cli.main import main
from fastllm.testing.evaluation import save_small_model

JUDGE = """
def even(prompts, completions, **columns):
    return [float(len(c) % 2 == 0) for c in completions]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("accuracy") / "model")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl"
    records = [{"question": f"{n} + 1?", "answer": f"so\n#### {n + 1}"} for n in range(20)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def judge(tmp_path: Path) -> str:
    path = tmp_path / "judge.py"
    path.write_text(JUDGE)
    return f"{path}:even"


def evaluate(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(["eval", "accuracy", *map(str, argv)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_samples_are_judged_kept_and_counted(
    model: Path, data: Path, judge: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    argv: list[object] = [
        model, data, "--samples", 4, "--temperature", 20, "--max-tokens", 9, "--pass-at", "1,2",
        "--reward", judge, "--json", out, "--template", r"{question}\nA:", "--limit", 9,
    ]  # fmt: skip
    status, text, _ = evaluate(capsys, *argv)
    found: dict[str, Any] = json.loads(out.read_text())
    kept = [json.loads(line) for line in out.with_suffix(".done.jsonl").read_text().splitlines()]
    right = {r["place"]: sum(len(t) % 2 == 0 for t in r["texts"]) for r in kept}
    assert status == 0 and len(right) == 9 and all(len(r["texts"]) == 4 for r in kept)
    assert [sum(e["rewards"]) for e in found["each"]] == [right[e["place"]] for e in found["each"]]
    assert found["accuracy"]["value"] == pytest.approx(sum(right.values()) / 36)
    pass_at_2 = [1 - (4 - c) * (3 - c) / 12 for c in right.values()]
    assert found["pass_at"]["2"]["value"] == pytest.approx(sum(pass_at_2) / 9)
    cut = [length == 9 for r in kept for length in r["lengths"]]
    assert found["truncated"] == pytest.approx(sum(cut) / 36)
    assert f"accuracy     {found['accuracy']['value']:.1%} ± " in text and "pass@2" in text
    assert evaluate(capsys, *argv)[0] == 0  # a second run reads what is finished
    assert json.loads(out.read_text())["tokens"] == 0


def test_tasks_are_asked_in_their_test_split(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [model, "arithmetic:2", "--limit", 3, "--shots", 1, "--shots-from", "arithmetic:2"]
    status, out, _ = evaluate(capsys, *argv, "--max-tokens", 4, "--json")
    found = json.loads(out)
    assert status == 0 and found["problems"] == 3 and found["accuracy"]["high"] > 0.3
    assert found["each"][0]["place"].startswith("arithmetic:2: problem")
    quantized = evaluate(capsys, *argv, "--max-tokens", 4, "--quant", "q8_0")
    assert quantized[0] == 0 and "problems     3" in quantized[1]


def test_a_killed_run_goes_on_where_it_was(
    model: Path, data: Path, judge: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(model), str(data), "--max-tokens", "200", "--max-num-seqs", "1",
            "--reward", judge, "--threads", "1"]  # fmt: skip
    out = tmp_path / "killed.json"
    command = [sys.executable, "-m", "fastllm", "eval", "accuracy", *argv, "--json", str(out)]
    kept = out.with_suffix(".done.jsonl")
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (kept.exists() and kept.read_bytes().count(b"\n") > 1):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    lines = kept.read_bytes().split(b"\n")[:-1]
    assert not out.exists() and 2 <= len(lines) < 20
    assert evaluate(capsys, *argv, "--json", out)[0] == 0
    whole = tmp_path / "whole.json"
    assert evaluate(capsys, *argv, "--json", whole)[0] == 0
    found, expected = json.loads(out.read_text()), json.loads(whole.read_text())
    assert found["each"] == expected["each"] and found["accuracy"] == expected["accuracy"]
    assert found["tokens"] < expected["tokens"]
    assert kept.read_bytes().split(b"\n")[: len(lines)] == lines


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--samples", "2"], "--samples above 1 are all equal"),
        (["--samples", "0"], "--samples must be 1 or more"),
        (["--pass-at", "2"], "--pass-at: '2' is no number from 1 to the 1"),
        (["--reward", "exact_mach"], "exact_match"),
        (["--template", "{query}"], "line 1: query: the template names this field"),
        (["--shots", "20"], "--shots 20 leaves no question"),
        (["--shots", "2", "--shot-field", "proof"], "none in proof"),
        (["--max-model-len", "4"], "prompt"),
    ],
)
def test_what_does_not_fit_is_named(
    argv: list[str], message: str, model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = evaluate(capsys, model, data, *argv)
    assert status == 2 and message in err
