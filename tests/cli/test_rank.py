"""`fastllm rank`: what a person types becomes rankings that `fastllm reward` reads."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastllm.cli import rank
from fastllm.engine.request import CompletionOutput
from fastllm.errors import DataError
from fastllm.models.loader import save_pretrained
from fastllm.models.tokenizer_training import train_tokenizer
from fastllm.models.trainable import initialize
from fastllm.testing.small_models import config_of
from fastllm.train.data.prompts import PromptRecord
from fastllm.train.data.ranking_file import RankingFile, parse_order
from fastllm.train.data.rankings import read_rankings


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Models this small wait for a second thread longer than they compute."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rank") / "model"
    tokenizer = train_tokenizer(["one two three four"] * 4, 300, allow_smaller=True)
    config = replace(
        config_of("qwen3 tied"),
        vocab_size=tokenizer.vocab_size,
        eos_token_ids=tuple(tokenizer.eos_token_ids),
    )
    save_pretrained(initialize(config, dtype=torch.float32), folder, tokenizer)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    records = [
        {"prompt": "one"},
        {"prompt": [{"role": "user", "content": "two"}]},
        {"question": "three", "answer": "3"},
        {"prompt": "one"},
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def drive(
    monkeypatch: pytest.MonkeyPatch, model: Path, prompts: Path, out: Path, typed: str
) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    words = [str(model), str(prompts), "--answers", "3", "--out", str(out)]
    return rank.run([*words, "--max-tokens", "4", "--seed", "1", "--threads", "1"])


@pytest.mark.parametrize(
    ("typed", "ranks"),
    [
        ("2 1 = 4 3", [2, 1, 3, 2]),
        ("2 1=4 3", [2, 1, 3, 2]),
        ("2 > 1 = 4 > 3", [2, 1, 3, 2]),
        ("4,3,2,1", [4, 3, 2, 1]),
        ("1 = 2 = 3 = 4", [1, 1, 1, 1]),
    ],
)
def test_an_order_becomes_ranks(typed: str, ranks: list[int]) -> None:
    assert parse_order(typed, 4) == ranks


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("", "not ranked: 1, 2, 3, 4"),
        ("2 1 4", "not ranked: 3"),
        ("2 1 4 3 3", "answer 3 is there twice"),
        ("2 1 4 5", "'5' is no answer: they are numbered from 1 to 4"),
        ("first", "'first' is no answer"),
        ("= 1 2 3 4", "stands between two answers"),
        ("1 2 3 = = 4", "stands between two answers"),
        ("1 2 3 4 =", "stands between two answers"),
        ("0 1 2 3", "'0' is no answer"),
    ],
)
def test_what_is_no_order_says_why(typed: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_order(typed, 4)


def test_rankings_are_kept_and_a_second_start_goes_on(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out" / "rankings.jsonl"
    assert drive(monkeypatch, model, prompts, out, "1 2\n3 1 = 2\ns\nq\n") == 0
    shown = capsys.readouterr().out
    assert "not ranked: 3; such as 1 2 3" in shown and "[3]" in shown and "> one" in shown
    (first,) = map(json.loads, out.read_text().splitlines())
    assert first["prompt"] == "one" and first["ranks"] == [2, 2, 1]
    assert len(set(first["answers"])) == 3 and first["model"] == str(model)
    assert len(first["truncated"]) == 3
    drive(monkeypatch, model, prompts, out, "2 1 3\n1 2 3\n")  # what was skipped comes again
    shown = capsys.readouterr().out
    assert "> one" not in shown and "> two" in shown and "> three" in shown
    rankings = list(read_rankings([out]))
    assert [r.ranks for r in rankings] == [(2, 2, 1), (2, 1, 3), (1, 2, 3)]
    assert rankings[1].prompt == [{"role": "user", "content": "two"}]
    assert rankings[0].truncated == tuple(first["truncated"])
    drive(monkeypatch, model, prompts, out, "")
    assert "3 of them ranked" in capsys.readouterr().err


def test_answers_are_cut_only_where_every_sample_was_and_nothing_cut_is_none() -> None:
    said = [("a ", "length"), ("a", "stop"), ("b", "length"), (" ", "length"), ("c", "stop")]
    outputs = [
        CompletionOutput(
            index=i, text=text, token_ids=[], cumulative_logprob=0, finish_reason=reason
        )
        for i, (text, reason) in enumerate(said)
    ]
    assert rank.different(outputs) == {"a": False, "b": True, "c": False}
    assert rank.different([replace(outputs[1], text="")]) == {"": False}


def test_what_was_cut_is_shown_and_marked_beside_its_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("2 1 3\n"))
    file = RankingFile(tmp_path / "rankings.jsonl")
    answers = {"whole": False, "cut": True, "short": False}
    assert rank.ask(file, PromptRecord(prompt="go"), answers, "model", 0)
    (record,) = map(json.loads, file.path.read_text().splitlines())
    assert dict(zip(record["answers"], record["truncated"], strict=True)) == answers
    assert capsys.readouterr().out.count("cut  [cut here]") == 1


def test_the_end_of_input_ends_the_session_and_loses_nothing(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rankings.jsonl"
    assert drive(monkeypatch, model, prompts, out, "1 2 3\n") == 0
    assert RankingFile(out).count == 1


def test_a_line_that_a_kill_has_cut_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "rankings.jsonl"
    file = RankingFile(path)
    file.add("one", ["a", "b"], [1, 2])
    with path.open("ab") as torn:
        torn.write(b'{"prompt": "two", "ans')
    again = RankingFile(path)
    assert again.done("one") and not again.done("two") and again.count == 1
    again.add("two", ["a", "b"], [2, 1])
    assert [json.loads(line)["prompt"] for line in path.read_text().splitlines()] == ["one", "two"]


def test_two_sessions_lose_nothing_of_each_other(tmp_path: Path) -> None:
    path = tmp_path / "rankings.jsonl"
    first, second = RankingFile(path), RankingFile(path)
    first.add("one", ["a", "b"], [1, 2])
    second.add("two", ["a", "b"], [2, 1])
    first.add("three", ["a", "b"], [2, 1])
    written = [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
    assert written == ["one", "two", "three"] and first.count == 3 and first.done("two")


def test_a_file_of_something_else_is_not_written_to(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("dear diary\n")
    with pytest.raises(DataError, match="line 1: is no ranking"):
        RankingFile(path)


def test_a_file_without_prompts_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none.txt"
    path.write_text("\n \n")
    with pytest.raises(DataError, match=r"none\.txt.*holds no prompt"):
        rank.run(["model", str(path), "--out", str(tmp_path / "rankings.jsonl")])


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--answers", "1"], "--answers must be at least 2"), (["--temperature", "0"], "above 0")],
)
def test_options_that_cannot_be_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rank.run(["model", "prompts.jsonl", *words])
