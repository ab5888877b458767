"""One writer of a file or folder at a time; the death of a process lets go of what it held."""

from __future__ import annotations

import errno
import fcntl
import os
from typing import IO, Any

# What file systems of clusters that have no locks answer: there a second writer is not noticed.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


def lock(file: IO[Any], held: str | None = None, path: str | os.PathLike[str] = "") -> None:
    """Lock an open file until it is closed, where the file system knows locks.

    held: what is wrong if another process has it, and what helps; then BlockingIOError is raised
    with it and `path`. None: wait for the other one.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if held is None else fcntl.LOCK_NB))
    except BlockingIOError as error:
        raise BlockingIOError(error.errno, held, os.fspath(path)) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
