"""SIGTERM and SIGINT as a wish to stop: the loop ends after the step in hand, and saves."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

_WATCHED = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Within `with`, the first signal sets `requested`; a second one acts as it always did.

    Python delivers signals to the main thread alone: in another, nothing is installed.
    """

    def __init__(self) -> None:
        self.requested = False
        self.name = "another process"
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _WATCHED}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.requested = True
        self.name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
