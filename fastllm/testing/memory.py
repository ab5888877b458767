"""How much memory a call takes at its highest."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def _status_bytes(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.M)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}: memory is measured on Linux alone")
    return 1024 * int(found[1])


def peak_extra_bytes(call: Callable[[], Any], device: str = "cpu") -> int:
    """Bytes above the level before the call that were in use at once, results included.

    On the CPU it is resident memory of the process, scratch of libraries included, as the kernel
    counts its pages; on a GPU it is what torch's allocator had handed out.

    Raises:
        OSError: where the kernel does not say (not Linux).
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to the present level
    before = _status_bytes("VmRSS")
    kept = call()
    peak = _status_bytes("VmHWM")
    del kept
    return max(0, peak - before)
