"""Text to a store: what is kept, in which order, whatever the files' order and the processes."""

from __future__ import annotations

import errno
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastllm.errors import DataError
from fastllm.models.tokenizer import Tokenizer
from fastllm.train.data import tokenizing
from fastllm.train.data.prepare import PrepareConfig, Progress, Spool, prepare
from fastllm.train.data.sources import SourceOptions
from fastllm.train.data.store import TokenStore


def sentence(seed: int, count: int = 40) -> str:
    chosen = random.Random(seed).choices(range(1000), k=count)
    return f"Text {seed}: " + " ".join(f"the cat{n}" for n in chosen)


TEXTS = [sentence(n) for n in range(60)]


def write(path: Path, texts: list[str]) -> str:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return str(path)


def run(tmp_path: Path, tokenizer: Path, *inputs: str, **options: object) -> TokenStore:
    options = {"out": str(tmp_path / "store"), "overwrite": True, **options}
    said: list[str] = []
    return prepare(
        PrepareConfig(inputs=inputs, tokenizer=str(tokenizer), **options), warn=said.append
    )


def documents(store: TokenStore, tokenizer: Path, split: str = "train") -> list[str]:
    part, decoder = store.split(split), Tokenizer.from_hf(tokenizer)
    return [
        decoder.decode(store.document(i)) for i in range(part.first, part.first + part.documents)
    ]


def test_a_store_holds_every_text_and_its_end_token(tmp_path: Path, tokenizer_dir: Path) -> None:
    store = run(tmp_path, tokenizer_dir, write(tmp_path / "a.jsonl", TEXTS), holdout=0.2)
    TokenStore.open(store.directory, verify=True)
    held = documents(store, tokenizer_dir, "holdout")
    assert sorted([*documents(store, tokenizer_dir), *held]) == sorted(TEXTS)
    assert 4 <= len(held) <= 22
    assert all(store.document(i)[-1] == store.end_token_id for i in range(len(TEXTS)))
    total = sum(split.text_bytes for split in store.splits.values())
    assert total == sum(len(text.encode()) for text in TEXTS)
    assert store.tokenizer_hash == Tokenizer.from_hf(tokenizer_dir).fingerprint


def test_the_order_of_files_and_the_processes_change_nothing(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = write(tmp_path / "a.jsonl", TEXTS[:25]), write(tmp_path / "b.jsonl", TEXTS[25:])
    wanted = run(tmp_path, tokenizer_dir, first, second).fingerprint
    assert run(tmp_path, tokenizer_dir, second, first).fingerprint == wanted
    monkeypatch.setattr(tokenizing, "BATCH_CHARS", 5000)
    assert run(tmp_path, tokenizer_dir, first, second, processes=2).fingerprint == wanted
    assert run(tmp_path, tokenizer_dir, first, second, seed=1).fingerprint != wanted


def test_a_text_stays_held_out_when_others_come_and_the_seed_changes(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    half = write(tmp_path / "a.jsonl", TEXTS[:30])
    store = run(tmp_path, tokenizer_dir, half, holdout=0.3)
    before = set(documents(store, tokenizer_dir, "holdout"))
    more = write(tmp_path / "b.jsonl", TEXTS[30:])
    store = run(tmp_path, tokenizer_dir, half, more, holdout=0.3, seed=7)
    assert before and before == set(documents(store, tokenizer_dir, "holdout")) & set(TEXTS[:30])


def test_two_documents_are_enough_for_a_holdout(tmp_path: Path, tokenizer_dir: Path) -> None:
    store = run(tmp_path, tokenizer_dir, write(tmp_path / "a.jsonl", TEXTS[:2]))
    assert [split.documents for split in store.splits.values()] == [1, 1]


def test_dropped_documents_are_counted_by_reason(tmp_path: Path, tokenizer_dir: Path) -> None:
    similar = TEXTS[0] + " and"
    texts = [*TEXTS[:10], TEXTS[3].replace(" ", "  "), similar, "x", "=" * 80]
    path = write(tmp_path / "a.jsonl", texts)
    store = run(tmp_path, tokenizer_dir, path)
    report = store.index["report"]
    assert report["dropped"] == {
        "short": 1,
        "symbols": 1,
        "exact duplicate": 1,
        "near duplicate": 1,
    }
    assert report["examples"]["symbols"] == [{"from": f"{path} line 14", "text": "=" * 80}]
    (equal,), (near,) = (report["examples"][f"{kind} duplicate"] for kind in ("exact", "near"))
    assert equal["text"] == texts[10][:120] and near["text"] == similar[:120]
    assert store.index["documents"] == 10 == report["documents_read"] - 4
    options = {"filters": None, "exact_duplicates": False, "near_duplicates": 0.0}
    assert run(tmp_path, tokenizer_dir, path, **options).index["documents"] == 14


def test_control_tokens_in_a_text_are_text(tmp_path: Path, tokenizer_dir: Path) -> None:
    text = "He wrote <|endoftext|> and <|im_end|> on the wall."
    store = run(tmp_path, tokenizer_dir, write(tmp_path / "a.jsonl", [text]))
    ids = store.document(0).tolist()
    assert ids.count(store.end_token_id) == 1 and documents(store, tokenizer_dir) == [text]


def test_long_documents_give_the_tokens_of_the_whole(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n".join(f"The {n} cats,\n\n  and {n} dogs." for n in range(50))
    path = write(tmp_path / "a.jsonl", [text])
    whole = run(tmp_path, tokenizer_dir, path).document(0).tolist()
    monkeypatch.setattr(tokenizing, "_PIECE_CHARS", 40)
    assert run(tmp_path, tokenizer_dir, path).document(0).tolist() == whole


def test_a_single_document_cannot_be_held_out_and_that_is_said(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(TEXTS[:8]))
    store = run(tmp_path, tokenizer_dir, str(path))
    assert "--document-separator" in store.index["report"]["warnings"][0]
    source = SourceOptions(separator="blank-line")
    store = run(tmp_path, tokenizer_dir, str(path), source=source)
    assert store.index["documents"] == 8 and store.split("holdout").documents == 1


def test_nothing_left_is_an_error_and_leaves_nothing(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["x", "y", ""])
    with pytest.raises(DataError, match="no document is left: 3 read, dropped: 3 short"):
        run(tmp_path, tokenizer_dir, path)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match=r"no document is left: 0 read\. Give files that hold text"):
        run(tmp_path, tokenizer_dir, str(tmp_path / "empty.txt"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "empty.txt"]


def test_a_failure_in_the_middle_leaves_the_old_store(tmp_path: Path, tokenizer_dir: Path) -> None:
    good = write(tmp_path / "a.jsonl", TEXTS[:4])
    wanted = run(tmp_path, tokenizer_dir, good).fingerprint
    (tmp_path / "b.jsonl").write_text('{"text": "fine, this one"}\n{"text": ')
    with pytest.raises(DataError, match=r"b.jsonl: line 2"):
        run(tmp_path, tokenizer_dir, good, str(tmp_path / "b.jsonl"))
    assert TokenStore.open(tmp_path / "store", verify=True).fingerprint == wanted
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["a.jsonl", "b.jsonl", "store"]


def test_progress_goes_from_reading_to_writing(tmp_path: Path, tokenizer_dir: Path) -> None:
    seen: list[Progress] = []
    inputs = (write(tmp_path / "a.jsonl", TEXTS[:4]),)
    out = str(tmp_path / "store")
    config = PrepareConfig(inputs=inputs, tokenizer=str(tokenizer_dir), out=out)
    prepare(config, progress=seen.append)
    assert list(dict.fromkeys(at.stage for at in seen)) == ["read", "duplicates", "write"]
    assert (seen[-1].done, seen[-1].total, seen[-1].documents) == (4, 4, 4)


@pytest.mark.parametrize(
    "change", [{"inputs": ()}, {"holdout": 1.0}, {"near_duplicates": 2.0}, {"processes": 0}]
)
def test_settings_that_cannot_be_meant_are_named(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        PrepareConfig(**{"inputs": ("a",), "tokenizer": "t", "out": "o", **change})


def test_without_rules_only_texts_of_nothing_are_dropped(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    path = write(tmp_path / "a.jsonl", ["x", "===", " \n", ""])
    store = run(tmp_path, tokenizer_dir, path, filters=None)
    assert sorted(
        documents(store, tokenizer_dir, "train") + documents(store, tokenizer_dir, "holdout")
    ) == ["===", "x"]
    assert store.index["report"]["dropped"]["empty"] == 2


def test_a_full_disk_is_said_and_leaves_nothing(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = write(tmp_path / "a.jsonl", TEXTS[:3])
    monkeypatch.setattr(Spool, "add", full)
    with pytest.raises(OSError, match=f"the disk of {tmp_path} is full"):
        run(tmp_path, tokenizer_dir, path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.full
@pytest.mark.parametrize("delay", [0.3, 0.6, 0.9, 1.2, 1.5, 1.8])
def test_a_killed_prepare_leaves_the_old_store(
    tmp_path: Path, tokenizer_dir: Path, delay: float
) -> None:
    wanted = run(tmp_path, tokenizer_dir, write(tmp_path / "a.jsonl", TEXTS[:4])).fingerprint
    more = write(tmp_path / "b.jsonl", [sentence(n, 400) for n in range(2000)])
    command = [sys.executable, "-m", "fastllm", "data", "prepare", more, "--overwrite"]
    command += ["--tokenizer", str(tokenizer_dir), "--out", str(tmp_path / "store")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        time.sleep(delay)
        process.kill()
    store = TokenStore.open(tmp_path / "store", verify=True)
    assert process.returncode == 0 or store.fingerprint == wanted
