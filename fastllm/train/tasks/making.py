"""From the name of a task to its problems: levels, seeds, and splits that share nothing."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import islice
from random import Random

from fastllm.errors import did_you_mean
from fastllm.train.data.prompts import PromptRecord
from fastllm.train.tasks import arithmetic, word
from fastllm.train.tasks.problem import Problem

SPLITS = ("train", "test")
_KINDS: dict[str, tuple[range, Callable[[int, Random], Problem | None]]] = {
    "arithmetic": (arithmetic.LEVELS, arithmetic.problem),
    "word": (word.LEVELS, word.problem),
}
_NAME = re.compile(r"([a-z]+):(\d{1,3})(?:-(\d{1,3}))?")
_TEST_SHARE = 10  # one problem in so many is of the test split
_PATIENCE = 200  # draws that give no new problem before old ones are given again


def task_names() -> list[str]:
    """Every task with its levels: "arithmetic:1", ..."""
    return [f"{kind}:{level}" for kind, (levels, _) in _KINDS.items() for level in levels]


def is_task(name: str) -> bool:
    """Whether a name means a task rather than a file: it begins as one does."""
    return name.partition(":")[0] in _KINDS


def make(name: str, count: int, seed: int = 0, split: str = "train") -> list[PromptRecord]:
    """`count` problems of a task as prompts, the same ones for the same arguments.

    The prompt is one user message; `plain` is how a base model is asked. Columns: answer ("72"),
    solution (worked, ends with "Answer: 72"), task ("arithmetic:2").
    Raises ValueError naming what no task has.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    made = islice(problems(name, seed, split), count)
    return [
        PromptRecord(
            prompt=[{"role": "user", "content": problem.question}],
            columns={"answer": str(problem.answer), "solution": problem.solution, "task": task},
            plain=f"Question: {problem.question}\nAnswer:",
            place=f"{name}: problem {number}",
        )
        for number, (task, problem) in enumerate(made, 1)
    ]


def problems(name: str, seed: int = 0, split: str = "train") -> Iterator[tuple[str, Problem]]:
    """(task, problem) without end. While a level has new ones, none comes twice.

    Raises ValueError for an unknown task, level or split.
    """
    kind, levels = _parse(name)
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    streams = [(f"{kind}:{n}", _stream(kind, n, seed, split)) for n in levels]
    return _take_turns(streams)


def _take_turns(
    streams: list[tuple[str, Iterator[Problem]]],
) -> Iterator[tuple[str, Problem]]:
    while True:
        yield from ((task, next(stream)) for task, stream in streams)


def _stream(kind: str, level: int, seed: int, split: str) -> Iterator[Problem]:
    random = Random(f"{kind} {level} {split} {seed}")
    draw = _KINDS[kind][1]
    found: dict[str, Problem] = {}
    old = 0
    while old < _PATIENCE:
        problem = draw(level, random)
        if problem is None or is_test(problem.key) != (split == "test"):
            continue
        old = old + 1 if problem.question in found else 0
        if not old:
            found[problem.question] = problem
            yield problem
    known = list(found.values())  # the level has no others: they come again, in other orders
    while True:
        random.shuffle(known)
        yield from known


@lru_cache(maxsize=4096)
def is_test(key: str) -> bool:
    """Whether the problem of a key belongs to the test split."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") % _TEST_SHARE == 0


def _parse(name: str) -> tuple[str, range]:
    kind = name.partition(":")[0]
    if kind not in _KINDS:
        hint = did_you_mean(kind, _KINDS) or f"there are {', '.join(_KINDS)}"
        raise ValueError(f"there is no task {name!r}; {hint}")
    levels = _KINDS[kind][0]
    known = f"{kind}:{levels[0]} to {kind}:{levels[-1]}, or a range such as {kind}:1-3"
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} names no level; there are {known}")
    low = int(match[2])
    high = int(match[3]) if match[3] else low
    if not (low in levels and high in levels and low <= high):
        raise ValueError(f"{kind} has no level {name.partition(':')[2]}; there are {known}")
    return kind, range(low, high + 1)
