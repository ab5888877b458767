"""Folders for what a benchmark writes, gone when it is over, however it ends.

A process that is killed removes nothing. Each folder holds a file that its process keeps locked;
whoever makes the next folder of the same name removes those whose lock is free.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

_LOCK = ".lock"
_YOUNG = 60.0  # seconds that a folder may need from its making to its lock


class Scratch:
    """A folder of one process, below the system's folder for temporary files.

    name: of the kind of folder: `fastllm-NAME-...`.
    """

    def __init__(self, name: str) -> None:
        prefix = f"fastllm-{name}-"
        for left in Path(tempfile.gettempdir()).glob(f"{prefix}*/{_LOCK}"):
            _remove_if_left(left)
        self._folder = tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True)
        self.path = Path(self._folder.name)
        self._lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        """Remove the folder; the end of the process does so too."""
        self._folder.cleanup()
        os.close(self._lock)


def _remove_if_left(lock: Path) -> None:
    """Remove the folder of a lock that nobody holds."""
    try:
        file = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):  # gone meanwhile, or another user's
        return
    try:
        if time.time() - os.fstat(file).st_mtime > _YOUNG:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
    except BlockingIOError:  # its process is running
        return
    finally:
        os.close(file)
