"""What `patch` did: one row per layer and part, printed as a table."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from ...errors import FastLLMError
from ...tables import plain_table


class PatchError(FastLLMError, RuntimeError):
    """A part of a model that was to be replaced was not: `patch(strict=True)`.

    report: what was done (nothing of it stays in the model) and why the rest was not.
    """

    def __init__(self, report: Report) -> None:
        super().__init__(report)
        self.report = report

    def __str__(self) -> str:
        return (
            "strict=True, and these were left as they are (name fewer `ops`, or strict=False):\n"
            f"{Report([row for row in self.report.rows if not row.replaced])}"
        )


@dataclass(frozen=True, slots=True)
class Row:
    """One recognised part of one module.

    module: its name in the model, "" the model itself. kind: its class. part: "attention", "norm"
    and so on. replaced: whether our kernel serves it now. reason: why not, or what is special.
    """

    module: str
    kind: str
    part: str
    replaced: bool
    reason: str = ""


@dataclass(slots=True)
class Report:
    """The rows of a patched model in the order of its modules."""

    rows: list[Row] = field(default_factory=list)

    def counts(self) -> dict[str, tuple[int, int]]:
        """part -> (modules replaced, modules recognised)."""
        found = Counter(row.part for row in self.rows)
        done = Counter(row.part for row in self.rows if row.replaced)
        return {part: (done[part], total) for part, total in found.items()}

    def replaced(self, part: str) -> bool:
        """Whether the model has modules of this part and every one of them was replaced."""
        done, total = self.counts().get(part, (0, 0))
        return 0 < total == done

    def __str__(self) -> str:
        """A table; layers that differ in their number alone share a line."""
        if not self.rows:
            return "fastllm: nothing in this model is of a kind that is replaced"
        rows = [
            (_name_of(names), kind, part, "yes" if done else "no", reason)
            for (kind, part, done, reason, _), names in _alike(self.rows).items()
        ]
        rows += [
            (f"{part}: {done} of {total}", "", "", "", "")
            for part, (done, total) in self.counts().items()
        ]
        return "\n".join(plain_table(("module", "class", "part", "replaced", ""), rows))


_Alike = tuple[str, str, bool, str, str]


def _alike(rows: list[Row]) -> dict[_Alike, list[str]]:
    """Names of modules, by all that a line of the table shows, numbers of layers aside."""
    groups: dict[_Alike, list[str]] = {}
    for row in rows:
        shape = re.sub(r"\d+", "#", row.module)
        groups.setdefault((row.kind, row.part, row.replaced, row.reason, shape), []).append(
            row.module
        )
    return groups


def _name_of(names: list[str]) -> str:
    """`model.layers.0.mlp` ... `model.layers.3.mlp` -> `model.layers.{0-3}.mlp`."""
    if len(names) == 1:
        return names[0] or "(model)"
    pieces = re.split(r"\d+", names[0])
    columns = zip(*(re.findall(r"\d+", name) for name in names), strict=True)
    numbers = [_ranges(sorted({int(number) for number in column})) for column in columns]
    return "".join(piece + number for piece, number in zip(pieces, [*numbers, ""], strict=True))


def _ranges(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    inside = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"{{{inside}}}"
