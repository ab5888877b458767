"""Calls of a few elements wake no other thread."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, torch
from fastllm.ops import attention, rms_norm, rope, swiglu
torch.set_num_threads(2)
threads = lambda: len(os.listdir("/proc/self/task"))
one, many = torch.ones(1, 64), torch.empty(4096, 64)
row, table = torch.zeros(1, dtype=torch.int32), torch.ones(1, 32)
before = threads()
rms_norm(one, one[0])
swiglu(one, one)
rope(one[None], row, table, table)
attention(*[one[None, None]] * 3)
few = threads() - before
rms_norm(many, one[0])
print(few, threads() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_a_row_wakes_no_other_thread_and_many_rows_do() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    few, many = map(int, done.stdout.split())
    assert few == 0 and many > 0
