"""A small set of dialogues to try fine-tuning with, made from rules by a seed.

Questions about units, weekdays, months and small sums, in several wordings, some with a follow-up.
Every answer shows its work on one line and ends with the result, so that the style is easy to see
and whether an answer is right can be checked by a program:

    user       How many inches are 3 feet?
    assistant  Work: 3 x 12 = 36
               Answer: 36 inches

Questions are numbered by what they ask, not by their wording, and the held-out ones ask what no
training question does.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

UNITS = (
    ("foot", "feet", "inches", 12),
    ("yard", "yards", "feet", 3),
    ("hour", "hours", "minutes", 60),
    ("minute", "minutes", "seconds", 60),
    ("day", "days", "hours", 24),
    ("week", "weeks", "days", 7),
    ("year", "years", "months", 12),
    ("dozen", "dozen", "eggs", 12),
    ("kilometer", "kilometers", "meters", 1000),
    ("meter", "meters", "centimeters", 100),
    ("kilogram", "kilograms", "grams", 1000),
    ("century", "centuries", "years", 100),
    ("decade", "decades", "years", 10),
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    ("January", 31), ("February", 28), ("March", 31), ("April", 30), ("May", 31), ("June", 30),
    ("July", 31), ("August", 31), ("September", 30), ("October", 31), ("November", 30),
    ("December", 31),
)  # fmt: skip
_EVERY = 9  # one question of so many is held out


@dataclass(frozen=True, slots=True)
class Question:
    """One exchange: what is asked, how it is worked out, what the answer is."""

    text: str
    work: str
    answer: str
    number: int  # the same for all wordings

    @property
    def reply(self) -> str:
        """What the assistant is to say."""
        return f"Work: {self.work}\nAnswer: {self.answer}"


@dataclass(frozen=True, slots=True)
class Dialogue:
    """One or two exchanges."""

    questions: tuple[Question, ...]

    def record(self) -> dict[str, Any]:
        """The record of a data file, in the `messages` form."""
        messages = []
        for question in self.questions:
            messages.append({"role": "user", "content": question.text})
            messages.append({"role": "assistant", "content": question.reply})
        return {"messages": messages}


def has_style(answer: str) -> bool:
    """Whether an answer is a line of work and a line with the result, and nothing else."""
    lines = answer.strip().splitlines()
    return len(lines) == 2 and lines[0].startswith("Work: ") and lines[1].startswith("Answer: ")


def same_result(answer: str, expected: str) -> bool:
    """Whether the last lines of two answers give the same result, whatever comes before."""
    return bool(answer.strip()) and _result(answer) == _result(expected)


def _result(answer: str) -> str:
    return answer.strip().rstrip(".").splitlines()[-1].removeprefix("Answer: ").strip()


def make_dialogues(count: int, seed: int = 0, *, holdout: bool = False) -> list[Dialogue]:
    """`count` dialogues; the same for the same seed. holdout: of the questions held out."""
    generator = random.Random(f"{seed} {holdout}")
    kinds: tuple[Callable[[random.Random], Question], ...] = (_unit, _unit, _day, _month, _sum)

    def draw() -> Question:
        kind = generator.choice(kinds)
        question = kind(generator)
        while (question.number % _EVERY == 0) != holdout:
            question = kind(generator)
        return question

    return [
        Dialogue(tuple(draw() for _ in range(1 if generator.random() < 0.7 else 2)))
        for _ in range(count)
    ]


def write_dialogues(path: Path, dialogues: list[Dialogue]) -> Path:
    """Write a .jsonl file of dialogues."""
    lines = [json.dumps(dialogue.record(), ensure_ascii=False) for dialogue in dialogues]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _unit(generator: random.Random) -> Question:
    kind = generator.randrange(len(UNITS))
    one, many, small, factor = UNITS[kind]
    n = generator.randint(1, 12)
    amount = f"{n} {one if n == 1 else many}"
    text = generator.choice(
        (
            f"How many {small} are {amount}?",
            f"Convert {amount} to {small}.",
            f"{amount} in {small}, please.",
        )
    )
    return Question(
        text, f"{n} x {factor} = {n * factor}", f"{n * factor} {small}", _number(0, kind, n)
    )


def _day(generator: random.Random) -> Question:
    start, n = generator.randrange(7), generator.randint(1, 6)
    later = generator.random() < 0.5
    word = "after" if later else "before"
    steps = [DAYS[(start + (i if later else -i)) % 7] for i in range(n + 1)]
    count = f"{n} day{'s' if n > 1 else ''}"
    text = generator.choice(
        (
            f"Which day is {count} {word} {steps[0]}?",
            f"What day of the week comes {count} {word} {steps[0]}?",
        )
    )
    return Question(text, ", ".join(steps), steps[-1], _number(1 + later, start, n))


def _month(generator: random.Random) -> Question:
    first = generator.randrange(12)
    n = generator.randint(1, 2)
    (name, days), (following, more) = MONTHS[first], MONTHS[(first + 1) % 12]
    if n == 1:
        text = generator.choice((f"How many days has {name}?", f"How long is {name} in days?"))
        return Question(text, f"{name} has {days}", f"{days} days", _number(3, first))
    text = f"How many days have {name} and {following} together?"
    work = f"{days} + {more} = {days + more}"
    return Question(text, work, f"{days + more} days", _number(4, first))


def _sum(generator: random.Random) -> Question:
    a, b = generator.randint(2, 20), generator.randint(2, 20)
    sign, result = ("+", a + b) if generator.random() < 0.5 else ("-", a - b)
    words = {"+": "plus", "-": "minus"}[sign]
    text = generator.choice((f"What is {a} {sign} {b}?", f"How much is {a} {words} {b}?"))
    return Question(text, f"{a} {sign} {b} = {result}", str(result), _number(5, a, b, sign == "+"))


def _number(*parts: int) -> int:
    """A number of what is asked, spread evenly."""
    value = 0
    for part in parts:
        value = (value * 1009 + part + 1) * 2654435761 % (1 << 32)
    return value >> 8
