"""A function in a process of its own, which a timeout really ends: the process is killed.

Whatever the function does, an endless loop, a C call that keeps Python's lock, a crash, the caller
gets an answer within the timeout. The process starts from nothing, not as a copy of this one: it
holds none of its memory, locks or GPU, and imports only what the function's file imports. Its
standard output is the caller's standard error. Ctrl-C does not reach it; it ends with its caller,
at the latest ten seconds after the timeout of the call in hand.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from typing import Any

from fastllm.train.rewards.child import receive, send
from fastllm.train.rewards.values import NotLoaded, Parameters, Raised, SampleFault

LOADING = 60.0  # seconds that running the function's file may take


class FunctionProcess:
    """Calls one function in another process.

    Args:
        target: "path/to/file.py:name" or "package.module:name".
        memory: bytes of address space that the process may have; 0: as much as it likes.
        quiet: what the function prints is dropped.

    Raises ValueError if the function cannot be loaded, saying why.
    """

    def __init__(self, target: str, *, memory: int = 0, quiet: bool = False) -> None:
        self.target = target
        self.memory = memory
        self.quiet = quiet
        self._lock = threading.Lock()
        self._owner = 0
        try:
            self.parameters = self._start()
        except TimeoutError as error:
            raise ValueError(f"{target}: loading it took longer than {LOADING:g} s") from error
        except NotLoaded as fault:
            raise ValueError(f"{target}: {fault.problem}") from fault

    def _start(self) -> Parameters:
        """Start the process. Raises NotLoaded if it cannot load the function."""
        ours, theirs = socket.socketpair()
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            "from fastllm.train.rewards.child import main; "
            f"main({theirs.fileno()}, {self.target!r}, {self.memory})"
        )
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL if self.quiet else 2,
                stderr=subprocess.DEVNULL if self.quiet else None,
                start_new_session=True,  # a terminal's Ctrl-C is the caller's to handle
            )
        self._socket = ours
        self._owner = os.getpid()
        self._end = weakref.finalize(self, _kill, self._process, ours, self._owner)
        kind, *rest = self._receive(time.monotonic() + LOADING)
        if kind != "loaded":
            self._end()
            raise NotLoaded(f"cannot be loaded: {rest[0]}")
        return rest[0]  # type: ignore[no-any-return]

    def call(
        self, args: tuple[Any, ...], columns: dict[str, Any], timeout: float, count: int | None
    ) -> Any:
        """The function's result; with `count`, which must be so many numbers, as floats.

        timeout: seconds. Raises TimeoutError, after which the process is gone and the next call
        starts another; SampleFault for what is wrong with the result, or if the function raised.
        """
        with self._lock:
            self._ensure()
            deadline = time.monotonic() + timeout
            try:
                self._socket.settimeout(timeout)
                send(self._socket, (timeout, count, args, columns))
                kind, *rest = self._receive(deadline)
            except (TimeoutError, KeyboardInterrupt):
                self._end()
                raise
            except BrokenPipeError:
                kind, rest = "ended", [self._status()]
        if kind == "done":
            return rest[0]
        if kind == "raised":
            raise Raised(f"raised {rest[0]}")
        if kind == "ended":
            raise Raised(f"its process ended with {rest[0]}")
        raise SampleFault(*rest)

    def ensure(self) -> None:
        """Start the process if there is none, so that the next call's timeout is all its own."""
        with self._lock:
            self._ensure()

    def _ensure(self) -> None:
        if self._owner != os.getpid() or not self._end.alive:  # a fork's twin, or killed
            self._start()

    def _receive(self, deadline: float) -> tuple[Any, ...]:
        def wait() -> None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)

        try:
            return receive(self._socket, wait)  # type: ignore[no-any-return]
        except TimeoutError:
            self._end()
            raise
        except (EOFError, ConnectionError):
            return ("ended", self._status())

    def _status(self) -> str:
        """How the process ended, which it has or is about to."""
        try:
            code = self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            code = None
        self._end()
        if code is None:
            return "a closed connection"
        return f"signal {-code}" if code < 0 else f"exit status {code}"

    def close(self) -> None:
        """End the process; another call would start one again."""
        self._end()


def _kill(process: subprocess.Popen[bytes], ours: socket.socket, owner: int) -> None:
    ours.close()
    if owner == os.getpid():  # a forked twin must not end its parent's process
        process.kill()
        process.wait()
