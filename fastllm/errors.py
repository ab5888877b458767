"""Exceptions of the package, all from FastLLMError, so that one `except` catches them; a hint."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], count: int = 1, cutoff: float = 0.6) -> str:
    """`did you mean a or b?` of the nearest names, for the end of a message; "" if none is near.

    Args:
        name: what was given; what is behind 1,024 characters is not looked at.
        known: what would have been right.
        count: names, at most.
        cutoff: how near they must be: 0 anything, 1 equal.
    """
    near = difflib.get_close_matches(name[:1024], list(known), n=count, cutoff=cutoff)
    return f"did you mean {' or '.join(near)}?" if near else ""


class FastLLMError(Exception):
    """Base of every error that the package raises on purpose."""


class ModelFileError(FastLLMError, ValueError):
    """A model file, or a field of it, cannot be used.

    The four parts stay separate attributes so that a caller can show or log them apart.
    """

    def __init__(
        self, file: str | os.PathLike[str], field: str, problem: str, remedy: str = ""
    ) -> None:
        super().__init__(file, field, problem, remedy)  # all of them: the error survives pickling
        self.file = os.fspath(file)
        self.field = field
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        where = f"{self.file}: {self.field}" if self.field else self.file
        text = f"{where}: {self.problem}"
        return f"{text}. {self.remedy}" if self.remedy else text


class ModelNotFoundError(FastLLMError, LookupError):
    """A model name resolves to nothing here; the message lists what was tried."""


class DataError(FastLLMError, ValueError):
    """A record of a data file cannot be used; without record and field, the file as a whole.

    record: "line 12" of a file of lines, "record 12" of others, counted from 1. field: the path to
    the value, such as "messages[2].content". remedy: what was expected, or what to do.
    """

    def __init__(
        self,
        file: str | os.PathLike[str],
        record: str,
        field: str,
        problem: str,
        remedy: str = "",
    ) -> None:
        super().__init__(file, record, field, problem, remedy)  # all: it survives pickling
        self.file = os.fspath(file)
        self.record = record
        self.field = field
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        where = ": ".join(part for part in (self.file, self.record, self.field) if part)
        text = f"{where}: {self.problem}"
        return f"{text}. {self.remedy}" if self.remedy else text


class ChatTemplateError(FastLLMError, ValueError):
    """A chat template is malformed, refuses the messages, or exceeds the limits of the sandbox."""


class NumericalError(FastLLMError, ArithmeticError):
    """A computation gave NaN or infinity where a number is needed."""


class NotFiniteError(NumericalError, ValueError):
    """An argument holds NaN or infinity where a choice depends on it."""


class CheckpointError(FastLLMError, ValueError):
    """A checkpoint is missing, damaged, or of another run; the message says what differs."""


class RewardError(FastLLMError, RuntimeError):
    """A reward function failed: it raised, took too long, or gave what is no reward.

    reward: its name. sample: the place of the answer in the batch, from 0; None: all of them
    together. prompt: what was answered.
    """

    def __init__(self, reward: str, sample: int | None, prompt: str, problem: str) -> None:
        super().__init__(reward, sample, prompt, problem)  # all of them: it survives pickling
        self.reward = reward
        self.sample = sample
        self.prompt = prompt
        self.problem = problem

    def __str__(self) -> str:
        beginning = self.prompt if len(self.prompt) <= 80 else self.prompt[:77] + "..."
        which = "" if self.sample is None else f", completions[{self.sample}]"
        after = f" (prompt {beginning!r})" if self.prompt else ""
        return f"reward {self.reward!r}{which}{after}: {self.problem}"
