"""Problems that the project makes: right, graded, repeatable, and never in both splits."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

from fastllm.cli.main import main
from fastllm.train.data.conversations import read_conversations
from fastllm.train.data.prompts import gather_columns, read_prompts
from fastllm.train.rewards import resolve, score
from fastllm.train.tasks import arithmetic, examples, is_task, make, problems, task_names, word
from fastllm.train.tasks.expressions import Operation, steps, text, value, worked

TASKS = task_names()
EXPRESSION = re.compile(r"[-\d(][-+*/() \d]*")


def evaluated(source: str) -> Fraction:
    assert re.fullmatch(r"[-+*/() \d]+", source), source
    return Fraction(eval(re.sub(r"(\d+)", r"Fraction(\1)", source), {"Fraction": Fraction}))


def equations(line: str) -> list[str]:
    """The sides of a line's chain of equalities, without the words after it."""
    return [part.strip() for part in line.partition(",")[0].rstrip(".").split(" = ")]


def test_there_are_the_levels_that_are_documented() -> None:
    assert TASKS == [f"arithmetic:{n}" for n in range(1, 7)] + [f"word:{n}" for n in range(1, 6)]
    assert is_task("word:2") and is_task("arithmetic") and not is_task("data.jsonl")


@pytest.mark.parametrize("name", [name for name in TASKS if name.startswith("arithmetic")])
def test_answers_of_arithmetic_are_what_python_computes(name: str) -> None:
    for record in make(name, 300, seed=3):
        question = re.fullmatch(r"What is (.+)\?", record.text)
        assert question
        assert evaluated(question[1]) == int(record.columns["answer"])


@pytest.mark.parametrize("name", TASKS)
def test_every_equation_of_a_solution_is_true_and_the_last_gives_the_answer(name: str) -> None:
    for record in make(name, 200, seed=4):
        *lines, last = record.columns["solution"].split("\n")
        assert last == f"Answer: {record.columns['answer']}"
        for line in lines:
            values = [evaluated(side) for side in equations(line)]
            assert len(values) > 1 and len(set(values)) == 1, line
        assert evaluated(equations(lines[-1])[-1]) == int(record.columns["answer"])


def test_stories_say_every_number_that_their_solution_uses() -> None:
    words = {"twice": 2, "three times": 3, "four times": 4, "five times": 5, "half": 2}
    for level in word.LEVELS:
        for record in make(f"word:{level}", 200, seed=5):
            said = {int(n) for n in re.findall(r"\d+", record.text)}
            said |= {n for name, n in words.items() if name in record.text.lower()}
            for line in record.columns["solution"].split("\n")[:-1]:
                left = re.split(r" [-+*/] ", equations(line)[0])
                assert said & set(map(int, left)) or "together" in line, (record.text, line)
                said.add(int(equations(line)[-1]))


def test_the_same_arguments_give_the_same_problems_and_more_begin_with_fewer() -> None:
    for name in ("arithmetic:4", "word:5", "word:1-3"):
        assert make(name, 30, 7) == make(name, 30, 7) == make(name, 60, 7)[:30]
        assert make(name, 30, 7) != make(name, 30, 8)


def test_problems_of_a_seed_stay_what_they_are() -> None:
    # Runs and their resumption, and the numbers that were published, depend on them.
    assert [r.text for r in make("arithmetic:2-3", 3)] == [
        "What is 87 + 14?",
        "What is 73 * 4?",
        "What is 42 - 18?",
    ]
    (story,) = make("word:1", 1)
    assert story.plain == f"Question: {story.text}\nAnswer:"


@pytest.mark.parametrize("name", TASKS)
def test_train_and_test_share_no_problem(name: str) -> None:
    parts = [problems(name, seed, split) for seed, split in ((1, "train"), (2, "test"))]
    train, test = ({next(part)[1].key for _ in range(300)} for part in parts)
    assert train and test and not train & test


def test_the_order_of_a_sum_or_the_name_of_a_person_do_not_change_the_split() -> None:
    class Fixed(Random):
        def __init__(self, *numbers: int) -> None:
            super().__init__(0)
            self.numbers = list(numbers)

        def randint(self, a: int, b: int) -> int:
            return self.numbers.pop(0)

    assert arithmetic.problem(1, Fixed(3, 8)).key == arithmetic.problem(1, Fixed(8, 3)).key
    keys: dict[str, set[str]] = {}
    for _, problem in (pair for pair, _ in zip(problems("word:1"), range(2000), strict=False)):
        keys.setdefault(problem.key, set()).add(problem.question)
    assert max(map(len, keys.values())) > 3


def test_about_a_tenth_is_held_out() -> None:
    from fastllm.train.tasks.making import is_test

    draws = [arithmetic.problem(4, random) for random in [Random(0)] for _ in range(3000)]
    assert 0.08 < sum(is_test(problem.key) for problem in draws) / 3000 < 0.12


def test_problems_repeat_only_when_a_level_has_no_others() -> None:
    texts = [record.text for record in make("arithmetic:3", 1000)]
    assert len(set(texts)) == 1000
    texts = [record.text for record in make("arithmetic:1", 300)]
    distinct = len(set(texts))
    assert 80 < distinct < 100 and len(set(texts[: distinct - 5])) == distinct - 5


def test_levels_grow_harder() -> None:
    for kind, levels in (("arithmetic", arithmetic.LEVELS), ("word", word.LEVELS)):
        lengths = [
            sum(len(r.columns["solution"]) for r in make(f"{kind}:{n}", 200)) for n in levels
        ]
        assert all(low < high for low, high in pairwise(lengths)), lengths


def test_a_range_of_levels_takes_turns() -> None:
    names = [record.columns["task"] for record in make("arithmetic:2-4", 6)]
    assert names == ["arithmetic:2", "arithmetic:3", "arithmetic:4"] * 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("arithmetics:2", "did you mean arithmetic"),
        ("sorting:1", "there are arithmetic, word"),
        ("arithmetic", "names no level"),
        ("arithmetic:9", "no level 9; there are arithmetic:1 to arithmetic:6"),
        ("word:0", "no level 0"),
        ("word:4-2", "no level 4-2"),
        ("word:1-9", "no level 1-9"),
        ("word:-1", "names no level"),
    ],
)
def test_a_task_that_there_is_not_is_named(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(name, 1)


def test_other_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="count must be at least 1"):
        make("word:1", 0)
    with pytest.raises(ValueError, match="split must be one of train, test"):
        make("word:1", 1, split="dev")


@pytest.mark.parametrize(
    ("expression", "written"),
    [
        (Operation("*", Operation("+", 1, 2), 3), "(1 + 2) * 3"),
        (Operation("-", 9, Operation("-", 5, 2)), "9 - (5 - 2)"),
        (Operation("-", Operation("-", 9, 5), 2), "9 - 5 - 2"),
        (Operation("+", Operation("*", 2, 3), Operation("/", 8, 4)), "2 * 3 + 8 / 4"),
        (Operation("-", 3, -4), "3 - (-4)"),
        (Operation("/", 12, Operation("*", 2, 3)), "12 / (2 * 3)"),
    ],
)
def test_brackets_stand_where_they_are_needed(expression: Operation, written: str) -> None:
    assert text(expression) == written
    assert evaluated(written) == value(expression)
    assert [evaluated(line.split(" = ")[-1]) for line in steps(expression)][-1] == value(expression)


@pytest.mark.parametrize(
    ("operator", "left", "right", "line"),
    [
        ("+", 27, 45, "27 + 45 = 27 + 40 + 5 = 67 + 5 = 72"),
        ("+", 3, 4, "3 + 4 = 7"),
        ("-", 45, 72, "45 - 72 = -(72 - 45) = -27"),
        ("*", 27, 6, "27 * 6 = 20 * 6 + 7 * 6 = 120 + 42 = 162"),
        ("*", -4, 6, "-4 * 6 = -24"),
        ("/", 84, 7, "84 / 7 = (12 * 7) / 7 = 12"),
        ("+", 0, 0, "0 + 0 = 0"),
    ],
)
def test_an_operation_is_worked_as_by_hand(operator: str, left: int, right: int, line: str) -> None:
    assert worked(operator, left, right) == line


def test_a_division_with_a_remainder_is_no_problem() -> None:
    with pytest.raises(ValueError, match="no whole number"):
        value(Operation("/", 7, 2))
    with pytest.raises(ValueError, match="no whole number"):
        value(Operation("/", 7, 0))


def test_examples_are_what_sft_and_rewards_read(tmp_path: Path) -> None:
    forms = {
        "answer": r"-?\d+",
        "solution": r"(.+ = -?\d+\n)+Answer: -?\d+",
        "think": r"<think>\n(.+ = -?\d+\n)+</think>\n-?\d+",
    }
    for completion, form in forms.items():
        records = list(examples("arithmetic:3-5", 20, 3, "test", completion=completion))
        assert records == list(examples("arithmetic:3-5", 20, 3, "test", completion=completion))
        file = tmp_path / f"{completion}.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        for conversation, record in zip(read_conversations([file]), records, strict=True):
            assert [m["content"] for m in conversation.messages] == [
                record["prompt"], record["completion"],
            ]  # fmt: skip
            assert re.fullmatch(form, record["completion"])
        prompts = read_prompts([file])
        made = make("arithmetic:3-5", 20, 3, "test")
        assert [p.text for p in prompts] == [p.text for p in made]
        assert [p.columns["answer"] for p in prompts] == [p.columns["answer"] for p in made]
        columns = gather_columns(prompts)
        answers = [str(text) for text in columns["completion"]]
        assert score(
            resolve(["exact_match"]), None, [p.text for p in prompts], answers, columns
        ).all()
    (plain,) = examples("arithmetic:2", 1, completion="answer", plain=True)
    assert plain["prompt"].endswith("\nAnswer:") and plain["completion"] == f" {plain['answer']}"
    with pytest.raises(ValueError, match="completion must be one of answer, solution, think"):
        list(examples("arithmetic:2", 1, completion="steps"))


def test_the_command_writes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "tasks", "arithmetic:2", "word:1", "--count", "2", "--seed", "5"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [*examples("arithmetic:2", 2, 5), *examples("word:1", 2, 5)]
    out = tmp_path / "new" / "sums.jsonl"
    command = ["data", "tasks", "word:4", "--count", "3", "--solutions", "--split", "test"]
    assert main([*command, "--out", str(out)]) == 0
    assert "3 problems" in capsys.readouterr().err
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines == list(examples("word:4", 3, 0, "test", completion="solution"))
    assert main([*command, "--out", str(out)]) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([*command, "--plain", "--out", str(out), "--overwrite"]) == 0
    assert "Question: " in out.read_text() and not list(out.parent.glob("*.part"))
    assert main(["data", "tasks", "word:9"]) == 2
    assert "word has no level 9" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--think"])
