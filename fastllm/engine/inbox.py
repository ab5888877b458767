"""What a caller of the engine waits for: which of its requests have grown, ended or failed.

The engine writes to it as it decodes, so that a caller with thousands of requests in the queue does
not look at each of them after every step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastllm.engine.sequence import Request


class Inbox:
    """grown: requests with news since the caller last looked, in the order of the news; unfinished:
    how many have not ended; error: of the first request that failed."""

    __slots__ = ("error", "grown", "unfinished")

    def __init__(self) -> None:
        self.grown: dict[Request, None] = {}
        self.unfinished = 0
        self.error: Exception | None = None

    def take(self) -> list[Request]:
        """The requests with news; they are news no longer. Call it under the engine's lock."""
        news = list(self.grown)
        self.grown.clear()
        return news
