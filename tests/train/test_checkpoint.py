"""Checkpoints on disk: whole or not there, checked, pruned, read by others."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastllm
from fastllm.errors import CheckpointError
from fastllm.nn.batch import Documents
from fastllm.train import checkpoint, loop, pretrain, state
from fastllm.train.checkpoint import Checkpoint
from fastllm.train.pretrain import Pretraining


def train(tiny: Any, out: Path, *words: str) -> tuple[Pretraining, loop.Result]:
    torch.set_num_threads(1)
    config = pretrain.load(None, tiny.words(out, *words))
    task = Pretraining(config, torch.device("cpu"))
    return task, loop.run(task, config.loop)


@pytest.fixture(scope="module")
def run(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with its last two checkpoints."""
    out = tmp_path_factory.mktemp("run") / "run"
    train(tiny, out, "loop.steps=6", "loop.save_every=2")
    return out


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def test_the_newest_are_kept_and_nothing_lies_beside_them(run: Path) -> None:
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert names == ["step-000004", "step-000006"]
    for name in names:
        assert Checkpoint(run / "checkpoints" / name).problem() is None


def test_the_manifest_names_every_file_and_no_file_is_a_pickle(run: Path) -> None:
    path = run / "checkpoints" / "step-000006"
    files = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest["files"]) == files - {"manifest.json"}
    assert {Path(f).suffix for f in files} <= {".json", ".safetensors", ".jinja"}


def test_a_checkpoint_is_a_model_that_others_load(tiny: Any, copy: Path) -> None:
    path = copy / "checkpoints" / "step-000006"
    task, _ = train(tiny, copy, "loop.steps=6", "loop.resume=auto")
    ids = [5, 9, 7, 80, 33]
    with torch.no_grad():
        wanted = task.decoder.logits(task.decoder.train_hidden(Documents.pack([ids])))
    llm = fastllm.LLM(path, dtype="bfloat16")
    assert torch.equal(llm.logits(ids), wanted)
    assert llm.tokenizer.decode(llm.tokenizer.encode("the cat")) == "the cat"


def test_transformers_gives_the_same_logits(run: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = run / "checkpoints" / "step-000006"
    ids = [5, 9, 7, 80, 33]
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        wanted = theirs(torch.tensor([ids])).logits[0]
    got = fastllm.LLM(path, dtype="float32").logits(ids)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "name", "problem"),
    [
        (cut, "model.safetensors", r"model\.safetensors has \d+ bytes instead of \d+"),
        (flip, "model.safetensors", r"model\.safetensors does not hold the bytes"),
        (flip, "trainer.json", r"trainer\.json does not hold the bytes"),
        (flip, "state/shard-00001-model-00001-of-00001.safetensors", "does not hold the bytes"),
        (Path.unlink, "tokenizer.json", r"tokenizer\.json is missing"),
        (Path.unlink, "manifest.json", r"manifest\.json is missing"),
        (cut, "manifest.json", "bytes|cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    damage: Callable[[Path], None], name: str, problem: str, tiny: Any, copy: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    newest = copy / "checkpoints" / "step-000006"
    if (
        damage is cut and name == "manifest.json"
    ):  # without its last brace; the newline alone is none
        (newest / name).write_text((newest / name).read_text().rstrip())
    damage(newest / name)
    found = checkpoint.Checkpoints(copy / "checkpoints", keep=2).find("auto", print)
    assert found is not None and found.path.name == "step-000004"
    said = capsys.readouterr().out
    assert "step-000006 is damaged" in said and "the one before it is used" in said
    assert re.search(problem, said), said
    with pytest.raises(CheckpointError, match=r"step-000006 is damaged: .*--resume auto"):
        checkpoint.Checkpoints(copy / "checkpoints", keep=2).find(str(newest), print)


def test_after_damage_the_run_gives_the_same_end(tiny: Any, copy: Path, run: Path) -> None:
    newest = copy / "checkpoints" / "step-000006"
    flip(newest / "model.safetensors")
    train(tiny, copy, "loop.steps=6", "loop.save_every=2", "loop.resume=auto")
    wanted = (run / "checkpoints" / "step-000006" / "model.safetensors").read_bytes()
    assert (newest / "model.safetensors").read_bytes() == wanted
    assert Checkpoint(newest).problem() is None


def test_going_back_leaves_the_later_checkpoint_aside(
    tiny: Any, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / "checkpoints" / "step-000004"
    words = ("loop.steps=5", "loop.keep=1", "loop.metrics.progress=plain")
    _, result = train(tiny, copy, *words, f"loop.resume={path}")
    names = sorted(p.name for p in (copy / "checkpoints").iterdir())
    assert names == ["aside-1-step-000006", "step-000005"]
    assert result.checkpoint == copy / "checkpoints" / "step-000005"
    assert "step-000006 is after the step that the run goes on from" in capsys.readouterr().err


def test_if_all_are_damaged_no_new_run_starts(tiny: Any, copy: Path) -> None:
    for path in (copy / "checkpoints").iterdir():
        cut(path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
        train(tiny, copy, "loop.steps=6", "loop.resume=auto")


def test_what_a_killed_writer_leaves_is_neither_used_nor_kept(tiny: Any, copy: Path) -> None:
    aside = copy / "checkpoints" / ".tmp-step-000008"
    shutil.copytree(copy / "checkpoints" / "step-000006", aside)
    (aside / "manifest.json").unlink()
    found = checkpoint.Checkpoints(copy / "checkpoints", keep=2).find("auto", print)
    assert found is not None and found.path.name == "step-000006"
    train(tiny, copy, "loop.steps=7", "loop.resume=auto")
    names = sorted(p.name for p in (copy / "checkpoints").iterdir())
    assert names == ["step-000006", "step-000007"]


def test_a_changed_setting_is_said_and_taken(
    tiny: Any, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, result = train(
        tiny, copy, "loop.steps=8", "optim.lr=0.002", "loop.schedule.kind=constant",
        "loop.resume=auto", "loop.metrics.progress=plain",
    )  # fmt: skip
    said = capsys.readouterr().err
    assert "resume: loop.steps was 6, is now 8" in said
    assert "resume: loop.schedule.kind was 'cosine', is now 'constant'" in said
    assert result.step == 8
    last = json.loads((copy / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["lr"] == 0.002


@pytest.mark.parametrize(
    ("word", "what"),
    [
        ("model.width=48", r"model\.hidden_size is 32 there and 48 here"),
        ("model.layers=3", r"model\.num_hidden_layers is 2 there and 3 here"),
        ("dtype=float32", r"model\.dtype is 'bfloat16' there and 'float32' here"),
        ("data.seq_len=16", "seq_len|max_position_embeddings"),
        ("loop.seed=5", "saved with seed 0, this run has 5"),
    ],
)
def test_what_cannot_change_is_refused(tiny: Any, copy: Path, word: str, what: str) -> None:
    with pytest.raises(CheckpointError, match=what):
        train(tiny, copy, "loop.steps=8", "loop.resume=auto", word)


def test_a_path_that_is_no_checkpoint_is_named(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no checkpoint at .*nothing"):
        train(tiny, tmp_path / "run", "loop.steps=2", f"loop.resume={tmp_path / 'nothing'}")


def full_disk(monkeypatch: pytest.MonkeyPatch, where: str, at: int) -> None:
    """From its call number `at` on, a writing function finds the disk full."""
    real, calls = getattr(checkpoint, where), [0]

    def write(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] >= at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(checkpoint, where, write)


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_full_disk_is_said_and_the_older_checkpoint_kept(
    asynchronous: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    full_disk(monkeypatch, "write_sharded", at=2)
    with pytest.raises(OSError, match=r"step 6 could not be written: .*No space left.*step-000002"):
        train(
            tiny, tmp_path, "loop.steps=6", "loop.save_every=2", "loop.metrics.progress=plain",
            f"loop.async_save={asynchronous}",
        )  # fmt: skip
    said = capsys.readouterr().err
    assert "warning: the checkpoint of step 4 could not be written" in said
    assert "training goes on" in said
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    assert Checkpoint(tmp_path / "checkpoints" / "step-000002").problem() is None
    steps = [json.loads(x)["step"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_muon_resumes_to_the_bit_from_several_files(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "FILE_BYTES", 30_000)
    words = ("loop.steps=6", "loop.save_every=3", "optim.name=muon")
    whole, _ = train(tiny, tmp_path / "whole", *words)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-000006")
    files = list((tmp_path / "cut" / "checkpoints" / "step-000003" / "state").iterdir())
    assert len(files) > 3
    again, _ = train(tiny, tmp_path / "cut", *words, "loop.resume=auto")
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
