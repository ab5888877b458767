"""`fastllm eval choice`: the table, JSON, a run that goes on, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastllm.cli.main import main
from fastllm.testing.evaluation import save_small_model

RECORDS = [
    {"question": "Which is red?", "choices": ["a rose", "the answer", "34"], "answer": 0},
    {"question": "What is 12 + 34?", "choices": ["46", "is"], "answer": "A"},
    {"question": "Which?", "choices": ["x", "the rose"], "answer": 1},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("choice") / "model")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "exam.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def choose(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(["eval", "choice", *map(str, argv)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_the_table_and_the_json_agree_and_a_second_run_reads_what_is_finished(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "result.json"
    status, text, _ = choose(capsys, model, data, "--json", out)
    found: dict[str, Any] = json.loads(out.read_text())
    assert status == 0 and found["questions"] == 3
    best = [max(range(len(e["log_probs"])), key=e["log_probs"].__getitem__) for e in found["each"]]
    right = sum(b == e["right"] for b, e in zip(best, found["each"], strict=True))
    assert found["acc"]["value"] == pytest.approx(right / 3)
    assert f"acc        {right / 3:.1%}" in text and "guessing gives 44.4%" in text
    kept = out.with_suffix(".done.jsonl")
    lines = kept.read_text()
    assert lines.count("\n") == 3
    assert choose(capsys, model, data, "--json", out)[0] == 0
    assert kept.read_text() == lines and json.loads(out.read_text())["each"] == found["each"]
    assert choose(capsys, model, data, "--json", out, "--dtype", "bfloat16")[0] == 0
    assert kept.read_text().count("\n") == 6  # another dtype, other numbers


def test_formats_shots_templates_and_limits_are_heeded(
    model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*argv: object) -> dict[str, Any]:
        status, out, _ = choose(capsys, model, data, "--json", *argv)
        assert status == 0
        return json.loads(out)

    plain = run()
    assert [e["place"][-6:] for e in run("--shots", 1)["each"]] == ["line 2", "line 3"]
    assert run("--limit", 1)["each"] == plain["each"][:1]
    others = [
        run("--quant", "q8_0"),
        run("--chat-template", "chatml"),
        run("--template", "{question}"),
    ]
    for other in others:
        assert other["questions"] == 3 and other["each"] != plain["each"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--shots", "3"], "--shots 3 leaves no question"),
        (["--shots", "-1"], "--shots must be 0 or more"),
        (["--limit", "0"], "--limit must be 1 or more"),
        (["--shots-from", "x"], "--shots-from needs --shots"),
        (["--template", "{query}"], "line 1: query: the template names this field"),
        (["--choices-field", "options"], "line 1: options: is missing"),
        (["--chat-template", "llama"], "chat_template must be model, chatml, plain"),
        (["--adapter", "nowhere"], "nowhere"),
    ],
)
def test_what_does_not_fit_is_named(
    argv: list[str], message: str, model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = choose(capsys, model, data, *argv)
    assert status == 2 and message in err
