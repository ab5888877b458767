"""No text that a model can write crashes a shipped reward, holds it up, or fools it."""

from __future__ import annotations

import importlib.util
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm.train.rewards import accuracy as accuracy_module
from fastllm.train.rewards import final_answer, number, resolve, score

NAMES = ["exact_match", "accuracy", "think_format", "length", "repetition", "length:10"]
HAS_MATH_VERIFY = importlib.util.find_spec("math_verify") is not None
MILLION = 10**6

HUGE = [
    "9" * MILLION,
    "Answer: " + "9" * MILLION,
    "\\boxed{" + "9" * MILLION + "}",
    "1," * MILLION,
    "-" * MILLION + "72",
    "1/" * MILLION + "1",
    "." * MILLION,
    "1." * MILLION,
    " " * MILLION + "1",
    "\\boxed{" * 100_000 + "1" + "}" * 100_000,
    "{" * MILLION,
    "\\frac" * 200_000,
    "answer is " * 100_000,
    "answer is:" + " " * MILLION + "2",
    "####" * 250_000,
    "<think>" * 100_000 + "</think>" * 100_000,
    "\n" * MILLION,
    "\0" * MILLION,
    "你好" * 500_000,
    "$" * MILLION,
    "=" * MILLION + "3",
    "e" * MILLION,
    "1e" * MILLION,
]
SMALL = [
    "1e999", "-1e999999999999", "1e-999999999", "\\boxed{1e999999999}", "nan", "inf", "Answer: \0",
    "\ud800", "\u202e72", "\u0667\u0662", "72\u0301", "Answer: 72\u200b", "1/0", "Answer: 0/0",
    "\\boxed{\\frac{1}{0}}", "%s%n{}", "\\boxed{__import__('os').getpid()}", "<think></think>",
    "\\boxed{}", "####", "Answer:", "</think>", "\\", "{", "}", "\\boxed{\\text{72}}",
]  # fmt: skip
FORMULAS = [
    "9^{9^{9^{9}}}", "\\frac{1}{9^{9^{9^{9}}}}", "\\int_0^{\\infty} e^{-x^2} dx", "10000000!",
    "((((1000000!)!)!)!)!", "\\sum_{n=1}^{10^{12}} \\frac{1}{n}", "x^{x^{x^{x^{x}}}}=2",
    "\\sqrt{" * 100 + "2" + "}" * 100, "\\frac{" * 80 + "1", "(x+y+z+w)^{3000}",
    "\\sin(\\cos(" * 40,
    "\\begin{pmatrix} 1 & 2", "\\left(" * 50, "\\prod_{k=1}^{999999} k", "10^{10^{10}}",
    "\\binom{10^9}{10^8}", "2^{2^{2^{2^{2^{2}}}}} \\bmod 7", "\\lim_{x\\to0}\\frac{\\sin x}{x}",
]  # fmt: skip


def scores(completions: list[str], answer: str) -> list[list[float]]:
    count = len(completions)
    columns = {"answer": [answer] * count, "solution": [None] * count}
    found = score(resolve(NAMES), None, ["q"] * count, completions, columns)
    assert found.isfinite().all()
    return found.tolist()


@pytest.mark.parametrize("text", HUGE, ids=lambda text: repr(text[:12]))
def test_a_million_characters_take_no_time(text: str) -> None:
    start = time.process_time()
    (row,) = scores([text], "72")
    assert time.process_time() - start < 4.0  # below 1 s; other work on the machine does not count
    assert row[:2] == [0.0, 0.0]


@pytest.mark.parametrize("text", SMALL)
def test_odd_texts_are_worth_nothing(text: str) -> None:
    (row,) = scores([text], "42")
    assert row[:2] == [0.0, 0.0]


@pytest.mark.skipif(not HAS_MATH_VERIFY, reason="math-verify is not installed")
@pytest.mark.parametrize(
    "formulas",
    [FORMULAS[:1], pytest.param(FORMULAS, marks=pytest.mark.full)],
    ids=["one", "all"],
)
def test_formulas_that_never_end_are_worth_nothing_and_end(
    monkeypatch: pytest.MonkeyPatch, formulas: list[str]
) -> None:
    monkeypatch.setattr(accuracy_module, "SECONDS", 0.4)
    rows = scores([f"\\boxed{{{formula}}}" for formula in formulas], "\\sqrt{17}")
    assert [row[:2] for row in rows] == [[0.0, 0.0]] * len(formulas)
    # The process that was killed in between is there again.
    monkeypatch.setattr(accuracy_module, "SECONDS", 20.0)
    assert scores(["\\boxed{17^{1/2}}"], "\\sqrt{17}")[0][1] == 1.0


@pytest.mark.skipif(not HAS_MATH_VERIFY, reason="math-verify is not installed")
@pytest.mark.full
def test_every_odd_text_passes_through_math_verify() -> None:
    for text in [*SMALL, *HUGE]:
        (row,) = scores([text], "\\sqrt{17}")
        assert row[:2] == [0.0, 0.0], text[:40]


PIECES = st.sampled_from(
    ["\\boxed{", "}", "{", "####", "Answer:", "answer is", "<think>", "</think>", "\\frac", "1",
     "72", "-", "/", ",", ".", "e", "=", "$", "%", " ", "\n", "\\", "\\text{", "9" * 50,
     "\u2212", "\0"]
)  # fmt: skip


@given(st.lists(PIECES | st.text(max_size=4), max_size=30).map("".join))
@settings(max_examples=150, deadline=None)
def test_every_text_has_a_finite_reward(text: str) -> None:
    (row,) = scores([text], "72")
    assert row[0] in (0.0, 1.0) and row[0] == row[1] and row[2] in (0.0, 1.0)
    assert -1.0 <= row[3] <= 0.0 and -1.0 <= row[4] <= 0.0 and not math.isnan(row[5])
    answer = final_answer(text)
    if answer is not None and number(answer) == 72:
        assert row[0] == 1.0


@given(st.text(max_size=60), st.integers(-999, 999))
@settings(max_examples=100, deadline=None)
def test_the_right_number_at_the_end_is_right_after_any_words(text: str, value: int) -> None:
    (row,) = scores([f"{text}\n</think>\nAnswer: {value}"], str(value))
    assert row[0] == row[1] == 1.0
    (row,) = scores([f"{text}\n</think>\nAnswer: {value + 1}"], str(value))
    assert row[0] == row[1] == 0.0
