"""The shipped rewards: what is an answer, when it is right, and what else is worth something."""

from __future__ import annotations

import importlib.util
from fractions import Fraction
from typing import Any

import pytest

from fastllm.errors import RewardError
from fastllm.train.rewards import check, final_answer, number, resolve, score
from fastllm.train.tasks import make, task_names

needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed"
)


def values(name: str, completions: list[str], prompt: str = "q", **columns: Any) -> list[float]:
    count = len(completions)
    found = score(
        resolve([name]), None, [prompt] * count, completions,
        {key: [item] * count for key, item in columns.items()},
    )  # fmt: skip
    return [float(value) for value in found[:, 0]]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("27 + 45 = 67 + 5 = 72.", "72"),
        ("It is **72**.", "72"),
        ("She has 27-45 of them", "45"),
        ("so -27", "-27"),
        ("so \u221227", "\u221227"),
        ("costs $1,234.50 in all", "1,234.50"),
        ("Answer: 72\nbecause 45 + 27 is 60 + 12", "72"),
        ("The answer is: 72 apples.", "72 apples"),
        ("the ANSWER is\n\n**72**", "72"),
        ("final answer = 72", "72"),
        ("a\n#### 72", "72"),
        ("#### 71 then \\boxed{72}", "72"),
        ("\\boxed{71} then Answer: 72", "72"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("$\\boxed{72", "72"),
        ("Answer: 72 and \\boxed{", "72 and \\boxed{"),
        ("Answer:", None),
        ("1, 2, 3</think>72", "72"),
        ("<think>72", None),
        ("nothing", None),
        ("", None),
    ],
)
def test_the_final_answer_is_the_marked_one_or_the_last_number(
    text: str, answer: str | None
) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("72", 72), ("-3", -3), ("\u22123", -3), ("1,234.5", Fraction(2469, 2)),
        ("3/4", Fraction(3, 4)), (".5", Fraction(1, 2)), ("1e3", 1000), ("$5", 5), ("12%", 12),
        ("12\\%", 12), ("72.", 72),
        ("72.0", 72), ("144/2", None), ("3/0", None), ("1e9999", None), ("9" * 2000, None),
        ("1,23", None), ("x", None), ("", None), ("7 2", None), ("\u0663", None), ("nan", None),
    ],
)  # fmt: skip
def test_numbers_have_exact_values(text: str, value: Any) -> None:
    assert number(text) == value


@pytest.mark.parametrize("name", ["exact_match", "accuracy"])
@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("72", True), ("It is 72.", True), ("72.00", True), ("Answer: 72 apples", True),
        ("27 + 45 = 72", True), ("\\boxed{72}", True), ("\\boxed{72\\text{ apples}}", True),
        ("\\boxed{x = 72}", True), ("Answer: 144/2 = 72", True), ("\\boxed{\\$72}", True),
        ("<think>73?</think>72", True), ("Answer: **72**", True), ("\\boxed{7.2e1}", True),
        # What is still to be computed is no answer: a model would learn to repeat the question.
        ("Answer: 27 + 45", False), ("\\boxed{27 + 45}", False), ("\\boxed{144/2}", False),
        ("\\boxed{\\frac{144}{2}}", False), ("Answer: 72 * 1", False), ("\\boxed{-(-72)}", False),
        ("\\boxed{8 \\times 9}", False), ("Answer: 72 - 0", False), ("\\boxed{72^1}", False),
        ("<think>72", False), ("-72", False), ("720", False), ("seventy-two", False), ("", False),
        ("72 is 27 + 45", False),
    ],
)  # fmt: skip
def test_a_number_is_right_if_it_is_given_and_exact(
    name: str, completion: str, right: bool
) -> None:
    for answer in ("72", 72, 72.0, "72.0", "$72"):
        assert values(name, [completion], answer=answer) == [float(right)]


def test_fractions_are_numbers_however_they_are_written() -> None:
    completions = ["\\boxed{\\frac{1}{2}}", "\\boxed{\\frac12}", "Answer: 1/2 cup", "0.5", "50%",
                   "\\boxed{\\dfrac{2}{4}}", "1/3", "-0.5", "1,000/2,000"]  # fmt: skip
    for answer in ("0.5", "1/2", 0.5, ".50"):
        assert values("exact_match", completions, answer=answer) == [1, 1, 1, 1, 0, 1, 0, 0, 0]
    assert values("exact_match", ["\\boxed{1{,}000}", "1,000"], answer="1000") == [1, 1]


def test_texts_match_letter_for_letter() -> None:
    completions = ["B", " B.\n", "Answer: B", "\\boxed{B}", "**B**", "b", "A or B", "<think>B"]
    assert values("exact_match", completions, answer="B") == [1, 1, 1, 1, 1, 0, 0, 0]
    assert values("exact_match", ["New  York.", "The answer is New York"], answer="New York") == [
        1,
        1,
    ]


@needs_math_verify
def test_formulas_are_compared_by_math_verify() -> None:
    completions = ["\\boxed{\\frac{\\sqrt{2}}{2}}", "the answer is $1/\\sqrt{2}$", "Answer: 0.5",
                   "so we get $\\frac{\\sqrt 2}{2}$", "\\boxed{\\sqrt{2}}", "",
                   "<think>"]  # fmt: skip
    assert values("accuracy", completions, answer="\\frac{1}{\\sqrt{2}}") == [1, 1, 0, 1, 0, 0, 0]
    assert values("accuracy", ["\\boxed{(x+1)^2}", "\\boxed{x^2+1}"], answer="x^2+2x+1") == [1, 0]
    assert values("accuracy", ["\\boxed{\\{2,1\\}}"], answer="\\{1,2\\}") == [1]


def test_without_math_verify_only_other_answers_than_numbers_are_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "math_verify" else find(name)
    )
    rewards = resolve(["accuracy"])
    assert values("accuracy", ["72"], answer="72") == [1]
    check(rewards, {"answer": ["72", 3, "1/2"]})
    with pytest.raises(ModuleNotFoundError, match=r"fastllm-engine\[train\]"):
        check(rewards, {"answer": ["72", "\\sqrt{2}"]})
    with pytest.raises(RewardError, match=r"raised ModuleNotFoundError.*\[train\]"):
        values("accuracy", ["\\boxed{\\sqrt 2}"], answer="\\sqrt{2}")
    check(resolve(["exact_match"]), {"answer": ["\\sqrt{2}"]})


def test_think_format_wants_thoughts_and_an_answer_once() -> None:
    good = ["<think>a</think>b", "\n<think>\na\nb\n</think>\n\nc\nd"]
    bad = ["b", "<think>a</think>", "<think> </think>b", "a</think>b", "x<think>a</think>b",
           "<think>a</think>b</think>", "<think>a<think>b</think>c", "<think>a", ""]  # fmt: skip
    assert values("think_format", good + bad) == [1.0] * len(good) + [0.0] * len(bad)
    opened = ["a</think>b", "a</think>", "<think>a</think>b"]
    assert values("think_format", opened, prompt="q\n<think>\n") == [1.0, 0.0, 0.0]


def test_length_costs_only_beyond_the_limit() -> None:
    lengths = [0, 50, 100, 125, 150, 200, 1000]
    found = values("length:100", ["a" * n for n in lengths])
    assert found == pytest.approx([0, 0, 0, -0.25, -0.5, -1, -1])
    assert values("length", ["a" * 1000, "a" * 1500, "a" * 3000]) == [0.0, -0.5, -1.0]


def test_repetition_costs_the_share_that_is_repeated() -> None:
    texts = ["a b c d e f", "a b c a b c", "a a a a a a", "a b", "", "你好" * 200]
    found = values("repetition", texts)
    assert found[:5] == pytest.approx([0, -0.25, -0.75, 0, 0])
    assert found[5] < -0.98
    assert values("repetition:2", ["a b a b"]) == pytest.approx([-1 / 3])


@pytest.mark.parametrize("name", task_names())
def test_tasks_solutions_earn_their_reward(name: str) -> None:
    records = make(name, 60, seed=9)
    answers = [record.columns["answer"] for record in records]
    solutions = [record.columns["solution"] for record in records]
    wrong = [str(int(answer) + 1) for answer in answers]
    prompts = [record.text for record in records]
    for given, worth in ((solutions, 1), (answers, 1), (wrong, 0), (prompts, None)):
        found = score(resolve(["exact_match"]), None, prompts, given, {"answer": answers})
        if worth is None:  # saying the question again must not pay
            assert found.mean() < 0.3
        else:
            assert (found == worth).all()
