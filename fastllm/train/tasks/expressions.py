"""Whole-number expressions: their value, their text with the brackets they need, worked steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}


@dataclass(frozen=True, slots=True)
class Operation:
    """Two operands, numbers or operations, and one of + - * /; a division leaves no remainder."""

    operator: str
    left: Operation | int
    right: Operation | int


Expression = Operation | int


def compute(operator: str, left: int, right: int) -> int:
    """The result of one operation. Raises ValueError for a division that leaves a remainder."""
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    if operator == "*":
        return left * right
    if right == 0 or left % right:
        raise ValueError(f"{left} / {right} is no whole number")
    return left // right


def value(expression: Expression) -> int:
    """What an expression comes to."""
    if isinstance(expression, int):
        return expression
    return compute(expression.operator, value(expression.left), value(expression.right))


def text(expression: Expression) -> str:
    """As one writes it: brackets where precedence asks for them, around negative operands too."""
    if isinstance(expression, int):
        return str(expression)
    own = _PRECEDENCE[expression.operator]
    left = _operand(expression.left, own, first=True)
    right = _operand(expression.right, own + 1, first=False)  # so that steps go as it is read
    return f"{left} {expression.operator} {right}"


def _operand(expression: Expression, precedence: int, first: bool) -> str:
    written = text(expression)
    if isinstance(expression, int):
        return written if expression >= 0 or first else f"({written})"
    return written if _PRECEDENCE[expression.operator] >= precedence else f"({written})"


def steps(expression: Expression) -> Iterator[str]:
    """One line for each operation, the innermost first: `12 + 5 = 17`, `17 * 3 = ... = 51`."""
    if isinstance(expression, Operation):
        yield from steps(expression.left)
        yield from steps(expression.right)
        yield worked(expression.operator, value(expression.left), value(expression.right))


def worked(operator: str, left: int, right: int) -> str:
    """One operation as a chain of equalities, by place values as it is done by hand.

    >>> worked("+", 27, 45)
    '27 + 45 = 27 + 40 + 5 = 67 + 5 = 72'
    """
    chain = [text(Operation(operator, left, right))]
    if min(left, right) >= 0:
        chain += _METHODS[operator](left, right)
    chain.append(str(compute(operator, left, right)))
    return " = ".join(chain)


def _places(number: int) -> list[int]:
    """345 -> [300, 40, 5]"""
    digits = str(number)
    parts = [int(digit) * 10 ** (len(digits) - i - 1) for i, digit in enumerate(digits)]
    return [part for part in parts if part]


def _one_by_one(operator: str, left: int, right: int) -> list[str]:
    """Add or subtract the places of `right`, the highest first."""
    parts, lines = _places(right), []
    while len(parts) > 1:
        lines.append(f" {operator} ".join(map(str, [left, *parts])))
        left = compute(operator, left, parts.pop(0))
        if len(parts) == 1:
            lines.append(f"{left} {operator} {parts[0]}")
    return lines


def _add(left: int, right: int) -> list[str]:
    return _one_by_one("+", left, right)


def _subtract(left: int, right: int) -> list[str]:
    return [f"-({right} - {left})"] if left < right else _one_by_one("-", left, right)


def _multiply(left: int, right: int) -> list[str]:
    """Split one factor: the right one if it has places to split, else the left."""
    if len(_places(right)) > 1:
        products = [(left, part) for part in _places(right)]
    elif len(_places(left)) > 1:
        products = [(part, right) for part in _places(left)]
    else:
        return []
    return [
        " + ".join(f"{a} * {b}" for a, b in products),
        " + ".join(str(a * b) for a, b in products),
    ]


def _divide(left: int, right: int) -> list[str]:
    return [f"({left // right} * {right}) / {right}"] if left >= 10 * right else []


_METHODS: dict[str, Callable[[int, int], list[str]]] = {
    "+": _add,
    "-": _subtract,
    "*": _multiply,
    "/": _divide,
}
