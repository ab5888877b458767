"""Arithmetic of six levels.

1  one-digit addition                        3 + 8
2  two-digit addition and subtraction        72 - 45, never below 0
3  the same, below 0 too, and two digits times one       45 - 72, 27 * 6
4  two operations, of which one may bind more            34 + 27 * 6
5  brackets, exact division                  (34 + 21) / 5 - 20
6  four or five operations, nested           ((8 + 13) * 4 - 6) / 3 + 17
"""

from __future__ import annotations

from random import Random

from fastllm.train.tasks.expressions import Expression, Operation, compute, steps, text, value
from fastllm.train.tasks.problem import Problem

LEVELS = range(1, 7)
_LARGEST = 9999  # no value on the way is larger


def problem(level: int, random: Random) -> Problem:
    """A problem of a level."""
    expression = _EXPRESSIONS[level - 1](random)
    return Problem(
        key=f"arithmetic {_ordered(expression)}",
        question=f"What is {text(expression)}?",
        answer=value(expression),
        steps=tuple(steps(expression)),
    )


def _ordered(expression: Expression) -> str:
    """The text with the operands of + and * in one order: 3 + 8 and 8 + 3 are one problem."""
    if isinstance(expression, int):
        return str(expression)
    sides = [_ordered(expression.left), _ordered(expression.right)]
    if expression.operator in "+*":
        sides.sort()
    return f"({sides[0]} {expression.operator} {sides[1]})"


def _one_digit(random: Random) -> Operation:
    return Operation("+", random.randint(0, 9), random.randint(0, 9))


def _two_digits(random: Random) -> Operation:
    left, right = random.randint(10, 99), random.randint(10, 99)
    if random.random() < 0.5:
        return Operation("+", left, right)
    return Operation("-", max(left, right), min(left, right))


def _with_products(random: Random) -> Operation:
    operator = random.choice("+-*")
    right = random.randint(2, 9) if operator == "*" else random.randint(10, 99)
    return Operation(operator, random.randint(10, 99), right)


def _two_operations(random: Random) -> Operation:
    inner = _with_products(random)
    operator, number = random.choice("+-"), random.randint(10, 99)
    if inner.operator == "*" and random.random() < 0.5:
        return Operation(operator, number, inner)
    return Operation(operator, inner, number)


def _brackets(random: Random) -> Operation:
    inner = Operation(random.choice("+-"), random.randint(10, 60), random.randint(2, 39))
    if value(inner) < 0:
        inner = Operation("-", inner.right, inner.left)
    outer = _scaled(inner, random)
    if random.random() < 0.5:
        return Operation(random.choice("+-"), outer, random.randint(10, 99))
    return outer


def _nested(random: Random) -> Operation:
    expression = _two_digits(random)
    for _ in range(random.randint(3, 4)):
        if random.random() < 0.5:
            expression = _scaled(expression, random)
        else:
            operator, number = random.choice("+-"), random.randint(2, 99)
            first = random.random() < 0.3
            sides = (number, expression) if first else (expression, number)
            expression = Operation(operator, *sides)
    return expression


def _scaled(expression: Operation, random: Random) -> Operation:
    """Divided by a number that divides it, or times one."""
    amount = value(expression)
    divisors = [n for n in range(2, 13) if amount and amount % n == 0]
    if divisors and random.random() < 0.6:
        return Operation("/", expression, random.choice(divisors))
    factor = random.randint(2, 9)
    if abs(compute("*", amount, factor)) > _LARGEST:
        return Operation("-", expression, random.randint(10, 99))
    return Operation("*", expression, factor)


_EXPRESSIONS = (_one_digit, _two_digits, _with_products, _two_operations, _brackets, _nested)
