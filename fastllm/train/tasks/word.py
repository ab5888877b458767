"""Word problems of five levels: a person, some things, and what happens to them.

1  one gain or loss, small numbers
2  two of them, two digits; or boxes with so many in each
3  boxes or "times as many", and a gain or loss
4  three steps, ended by halving, sharing equally or comparing with a second person
5  four steps so ended, and numbers that do not matter
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from fastllm.train.tasks.expressions import compute, worked
from fastllm.train.tasks.problem import Problem

LEVELS = range(1, 6)
_LARGEST = 999

_PEOPLE = (
    ("Ada", "she", "her"), ("Ben", "he", "his"), ("Clara", "she", "her"), ("David", "he", "his"),
    ("Emma", "she", "her"), ("Felix", "he", "his"), ("Grace", "she", "her"), ("Hugo", "he", "his"),
    ("Iris", "she", "her"), ("Jonas", "he", "his"), ("Kira", "she", "her"), ("Liam", "he", "his"),
    ("Mia", "she", "her"), ("Noah", "he", "his"), ("Olga", "she", "her"), ("Paul", "he", "his"),
    ("Rosa", "she", "her"), ("Sam", "he", "his"), ("Tara", "she", "her"), ("Victor", "he", "his"),
)  # fmt: skip
_THINGS = (
    "apples", "stickers", "marbles", "books", "pencils", "coins", "shells", "cookies", "stamps",
    "buttons", "cards", "eggs", "balloons", "beads", "oranges", "postcards", "stones", "nuts",
)  # fmt: skip
_CONTAINERS = ("box", "boxes"), ("bag", "bags"), ("jar", "jars"), ("packet", "packets")
_TIMES = {2: "twice", 3: "three times", 4: "four times", 5: "five times"}

_OPENINGS = (
    "{name} has {n} {things}.",
    "{name} starts the day with {n} {things}.",
    "There are {n} {things} in {name}'s room.",
    "{name} owns {n} {things}.",
)
_GAINS = (
    "{name} buys {n} more {things}.",
    "A friend gives {name} {n} more {things}.",
    "Then {name} finds {n} more {things}.",
    "{name} gets {n} {things} as a present.",
    "Later {name} adds {n} {things} to {their} own.",
)
_LOSSES = (
    "{name} gives {n} {things} to a neighbour.",
    "Then {name} loses {n} of the {things}.",
    "{name} sells {n} {things}.",
    "On the way home {they} drops {n} of the {things}, and they are gone.",
    "{name} leaves {n} {things} at school.",
)
_BOXES = (
    "{name} buys {m} {many} with {n} {things} in each.",
    "{name} is given {m} {many}, and every {one} holds {n} {things}.",
    "Then {m} {many} arrive for {name}, each {one} with {n} {things}.",
)
_MULTIPLES = (
    "A month later {name} has {times} as many {things} as before that month.",
    "{name} goes on collecting until {they} has {times} as many {things}.",
)
_HALVES = (
    "{name} gives half of {their} {things} away.",
    "Half of the {things} get lost, and {name} keeps the others.",
)
_ENDINGS = (
    "How many {things} does {name} have now?",
    "How many {things} does {name} have in the end?",
    "What is the number of {things} that {name} has after this?",
)
_DISTRACTIONS = (
    "{name} is {n} years old.",
    "It is {n} minutes past noon.",
    "{name}'s street has {n} houses.",
    "{other} has {n} {others}, which {name} likes too.",
    "The bus that {name} takes has {n} seats.",
)


@dataclass(slots=True)
class _Story:
    """What has been told so far, and what it comes to."""

    random: Random
    fields: dict[str, str]
    amount: int = 0
    sentences: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    key: list[str] = field(default_factory=list)
    question: str = ""

    def write(self, forms: tuple[str, ...], **more: object) -> str:
        words = {**self.fields, **{name: str(item) for name, item in more.items()}}
        return self.random.choice(forms).format(**words)

    def tell(self, forms: tuple[str, ...], **more: object) -> None:
        self.sentences.append(self.write(forms, **more))

    def calculate(self, operator: str, number: int, means: str = "{name} has {n} {things}") -> None:
        """Apply an operation to the amount, with its line of the solution."""
        line = worked(operator, self.amount, number)
        self.amount = compute(operator, self.amount, number)
        self.steps.append(f"{line}, so {means.format(**self.fields, n=self.amount)}.")
        self.key.append(f"{operator}{number}")


def problem(level: int, random: Random) -> Problem | None:
    """A problem of a level; None where the drawn numbers admit none."""
    story = _opened(random, 20 if level == 1 else 60)
    for step in _plan(level, random):
        if not step(story, level) or not 1 < story.amount <= _LARGEST:
            return None
    if not story.question:
        story.question = story.write(_ENDINGS)
    if level == 5:
        _distract(story)
    return Problem(
        key="word " + " ".join(story.key),
        question=" ".join([*story.sentences, story.question]),
        answer=story.amount,
        steps=tuple(story.steps),
    )


def _plan(level: int, random: Random) -> list[_Step]:
    """The steps of a story."""
    small: list[_Step] = [_gain, _lose]
    large: list[_Step] = [_boxes, _multiple]
    ends: list[_Step] = [_halve, _share, _compare, _compare_times]
    if level == 1:
        return [random.choice(small)]
    if level == 2:
        return [_boxes] if random.random() < 0.3 else random.choices(small, k=2)
    if level == 3:
        plan = [random.choice(small), random.choice(large)]
        random.shuffle(plan)
        return plan
    plan = [random.choice(small), random.choice(large)]
    plan += random.choices(small, k=level - 4)
    random.shuffle(plan)
    return [*plan, random.choice(ends)]


def _opened(random: Random, largest: int) -> _Story:
    (name, they, their), (other, *_) = random.sample(_PEOPLE, 2)
    things, others = random.sample(_THINGS, 2)
    fields = {"name": name, "they": they, "their": their, "other": other}
    story = _Story(random, {**fields, "things": things, "others": others})
    story.amount = random.randint(3, largest)
    story.tell(_OPENINGS, n=story.amount)
    story.key.append(str(story.amount))
    return story


def _size(story: _Story, level: int, largest: int) -> int:
    """A number of things that come or go."""
    return story.random.randint(2, max(2, min(largest, 9 if level == 1 else 49)))


def _gain(story: _Story, level: int) -> bool:
    number = _size(story, level, _LARGEST)
    story.tell(_GAINS, n=number)
    story.calculate("+", number)
    return True


def _lose(story: _Story, level: int) -> bool:
    number = _size(story, level, story.amount - 2)
    if number > story.amount - 2:
        return False
    story.tell(_LOSSES, n=number)
    story.calculate("-", number)
    return True


def _boxes(story: _Story, level: int) -> bool:
    count, inside = story.random.randint(2, 9), story.random.randint(2, 12)
    one, many = story.random.choice(_CONTAINERS)
    story.tell(_BOXES, m=count, n=inside, one=one, many=many)
    things = story.fields["things"]
    story.steps.append(f"{worked('*', count, inside)}, so there are {count * inside} new {things}.")
    story.key.append(f"{count}*{inside}")
    story.calculate("+", count * inside)
    return True


def _multiple(story: _Story, level: int) -> bool:
    factor, times = story.random.choice(list(_TIMES.items()))
    story.tell(_MULTIPLES, times=times)
    story.calculate("*", factor)
    return True


def _halve(story: _Story, level: int) -> bool:
    if story.amount % 2:
        return False
    story.tell(_HALVES)
    story.calculate("/", 2)
    return True


def _share(story: _Story, level: int) -> bool:
    friends = [n for n in range(3, 10) if story.amount % n == 0]
    if not friends:
        return False
    number = story.random.choice(friends)
    story.tell(("{name} shares all the {things} equally among {n} friends.",), n=number)
    story.question = story.write(("How many {things} does each friend get?",))
    story.calculate("/", number, "each friend gets {n} {things}")
    return True


def _together(story: _Story, theirs: int) -> None:
    story.question = story.write(("How many {things} do {name} and {other} have together?",))
    story.calculate("+", theirs, "together they have {n} {things}")


def _compare(story: _Story, level: int) -> bool:
    number = _size(story, level, story.amount - 1)
    operator, word = story.random.choice((("+", "more"), ("-", "fewer")))
    theirs = compute(operator, story.amount, number)
    if theirs < 2:
        return False
    story.tell(("{other} has {n} {word} {things} than {name} has now.",), n=number, word=word)
    other, things = story.fields["other"], story.fields["things"]
    line = worked(operator, story.amount, number)
    story.steps.append(f"{line}, so {other} has {theirs} {things}.")
    story.key.append(f"{word} {number}")
    _together(story, theirs)
    return True


def _compare_times(story: _Story, level: int) -> bool:
    factor, times = story.random.choice(list(_TIMES.items()))
    theirs = story.amount * factor
    story.tell(("{other} has {times} as many {things} as {name} has now.",), times=times)
    other, things = story.fields["other"], story.fields["things"]
    line = worked("*", story.amount, factor)
    story.steps.append(f"{line}, so {other} has {theirs} {things}.")
    story.key.append(f"times {factor}")
    _together(story, theirs)
    return True


def _distract(story: _Story) -> None:
    """One or two sentences whose numbers change nothing, after the first sentence."""
    forms = story.random.sample(_DISTRACTIONS, story.random.randint(1, 2))
    for form in forms:
        place = story.random.randint(1, len(story.sentences))
        sentence = story.write((form,), n=story.random.randint(7, 59))
        story.sentences.insert(place, sentence)


_Step = Callable[[_Story, int], bool]
