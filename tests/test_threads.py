"""Threads and ISA levels: switching in process, forks, the GIL, one OpenMP runtime."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import Tensor

from fastllm import _C, graph
from fastllm.ops import rms_norm, top_log_probs
from fastllm.testing.opinfo import generator


def norm(seed: int = 0, rows: int = 64) -> tuple[Tensor, Tensor]:
    g = generator(seed)
    return torch.randn(rows, 256, generator=g), torch.randn(256, generator=g)


def test_isa_levels_switch_in_process() -> None:
    x, w = norm()
    levels = _C.isas()
    assert levels[0] == "generic"
    for level in levels:
        _C.set_isa(level)
        assert _C.isa() == level
        torch.testing.assert_close(rms_norm(x, w), rms_norm(x.double(), w.double()).float())
    with pytest.raises(ValueError, match=r"'sse9' does not run.*generic"):
        _C.set_isa("sse9")
    assert _C.isa() == levels[-1]


def test_the_environment_forces_a_level_and_refuses_an_unknown_one() -> None:
    code = "import torch, fastllm._C as c; print(c.isa())"

    def run(level: str) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"FASTLLM_ISA": level}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)

    assert run("generic").stdout.strip() == "generic"
    wrong = run("pentium")
    assert wrong.returncode != 0 and "'pentium' does not run on this processor" in wrong.stderr


def test_threads_follow_torch() -> None:
    x, w = norm()
    want = rms_norm(x, w)
    for threads in (1, 2, 3, 5, 1):
        torch.set_num_threads(threads)
        assert _C.num_threads() == threads
        assert torch.equal(rms_norm(x, w), want)


def test_a_forked_child_can_run_an_op() -> None:
    # A child has none of its parent's workers. torch documents one thread in the child as safe: its
    # OpenMP runtime does not survive a fork with more.
    x, w = norm()
    torch.set_num_threads(2)
    want = rms_norm(x, w)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os._exit(0 if torch.equal(rms_norm(x, w), want) else 1)
    deadline = time.monotonic() + 60
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(done[1]) == 0
    assert torch.equal(rms_norm(x, w), want)  # and the parent goes on


def test_the_gil_is_released_while_a_kernel_runs() -> None:
    torch.set_num_threads(1)
    logits = torch.randint(0, 3, (8, 200_000), generator=generator()).float()
    ticks: list[float] = []
    stop = threading.Event()

    def count() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)

    other = threading.Thread(target=count)
    other.start()
    try:
        begin = time.perf_counter()
        top_log_probs(logits, 200_000)  # sorts 8 rows: tens of milliseconds in one native call
        end = time.perf_counter()
    finally:
        stop.set()
        other.join()
    assert end - begin > 0.01
    assert len([t for t in ticks if begin + 0.002 < t < end - 0.002]) >= 3


def test_calls_from_two_python_threads_are_right() -> None:
    torch.set_num_threads(2)
    inputs = [norm(seed, rows=200) for seed in range(2)]
    wants = [rms_norm(x, w) for x, w in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(200):
            if not torch.equal(rms_norm(*inputs[i]), wants[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
        assert not worker.is_alive()
    assert not wrong


def test_a_graph_replays_from_another_thread() -> None:
    x, w = norm()
    captured, y = graph.record(lambda: rms_norm(rms_norm(x, w), w))
    x.copy_(norm(1)[0])
    worker = threading.Thread(target=captured.replay)
    worker.start()
    worker.join(timeout=60)
    assert not worker.is_alive()
    assert torch.equal(y, rms_norm(rms_norm(x, w), w))


def test_a_capture_records_its_own_thread_only() -> None:
    x, w = norm()
    with graph.capture() as captured:
        worker = threading.Thread(target=rms_norm, args=(x, w))
        worker.start()
        worker.join(timeout=60)
    assert captured.names() == []


ONE_RUNTIME = """
import torch
before = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line}
from fastllm import _C
from fastllm.ops import rms_norm
rms_norm(torch.ones(64, 256), torch.ones(256))
after = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line}
assert _C.thread_runtime() == "libgomp (shared with torch)", _C.thread_runtime()
assert before == after, after - before
assert len([path for path in after if "gomp" in path or "iomp" in path]) == 1, after
"""


def test_an_op_uses_torchs_openmp_and_maps_no_second_one() -> None:
    # In a process of its own: other tests import libraries that may carry a runtime.
    subprocess.run([sys.executable, "-c", ONE_RUNTIME], check=True, timeout=120)
