"""What a reward gave, as floats; what is wrong with it, by the place in the list."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


class SampleFault(Exception):
    """Something is wrong with the reward of one answer.

    sample: its place in the list; None: with all of them together.
    """

    def __init__(self, problem: str, sample: int | None = None) -> None:
        super().__init__(problem, sample)
        self.problem = problem
        self.sample = sample


class Raised(SampleFault):
    """The function raised, or its process ended: one of the answers may be why."""


class NotLoaded(SampleFault):
    """The function itself is not to be had."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """The columns that a reward takes: by name, or `every` one; and those it cannot be without."""

    names: frozenset[str]
    required: frozenset[str]
    every: bool

    def choose(
        self, columns: dict[str, list[Any]], more: dict[str, list[Any]]
    ) -> dict[str, list[Any]]:
        """The columns to call it with. more: beside the data's. Raises SampleFault naming one that
        is missing."""
        known = columns | more
        missing = sorted(self.required - known.keys())
        if missing:
            have = ", ".join(columns) or "none"
            raise SampleFault(f"needs the column {missing[0]!r}; the data has {have}")
        return known if self.every else {n: c for n, c in known.items() if n in self.names}


def parameters_of(function: Callable[..., Any]) -> Parameters:
    """What a reward takes besides prompts and completions.

    Raises TypeError if it cannot be called with these two.
    """
    found = inspect.signature(function)
    try:
        found.bind_partial([], [])
    except TypeError as error:
        raise TypeError(
            f"a reward is called as reward(prompts, completions, **columns); it takes {found}"
        ) from error
    kinds = inspect.Parameter
    named = [p for p in found.parameters.values() if p.kind in (kinds.POSITIONAL_OR_KEYWORD,
                                                                kinds.KEYWORD_ONLY)]  # fmt: skip
    positional = [p.name for p in named if p.kind == kinds.POSITIONAL_OR_KEYWORD][:2]
    columns = [p for p in named if p.name not in positional]
    return Parameters(
        names=frozenset(p.name for p in columns),
        required=frozenset(p.name for p in columns if p.default is kinds.empty),
        every=any(p.kind == kinds.VAR_KEYWORD for p in found.parameters.values()),
    )


def as_floats(result: Any, count: int) -> list[float]:
    """The `count` finite floats of a list, array or tensor. Raises SampleFault."""
    if isinstance(result, str | bytes | dict) or not isinstance(result, Iterable):
        raise SampleFault(f"returned {_is(result)}: expected a list of {count} numbers")
    values = list(result)
    if len(values) != count:
        raise SampleFault(f"returned {len(values)} rewards for {count} completions")
    return [_as_float(value, sample) for sample, value in enumerate(values)]


def _as_float(value: Any, sample: int) -> float:
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise SampleFault(f"returned {_is(value)}: expected a number", sample)
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # tensors: RuntimeError
        raise SampleFault(f"returned {_is(value)}: expected a number", sample) from error
    if not math.isfinite(found) or abs(found) > _LARGEST:
        raise SampleFault(f"returned {found}: expected a finite number", sample)
    return found


_LARGEST = 3.4028234663852886e38  # float32's


def _is(value: Any) -> str:
    return f"a {type(value).__name__} ({value!r:.40})" if value is not None else "None"
