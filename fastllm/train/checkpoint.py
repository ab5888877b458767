"""Checkpoints: a directory that is whole or not there, and that can be checked later.

    step-000120/
      config.json, model.safetensors, tokenizer.json ...   what transformers and `fastllm chat` load
      state/*.safetensors   optimizer and random states, each process's part
      trainer.json          step, data position, settings, what must not change
      manifest.json         size and SHA-256 of every file above

It is written under a name of its own (`.tmp-step-000120`), every file and the directory are
flushed to disk, and then it is renamed: a kill or a power cut at any moment leaves the checkpoints
before it as they were. Nothing in it is pickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fastllm.errors import CheckpointError
from fastllm.models.disk import sha256_file, sync
from fastllm.train import distributed
from fastllm.train.config import flat
from fastllm.train.state import (
    copy_to_host,
    load_into,
    load_optimizer_state,
    load_random_state,
    optimizer_state,
    random_state,
    seed_all,
    write_sharded,
)
from fastllm.train.task import Task

FORMAT = 1
STATE, TRAINER, MANIFEST = "state", "trainer.json", "manifest.json"

_NAME = re.compile(r"step-(\d{6,})")
_ASIDE = ".tmp-"

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """What `trainer.json` says."""

    step: int
    world: int
    progress: dict[str, Any]
    settings: dict[str, Any]
    identity: dict[str, Any]
    batches: dict[str, Any]
    optimizer: dict[str, Any]  # numbers by parameter
    evaluation: dict[str, float] = field(default_factory=dict)
    format: int = FORMAT


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A run's state, copied to host memory: training may go on while it is written."""

    saved: Saved
    weights: dict[str, Tensor]  # whole; empty on every process but the first
    state: dict[str, Tensor]


def take_snapshot(
    task: Task, *, step: int, progress: dict[str, Any], settings: Mapping[str, Any],
    evaluation: Mapping[str, float],
) -> Snapshot:  # fmt: skip
    """Copy everything that a later step would change. Every process must call it."""
    tensors, numbers = optimizer_state(task.model, task.optimizer)
    tensors |= task.state()
    weights = {}
    for name, tensor in task.weights().items():
        value = distributed.whole(tensor.detach())
        if distributed.rank() == 0:
            if distributed.is_master(tensor):
                value = value.bfloat16()
            weights[name] = copy_to_host(value)
    return Snapshot(
        saved=Saved(
            step=step,
            world=distributed.world(),
            progress=progress,
            settings=dict(settings),
            identity=task.identity(),
            batches=task.batches.state_dict(),
            optimizer=numbers,
            evaluation=dict(evaluation),
        ),
        weights=weights,
        state={name: copy_to_host(t) for name, t in (tensors | random_state()).items()},
    )


class Checkpoint:
    """One directory on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def problem(self) -> str | None:
        """What is damaged, None if every file is there with the bytes that were written."""
        try:
            manifest = json.loads((self.path / MANIFEST).read_bytes())
            files: dict[str, dict[str, Any]] = manifest["files"]
            for name, entry in files.items():
                file = self.path / name
                if not file.is_file():
                    return f"{name} is missing"
                if file.stat().st_size != entry["bytes"]:
                    return f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}"
                if sha256_file(file) != entry["sha256"]:
                    return f"{name} does not hold the bytes that were written"
        except FileNotFoundError:
            return f"{MANIFEST} is missing"
        except (ValueError, KeyError, TypeError):
            return f"{MANIFEST} cannot be read"
        return None

    def trainer(self) -> Saved:
        """What trainer.json says. Raises CheckpointError."""
        values = json.loads((self.path / TRAINER).read_bytes())
        if values.get("format") != FORMAT:
            raise CheckpointError(
                f"{self.path} has format {values.get('format')!r}, this fastllm reads {FORMAT}"
            )
        return Saved(**values)

    def restore(self, task: Task, say: Say) -> Saved:
        """Put weights, optimizer, data position and random states back into `task`.

        Raises CheckpointError if the checkpoint is of another model, tokenizer or data.
        """
        saved = self.trainer()
        refuse_other(self.path, saved.identity, task.identity())
        try:
            task.read_weights(self.path)
            load_optimizer_state(task.model, task.optimizer, self.path / STATE, saved.optimizer)
            load_into(task.state(), self.path / STATE)
            task.batches.load_state_dict(saved.batches)
        except ValueError as error:
            raise CheckpointError(f"{self.path} cannot be resumed here: {error}") from error
        if saved.world == distributed.world():
            load_random_state(self.path / STATE)
        else:
            say(f"{saved.world} processes wrote it, {distributed.world()} read it: random states "
                "(dropout) start from the seed and the step")  # fmt: skip
            seed_all(torch.initial_seed() + (saved.step << 20))
        return saved


def refuse_other(path: Path, saved: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raise CheckpointError naming what a resume cannot change, if it differs."""
    before, now = flat(json.loads(json.dumps(saved))), flat(json.loads(json.dumps(mine)))
    wrong = [
        f"{key} is {before.get(key)!r:.80} there and {now.get(key)!r:.80} here"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key)
    ]
    if wrong:
        raise CheckpointError(
            f"{path} is of another run: {'; '.join(wrong)}. These cannot change at a resume: give "
            "the same, or start a new run in another folder"
        )


def differences(saved: Mapping[str, Any], mine: Mapping[str, Any]) -> list[str]:
    """A line for every setting that a resumed run changes."""
    before, now = flat(json.loads(json.dumps(saved))), flat(json.loads(json.dumps(mine)))
    return [
        f"{key} was {before.get(key)!r:.80}, is now {now.get(key)!r:.80}"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key) and key not in ("loop.resume", "loop.out")
    ]


class Checkpoints:
    """The checkpoints of a run: `directory`/step-N, the newest `keep` of them."""

    def __init__(self, directory: Path, *, keep: int, asynchronous: bool = True) -> None:
        self.directory = directory
        self.keep = keep
        self.asynchronous = asynchronous
        self._thread: ThreadPoolExecutor | None = None
        self._writing: tuple[int, Future[None]] | None = None

    def all(self) -> list[Checkpoint]:
        """Oldest first; whole ones and damaged ones."""
        if not self.directory.is_dir():
            return []
        found = [p for p in self.directory.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()]
        return [Checkpoint(p) for p in sorted(found, key=step_of)]

    def newest(self) -> Path | None:
        """The newest directory that was renamed into place."""
        there = self.all()
        return there[-1].path if there else None

    def find(self, resume: str, say: Say) -> Checkpoint | None:
        """What `resume` ("auto" or a path) means; None if there is no checkpoint at all.

        With "auto" a damaged checkpoint is named and the one before it taken.
        Raises CheckpointError if every one is damaged, or the one at the path.
        """
        found = distributed.gather(self._find(resume, say) if distributed.rank() == 0 else None)[0]
        if isinstance(found, str):
            raise CheckpointError(found)
        return None if found is None else Checkpoint(found)

    def _find(self, resume: str, say: Say) -> Path | str | None:
        """The path, None, or what is wrong."""
        if resume != "auto":
            path = Path(resume)
            if not path.is_dir():
                return f"there is no checkpoint at {path}"
            problem = Checkpoint(path).problem()
            return path if problem is None else f"{path} is damaged: {problem}; try --resume auto"
        there = self.all()
        for checkpoint in reversed(there):
            problem = checkpoint.problem()
            if problem is None:
                return checkpoint.path
            say(f"{checkpoint.path} is damaged ({problem}): the one before it is used")
        return f"every checkpoint in {self.directory} is damaged" if there else None

    def set_aside_after(self, step: int, say: Say) -> None:
        """Take later checkpoints out of the count: damaged ones, or those of a course that the run
        leaves. They are renamed, never deleted."""
        if distributed.rank() != 0:
            return
        for later in self.all():
            if step_of(later.path) > step:
                number = 1
                while (kept := self.directory / f"aside-{number}-{later.path.name}").exists():
                    number += 1
                os.rename(later.path, kept)
                say(f"{later.path.name} is after the step that the run goes on from: now {kept}")

    def save(self, task: Task, snapshot: Snapshot, say: Say, *, last: bool = False) -> None:
        """Begin to write `snapshot`; waits for the one before it first. Every process calls it.

        A disk that is full or gone is said and training goes on, unless it is the `last` one: then
        OSError is raised.
        """
        self.wait(say)
        group = distributed.host_group()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        job = self._thread.submit(self._write, task, snapshot, group)
        self._writing = (snapshot.saved.step, job)
        if last or not self.asynchronous:
            self.wait(say, last=last)

    def wait(self, say: Say, *, last: bool = False) -> None:
        """Wait for the checkpoint that is being written, and say so if it could not be."""
        if self._writing is None:
            return
        (step, job), self._writing = self._writing, None
        try:
            job.result()
        except OSError as error:
            kept = self.newest()
            remains = f"the newest is still {kept}" if kept else "there is none yet"
            message = f"the checkpoint of step {step} could not be written: {error}; {remains}"
            if last:
                raise OSError(message) from error
            say(f"warning: {message}; training goes on")

    def close(self, say: Say) -> None:
        """Let the writer finish."""
        self.wait(say)
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None

    # in the writer's thread

    def _write(self, task: Task, snapshot: Snapshot, group: Any) -> None:
        rank, name = distributed.rank(), f"step-{snapshot.saved.step:06d}"
        aside = self.directory / f"{_ASIDE}{name}"
        try:
            self._agree(group, lambda: self._begin(task, snapshot, aside))
            hashes = self._agree(group, lambda: _write_state(snapshot, aside, group))
            self._agree(group, lambda: self._finish(snapshot, aside, name, hashes))
        except OSError:
            if rank == 0:  # a full disk gets its room back
                shutil.rmtree(aside, ignore_errors=True)
            raise

    def _agree(self, group: Any, work: Callable[[], Any]) -> list[Any]:
        """Do `work`; its results of all processes, or on all of them the OSError of any."""
        result, error = None, None
        try:
            result = work()
        except OSError as caught:
            error = str(caught) or type(caught).__name__
        except SafetensorError as caught:  # its only errors while writing are the system's
            error = str(caught)
        everyone = distributed.gather((result, error), group)
        problems = [error for _, error in everyone if error is not None]
        if problems:
            raise OSError(problems[0])
        return [result for result, _ in everyone]

    def _begin(self, task: Task, snapshot: Snapshot, aside: Path) -> None:
        """The first process makes the directory, with the model's files in it."""
        if distributed.rank() != 0:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        sync(self.directory.parent)
        for left in self.directory.glob(f"{_ASIDE}*"):
            shutil.rmtree(left)
        task.write_weights(snapshot.weights, aside)
        (aside / STATE).mkdir()

    def _finish(
        self, snapshot: Snapshot, aside: Path, name: str, hashes: list[dict[str, Any]]
    ) -> None:
        """The first process adds the manifest, flushes, renames and prunes."""
        if distributed.rank() != 0:
            return
        saved = snapshot.saved
        values = {key: getattr(saved, key) for key in Saved.__slots__}
        text = json.dumps(values, indent=1, allow_nan=True)
        (aside / TRAINER).write_text(text + "\n", encoding="utf-8")
        files = {k: v for part in hashes for k, v in part.items()}
        for file in sorted(p for p in aside.rglob("*") if p.is_file()):
            files.setdefault(str(file.relative_to(aside)), _entry(file))
        manifest = {"format": FORMAT, "step": saved.step, "files": dict(sorted(files.items()))}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for path in [*aside.rglob("*"), aside]:
            sync(path)
        target = self.directory / name
        if target.exists():  # a resumed run has come to the same step again
            old = self.directory / f"{_ASIDE}old-{name}"
            os.rename(target, old)
            os.rename(aside, target)
            shutil.rmtree(old)
        else:
            os.rename(aside, target)
        sync(self.directory)
        self._prune()

    def _prune(self) -> None:
        for old in self.all()[: -self.keep]:
            # Renamed first: a directory that is half deleted must not look like a checkpoint.
            doomed = self.directory / f"{_ASIDE}{old.path.name}"
            os.rename(old.path, doomed)
            shutil.rmtree(doomed)


def _write_state(snapshot: Snapshot, aside: Path, group: Any) -> dict[str, Any]:
    """This process's part of the state; its files with sizes and hashes."""
    names = write_sharded(snapshot.state, aside / STATE, group)
    return {f"{STATE}/{name}": _entry(aside / STATE / name) for name in names}


def _entry(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256_file(file)}


def newest_of(out: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint of the run in folder `out`, whole or damaged; None if there is none."""
    return Checkpoints(Path(out) / "checkpoints", keep=1).newest()


def refuse_used(out: str | os.PathLike[str], resume: str) -> None:
    """Raise CheckpointError if `out` holds a run that `resume` ("none") does not continue.

    The loop asks; stages ask before they compute anything that would be lost.
    """
    newest = newest_of(out)
    if resume == "none" and newest is not None:
        raise CheckpointError(
            f"{os.fspath(out)} holds a run already ({newest.name}): continue it with resume auto "
            "(--resume auto), or choose another folder (--out)"
        )


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    found = _NAME.fullmatch(path.name)
    assert found is not None, "only such names are listed"
    return int(found.group(1))
