"""Rewards that look at the words alone. None of them raises or stops on any text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastllm.train.rewards.answers import expected, marked, number, said_number, spoken

Column = list[Any]
Reward = Callable[..., list[float]]
OPEN, CLOSE = "<think>", "</think>"


def exact_match(
    prompts: list[str], completions: list[str], *, answer: Column, **columns: Column
) -> list[float]:
    """1 if the final answer is the expected one, else 0.

    Where the column `answer` holds a number, the final answer (see `final_answer`) must be exactly
    that number, however it is written; elsewhere the marked answer, or without a mark all that is
    said, must be the same text, spaces and a full stop at the end aside.
    """
    return [
        float(same(expected(right), completion))
        for right, completion in zip(answer, completions, strict=True)
    ]


def same(right: str, completion: str) -> bool:
    """Whether the final answer is the expected one, as a number or letter for letter."""
    value = number(right)
    if value is not None:
        return said_number(completion) == value
    said = spoken(completion)
    if said is None:
        return False
    found = marked(said)
    return _bare(said if found is None else found) == _bare(right)


def _bare(text: str) -> str:
    return " ".join(text.split()).strip("*_`$ ").removesuffix(".")


def think_format(prompts: list[str], completions: list[str], **columns: Column) -> list[float]:
    """1 for one <think>thoughts</think> and then an answer, neither of them empty, else 0.

    The opening tag may be the end of the prompt.
    """
    return [
        float(_thinks_first(completion, prompt.rstrip().endswith(OPEN)))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def _thinks_first(completion: str, opened: bool) -> bool:
    text = completion if opened else completion.lstrip()
    if not opened:
        if not text.startswith(OPEN):
            return False
        text = text[len(OPEN) :]
    thoughts, close, answer = text.partition(CLOSE)
    tags = OPEN in text or CLOSE in answer
    return bool(close and not tags and thoughts.strip() and answer.strip())


def length(limit: int) -> Reward:
    """A reward that lets answers of up to `limit` characters alone and makes longer ones cost:
    min(0, 1 - characters / limit), at least -1."""

    def reward(prompts: list[str], completions: list[str], **columns: Column) -> list[float]:
        return [max(-1.0, min(0.0, 1.0 - len(completion) / limit)) for completion in completions]

    return reward


def repetition(size: int) -> Reward:
    """A reward that is -(the share of the runs of `size` words that the answer has had before).

    Of text that is written without spaces, characters are the words. Shorter answers give 0.
    """

    def reward(prompts: list[str], completions: list[str], **columns: Column) -> list[float]:
        return [_repetition(completion, size) for completion in completions]

    return reward


def _repetition(completion: str, size: int) -> float:
    words: list[str] | str = completion.split()
    if len(completion) > 20 * max(len(words), 1):
        words = "".join(words)
    count = len(words) - size + 1
    if count < 1:
        return 0.0
    runs = zip(*(words[start : start + count] for start in range(size)), strict=True)
    return len(set(runs)) / count - 1.0
