"""The process that a function runs in: loads it, then answers calls until the socket closes.

Messages are pickles with their length before them. The process was started by the program that it
answers, as the same user, so neither side is a stranger to the other.
"""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import os
import pickle
import socket
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastllm.train.rewards.values import SampleFault, as_floats, parameters_of

_LENGTH = struct.Struct("<Q")
_GRACE = 10.0  # seconds after which a call that nobody stopped ends the process itself


def send(connection: socket.socket, message: Any) -> None:
    """Send one message. Raises OSError; TimeoutError after the socket's timeout."""
    data = pickle.dumps(message)
    connection.sendall(_LENGTH.pack(len(data)) + data)


def receive(connection: socket.socket, size: Callable[[], None] = lambda: None) -> Any:
    """The next message. Raises EOFError when the other side is gone.

    size: called before each read, to set the socket's timeout anew.
    """
    (length,) = _LENGTH.unpack(_read(connection, _LENGTH.size, size))
    return pickle.loads(_read(connection, length, size))


def _read(connection: socket.socket, length: int, before: Callable[[], None]) -> bytes:
    data = bytearray()
    while len(data) < length:
        before()
        piece = connection.recv(min(length - len(data), 1 << 20))
        if not piece:
            raise EOFError("the other side closed the connection")
        data += piece
    return bytes(data)


def load(target: str) -> Callable[..., Any]:
    """The function that "path/to/file.py:name" or "package.module:name" means.

    A file's own folder comes first when it imports. Raises what running the file raises,
    AttributeError for a name that it lacks, TypeError for what is no function.
    """
    place, _, name = target.rpartition(":")
    if place.endswith(".py"):
        path = Path(place).resolve()
        sys.path.insert(0, str(path.parent))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    function = getattr(module, name)
    if not callable(function):
        raise TypeError(f"{name} is a {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]


def main(descriptor: int, target: str, memory: int) -> None:
    """Answer calls on an inherited socket.

    memory: bytes of address space that the process may have; 0: as much as it likes.
    """
    if memory:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    with socket.socket(fileno=descriptor) as connection, open(os.devnull, "w") as nowhere:
        try:
            function = load(target)
            answer: Any = ("loaded", parameters_of(function))
        except BaseException as error:  # whatever a file does when it is run
            answer = ("failed", _words(error, target), None)
        send(connection, answer)
        while True:
            try:
                timeout, count, args, columns = receive(connection)
            except EOFError:
                return
            # Runs without Python's lock: a caller that was killed leaves no process that computes.
            faulthandler.dump_traceback_later(timeout + _GRACE, exit=True, file=nowhere)
            answer = _answer(function, target, count, args, columns)
            faulthandler.cancel_dump_traceback_later()
            send(connection, answer)


def _answer(
    function: Callable[..., Any], target: str, count: int | None, args: Any, columns: Any
) -> tuple[Any, ...]:
    try:
        result = function(*args, **columns)
        return ("done", result if count is None else as_floats(result, count))
    except SampleFault as fault:
        return ("failed", fault.problem, fault.sample)
    except BaseException as error:  # a reward may raise anything, SystemExit too
        return ("raised", _words(error, target), None)


def _words(error: BaseException, target: str) -> str:
    """The error, and where in the function's file it came from."""
    file = str(Path(target.rpartition(":")[0]).resolve())
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    where = f" ({Path(file).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {str(error)[:500]}{where}"
