"""`fastllm tokenizer` and `fastllm data`, from a folder of text to a batch on the screen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from fastllm.cli import console, data, data_show
from fastllm.cli.main import main
from fastllm.train.data.prepare import Progress

CHAT = {
    "messages": [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Red, 红."},
    ]
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("work")
    (path / "text").mkdir()
    for n in range(12):
        lines = [f"Line {n} {i} of a text that is like no other: {n * i}.\n" for i in range(5)]
        (path / "text" / f"{n}.txt").write_text("\n".join(lines))
    (path / "text" / "copy.txt").write_text((path / "text" / "3.txt").read_text())
    (path / "chat.jsonl").write_text(json.dumps(CHAT))
    train = ["tokenizer", "train", str(path / "text"), "--vocab-size", "290"]
    assert main([*train, "--out", str(path / "tokenizer")]) == 0
    prepare = ["data", "prepare", str(path / "text"), "--tokenizer", str(path / "tokenizer")]
    assert main([*prepare, "--near-duplicates", "0", "--out", str(path / "store")]) == 0
    return path


def output(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_stats_print_a_table_or_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("tokenizer", "stats", folder / "tokenizer", folder / "text")
    assert "bytes per token" in output(capsys, *command)
    found = json.loads(output(capsys, *command, "--json"))
    rows = {row["script"]: row for row in found["scripts"]}
    assert found["vocab_size"] == 290
    assert rows["Latin"]["bytes_per_token"] > 1.2 and rows["digits"]["bytes_per_token"] == 1


def test_prepare_says_what_was_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("data", "prepare", folder / "text", "--tokenizer", folder / "tokenizer")
    text = output(capsys, *command, "--out", folder / "other", "--document-separator", "blank-line")
    assert "train documents" in text and "holdout tokens" in text
    assert "dropped, exact duplicate: 5 of 65" in text
    assert main([*map(str, command), "--out", str(folder / "other")]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_show_prints_the_documents_of_a_store(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = output(capsys, "data", "show", folder / "store", "--seq-len", "64", "--rows", "2")
    assert "<|endoftext|>Line" in text and "128 of 128: fill 100.0%" in text
    command = ("data", "show", folder / "store", "--json", "--seq-len", "64")
    batches = [json.loads(output(capsys, *command, "--step", step)) for step in (0, 0, 1)]
    assert batches[0] == batches[1] != batches[2]
    for document in batches[0]["contents"]:
        assert document["learned"] == [0] + [1] * (len(document["ids"]) - 1)


def test_show_marks_what_is_learned_of_a_conversation(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("data", "show", folder / "chat.jsonl", "--tokenizer", folder / "tokenizer")
    text = output(capsys, *command, "--rows", "1")
    assert "<|im_start|>assistant\n[[Red, 红.<|im_end|>]]" in text
    text = output(capsys, *command, "--rows", "1", "--loss", "all")
    assert "[[" not in text


def test_show_colours_tokens_by_mask_in_a_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = Console(force_terminal=True, color_system="standard", highlight=False, record=True)
    monkeypatch.setattr(data_show, "console", lambda: drawn)
    monkeypatch.setattr(console, "console", lambda: drawn)
    command = ("data", "show", folder / "chat.jsonl", "--tokenizer", folder / "tokenizer")
    output(capsys, *command, "--rows", "1")
    text = drawn.export_text(styles=True)
    learned = [part for part in text.split("\x1b[")[1:] if part.startswith(("32m", "92m"))]
    assert "".join(part[3:] for part in learned) == "Red, 红.<|im_end|>"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data", "show", "{}/chat.jsonl"], "needs --tokenizer"),
        (["data", "show", "{}/text"], "index.json: the file does not exist"),
        (["data", "show", "{}/store", "--split", "test"], "no split 'test'"),
        (["tokenizer", "train", "{}/text", "--vocab-size", "9999", "--out", "t"], "merges"),
        (["tokenizer", "stats", "{}/nothing", "{}/text"], "not found"),
        (["data", "prepare", "{}/x", "--tokenizer", "{}/tokenizer", "--out", "o"], "no such file"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main([argument.format(folder) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


def test_another_tokenizer_than_the_store_s_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["tokenizer", "train", str(folder / "text"), "--vocab-size", "280"]
    assert main([*train, "--out", str(folder / "t2")]) == 0
    assert main(["data", "show", str(folder / "store"), "--tokenizer", str(folder / "t2")]) == 2
    assert "is not the tokenizer that made" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["data", "tokenizer"])
def test_an_unknown_action_names_the_nearest(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    wrong, near = {"data": ("prepar", "prepare"), "tokenizer": ("trai", "train")}[name]
    with pytest.raises(SystemExit) as leaving:
        main([name, wrong])
    assert leaving.value.code == 2 and f"did you mean {near}?" in capsys.readouterr().err
    assert main([name]) == 0 and "actions:" in capsys.readouterr().out


def test_histogram_has_a_row_for_every_power_of_two() -> None:
    rows = data_show.histogram([1, 2, 3, 9])
    assert rows == [("1 to 1", 1), ("2 to 3", 2), ("4 to 7", 0), ("8 to 15", 1)]


def test_progress_without_a_terminal_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str],
) -> None:
    times = iter([0.0, 3.0, 12.0, 13.0, 30.0])
    say = data.plain_progress(console.paced_note(lambda: next(times)))
    for done in (10, 50, 60):
        say(Progress("read", done, 200, 7))
    say(Progress("write", 1, None, 8))
    assert capsys.readouterr().err == "reading 25%, 7 documents\nwriting, 8 documents\n"
