"""What this machine is: processor, memory, accelerators, threads, library versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch

from .. import _C, __version__

LIBRARIES = (
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "tokenizers",
    "transformers",
    "llama-cpp-python",
)


def processor() -> str:
    """The processor's name, with its numbers on x86: virtual machines call many the same."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""

    def field(name: str) -> str:
        match = re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)
        return match.group(1) if match else ""

    name, family, model = field("model name"), field("cpu family"), field("model")
    if name and family:
        return f"{name} (family {family}, model {model})"
    return name or platform.processor() or platform.machine()


def usable_cores() -> int:
    """Logical cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def memory() -> tuple[int, int]:
    """Total and available bytes."""
    text = Path("/proc/meminfo").read_text()
    total, available = (
        int(re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE).group(1)) * 1024  # type: ignore[union-attr]
        for name in ("MemTotal", "MemAvailable")
    )
    return total, available


def accelerators() -> list[str]:
    """Names of the CUDA devices that torch sees."""
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def device_name(device: str) -> str:
    """What a measurement's `device` field says: the processor with its threads, or the GPU."""
    if device == "cpu":
        return f"{processor()}, {_C.num_threads()} threads, {_C.isa()}"
    return torch.cuda.get_device_name(device)


def versions() -> dict[str, str]:
    """Library versions; a library that is not installed is left out."""
    found = {"fastllm": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit(root: Path | None = None) -> str:
    """The commit of the source tree that a measurement was made with, `+` marking local changes.

    Outside a checkout of fastllm this is the package's version.
    """
    top = root or Path.cwd()
    if not (top / "csrc" / "ops.h").exists() or shutil.which("git") is None:
        return f"v{__version__}"
    git = ["git", "-C", str(top)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    if head.returncode != 0:
        return f"v{__version__}"
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
    )
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
