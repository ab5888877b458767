"""What the operations of a chat template cost: the `Budget`, and growth known before it happens.

A unit is up to 0.3 us of time or some 50 bytes of memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, ItemsView, Iterator, KeysView, Sized, ValuesView
from typing import Any

from jinja2 import runtime

from fastllm.errors import ChatTemplateError

MAX_DEPTH = 100  # of containers and of macro calls; C stacks of threads are small
MAX_INT_BITS = 60  # of computed integers; above, equal hashes can be made and dicts turn quadratic
_MAX_DATA_BITS = 4096  # of integers in messages and tools
CHARS_PER_UNIT = 4
_DEEP = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)


class Budget:
    """What a rendering may still cost."""

    def __init__(self, units: int) -> None:
        self.left = units

    def spend(self, units: int) -> bool:
        """Charge; True, so that it can stand in a condition. ChatTemplateError when overdrawn."""
        self.left -= units if units > 0 else 0
        if self.left < 0:
            raise ChatTemplateError(
                "the chat template does too much work (an endless or exponential loop?); rendering"
                " was stopped. Use another template"
            )
        return True

    def weigh(self, *values: Any) -> int:
        """Charge for reading the values in full; returns the greatest nesting depth."""
        deepest = 0
        stack: list[tuple[Any, int]] = [(value, 0) for value in values]
        while stack:
            value, depth = stack.pop()
            if isinstance(value, str):
                self.spend(1 + len(value) // CHARS_PER_UNIT)
            elif isinstance(value, dict):
                self._enter(value, depth, 8)
                stack.extend((key, depth + 1) for key in value)
                stack.extend((item, depth + 1) for item in value.values())
                deepest = max(deepest, depth + 1)
            elif isinstance(value, _DEEP):
                self._enter(value, depth, 3)
                stack.extend((item, depth + 1) for item in value)
                deepest = max(deepest, depth + 1)
            elif isinstance(value, int) and value.bit_length() > _MAX_DATA_BITS:
                raise ChatTemplateError("the chat template was given an integer that is too large")
            else:
                self.spend(1 + len(value) if isinstance(value, range) else 1)
        return deepest

    def _enter(self, value: Any, depth: int, each: int) -> None:
        if depth >= MAX_DEPTH:
            raise ChatTemplateError(
                f"the chat template nests values more than {MAX_DEPTH} levels deep"
            )
        self.spend(1 + each * len(value))


def units(value: Any) -> int:
    if isinstance(value, str):
        return 1 + len(value) // CHARS_PER_UNIT
    return 1 + len(value) if isinstance(value, list | tuple) else 1


def check_ints(operator: str, left: int, right: int) -> None:
    """Before the operation: its result must be one that is quick to compute."""
    bits = max(left.bit_length(), right.bit_length())
    if operator == "**" and abs(left) > 1:
        bits = max(bits, left.bit_length() * abs(right))
    if bits > _MAX_DATA_BITS:
        raise ChatTemplateError("the chat template computes with integers that are too large")


def small(value: Any) -> Any:
    """A computed value, refused if it is a large integer."""
    if type(value) is int and value.bit_length() > MAX_INT_BITS:
        raise ChatTemplateError(f"the chat template makes integers of over {MAX_INT_BITS} bits")
    return value


def materialized(value: Any, budget: Budget) -> Any:
    """A list in place of an iterator (of map, select, reverse...), so that it can be weighed."""
    if isinstance(value, Iterator) and not isinstance(value, runtime.LoopContext):
        items = []
        for item in value:
            budget.spend(1)
            items.append(item)
        return items
    return value


# Filters and tests that do not read through the items of their value. They cost a step, or a step
# for each item where GROWTH says so: `messages | length` in a loop must not count every message.
SHALLOW = frozenset(
    "boolean callable count d default defined escaped false filter first integer items"
    " iterable last length list map mapping none number reject rejectattr reverse sameas select"
    " selectattr sequence test true undefined".split()
)


# What a filter or a method adds to the size of its arguments, charged before it runs. The first
# argument is the value (the text for both `|replace` and `.replace`).


def grow_format(budget: Budget, text: str, *args: Any, **kwargs: Any) -> None:
    if re.search(r"\d{4,}|%[^a-zA-Z%]*\*|\{[^{}]+\{", text):
        raise ChatTemplateError("the chat template formats with a width that is too large")
    before = budget.left
    budget.weigh(*args, *kwargs.values())
    fields = text.count("%") + text.count("{")
    budget.spend(fields * (before - budget.left + 999 // CHARS_PER_UNIT))


def _grow_join(budget: Budget, values: Any, separator: Any = "", attribute: Any = None) -> None:
    budget.spend(_length(values) * (1 + len(str(separator)) // CHARS_PER_UNIT))
    _grow_sequence(budget, values, attribute)


def _grow_replace(budget: Budget, text: Any, old: Any, new: Any, count: Any = None) -> None:
    text, old = str(text), str(old)
    hits = text.count(old) if old else len(text) + 1
    budget.spend(1 + hits * len(str(new)) // CHARS_PER_UNIT)


def _grow_split(budget: Budget, text: str, sep: Any = None, maxsplit: int = -1) -> None:
    parts = text.count(sep) if isinstance(sep, str) and sep else len(text) // 2
    budget.spend(parts if maxsplit < 0 else min(parts, maxsplit))
    _grow_scan(budget, text, sep)


def _grow_scan(budget: Budget, text: Any, what: Any = None, *bounds: Any) -> None:
    """str.strip(chars) and the searches from the right look at every pair in the worst case."""
    budget.spend(len(str(text)) * len(str(what or "")) // 16)


def _grow_indent(budget: Budget, text: Any, width: Any = 4, *flags: Any, **named: Any) -> None:
    width = named.get("width", width)
    size = len(width) if isinstance(width, str) else int(width)
    budget.spend((str(text).count("\n") + 1) * max(0, size))


def _grow_round(budget: Budget, value: Any, precision: Any = 0, *method: Any, **named: Any) -> None:
    budget.spend(abs(int(named.get("precision", precision))) ** 2)


def _grow_sum(budget: Budget, values: Any, attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(start, int | float):
        raise ChatTemplateError("|sum in the chat template adds numbers only")
    _grow_sequence(budget, values, attribute)


def _grow_sequence(budget: Budget, values: Any, *args: Any, **named: Any) -> None:
    """One step for each item and each part of an attribute's path; a string becomes a list."""
    paths = [arg for arg in (*args, *named.values()) if isinstance(arg, str)]
    parts = 4 + sum(path.count(".") for path in paths)
    budget.spend(_length(values) * parts)


def _grow_sort(budget: Budget, values: Any, *args: Any, **named: Any) -> None:
    before = budget.left
    budget.weigh(values)
    budget.spend((before - budget.left) * 16)  # comparisons of a sort: log2(64k)
    _grow_sequence(budget, values, *args, **named)


def _length(values: Any) -> int:
    return len(values) if isinstance(values, Sized) else 1


GROWTH: dict[str, Callable[..., None]] = {
    **dict.fromkeys(("rfind", "rindex", "rpartition", "strip", "lstrip", "rstrip"), _grow_scan),
    **dict.fromkeys(("list", "map", "max", "min", "reverse"), _grow_sequence),
    **dict.fromkeys(("reject", "rejectattr", "select", "selectattr", "unique"), _grow_sequence),
    **dict.fromkeys(("dictsort", "groupby", "sort"), _grow_sort),
    "format": grow_format,
    "indent": _grow_indent,
    "join": _grow_join,
    "replace": _grow_replace,
    "round": _grow_round,
    "rsplit": _grow_split,
    "split": _grow_split,
    "splitlines": lambda budget, text, *keep: budget.spend(len(text) // 2),
    "sum": _grow_sum,
    "trim": _grow_scan,
}
