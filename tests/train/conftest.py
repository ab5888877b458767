"""A tiny token store; commands in forked processes that share one import; groups of processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from fastllm.models.tokenizer import Tokenizer
from fastllm.train.data.store_writer import StoreWriter, Vocabulary

END = "<|endoftext|>"
WORDS = "the cat sat on a mat and saw one red bird sing in that old tree all day long".split()


@dataclass(frozen=True)
class Tiny:
    """A store of made-up sentences under a tokenizer of single bytes."""

    store: Path
    tokenizer: Path

    def words(self, out: Path, *more: str) -> list[str]:
        """Arguments of `fastllm pretrain` for a model of 25,000 parameters that learns at once."""
        return [
            f"data.store={self.store}", f"data.tokenizer={self.tokenizer}", f"loop.out={out}",
            "model.depth=2", "model.width=32", "model.head_dim=16", "data.seq_len=32",
            "data.batch_tokens=128", "data.micro_rows=2", "optim.name=adamw", "optim.lr=0.01",
            "loop.schedule.warmup=2", "loop.metrics.every=1", "loop.metrics.report=false",
            "loop.eval_every=0", *more,
        ]  # fmt: skip


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [],
        trainers.BpeTrainer(
            vocab_size=257, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = Tokenizer(backend, special_tokens={"bos_token": END, "eos_token": END})
    path = folder / "tokenizer"
    path.mkdir()
    tokenizer.save(path)
    vocabulary = Vocabulary(
        vocab_size=tokenizer.vocab_size, start_token_id=0, end_token_id=0,
        sha256=tokenizer.fingerprint, name=str(path),
    )  # fmt: skip
    g = np.random.default_rng(0)
    with StoreWriter(folder / "store", vocabulary) as writer:
        for split, documents in (("train", 60), ("holdout", 8)):
            writer.split(split)
            for _ in range(documents):
                text = " ".join(g.choice(WORDS, size=int(g.integers(3, 30))))
                writer.add([*tokenizer.encode(text), 0], len(text))
        writer.finish()
    return Tiny(folder / "store", path)


def group_environments(count: int) -> list[dict[str, str]]:
    """What torchrun would put into the environment of each process of a group on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return [{**shared, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(count)]


def run_group(program: str, timeout: float = 240.0, count: int = 2) -> list[str]:
    """Run a Python program in each process of a group, one thread each; what each has printed.

    Fails with the errors of those that did not end well; none is left running.
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program], env={**os.environ, "OMP_NUM_THREADS": "1", **env},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for env in group_environments(count)
    ]  # fmt: skip
    deadline = time.monotonic() + timeout
    try:
        done = [p.communicate(timeout=max(deadline - time.monotonic(), 1.0)) for p in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    failed = [f"process {rank}: {done[rank][1][-3000:]}"
              for rank, process in enumerate(processes) if process.returncode]  # fmt: skip
    assert not failed, "\n".join(failed)
    return [out for out, _ in done]


@pytest.fixture(scope="session")
def group() -> Callable[..., list[str]]:
    """`run_group`."""
    return run_group


_SERVER = """
import json, os, sys
import torch, torch._dynamo  # which torch's optimizers and DTensor import when they are first used
import fastllm.cli.main, fastllm.cli.pretrain, fastllm.train.pretrain

for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
        _, status = os.waitpid(request["wait"], 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2), os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(request["env"])
        torch.set_num_threads(1)
        code = fastllm.cli.main.main(request["argv"])
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(pid, flush=True)
"""


class Runner:
    """Runs `fastllm` commands in children of a process that has imported everything already.

    That process never computes, so no thread pool is lost in the fork.
    """

    def __init__(self, log: Path) -> None:
        self.log = log
        self._server = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", _SERVER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def start(self, argv: Sequence[str], env: dict[str, str] | None = None) -> int:
        """Start a command; its process id."""
        return self._ask({"argv": list(argv), "env": env or {}, "log": str(self.log)})

    def wait(self, pid: int) -> int:
        """Its exit status; minus the signal that ended it."""
        return self._ask({"wait": pid})

    def run(self, argv: Sequence[str], processes: int = 1) -> int:
        """Run a command to its end, in so many processes of one group; the worst status."""
        if processes == 1:
            return self.wait(self.start(argv))
        pids = [self.start(argv, env) for env in group_environments(processes)]
        return max(self.wait(pid) for pid in pids)

    def stop_when(
        self, argv: Sequence[str], file: Path, holds: Callable[[str], bool],
        number: int = signal.SIGKILL, delay: float = 0.0,
    ) -> int:  # fmt: skip
        """Start a command and end it by a signal, `delay` seconds after the text of `file` is such;
        its exit status.
        """
        pid = self.start(argv)
        deadline = time.monotonic() + 120
        while not (file.exists() and holds(file.read_text())):
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.002)
        time.sleep(delay)
        os.kill(pid, number)
        return self.wait(pid)

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()
        assert self._server.stdout is not None
        self._server.stdout.close()

    def _ask(self, request: dict[str, Any]) -> int:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())


@pytest.fixture(scope="session")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    server = Runner(tmp_path_factory.mktemp("runner") / "log")
    yield server
    server.close()
