"""A problem with its answer and the way to it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A question with one right answer.

    key: its numbers and operations; problems that differ in words alone have the same. steps: the
    worked solution, a line each. Every equation in a line is true on its own.
    """

    key: str
    question: str
    answer: int
    steps: tuple[str, ...]

    @property
    def solution(self) -> str:
        """The worked solution, its last line "Answer: n"."""
        return "\n".join([*self.steps, f"Answer: {self.answer}"])
