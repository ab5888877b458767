"""Whether a final answer is mathematically the expected one.

Where a number is expected, numbers are compared exactly, here: what is still to be computed, such
as 27 + 45, is not 72. Other answers, roots, sets, intervals, formulas, are compared by math-verify
in a process of its own with limits on time and memory: 9^{9^{9^9}} is worth 0, and costs no more
than these limits.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import Any

from fastllm.train.rewards.answers import expected, marked, number, spoken
from fastllm.train.rewards.process import FunctionProcess
from fastllm.train.rewards.shipped import same
from fastllm.train.rewards.values import NotLoaded, SampleFault

SECONDS = 3.0  # for one answer; ordinary ones take a few milliseconds
MEMORY = 4 << 30  # bytes of address space of the process that compares
_TAIL = 400  # characters at the end of a completion without a mark that math-verify searches
_MAX_EXPECTED = 1000

Column = list[Any]


def require() -> None:
    """Raises ModuleNotFoundError naming the extra if math-verify is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise ModuleNotFoundError(
            "the reward 'accuracy' needs math-verify for answers that are no numbers: pip install "
            "'fastllm-engine[train]'. The reward 'exact_match' compares them letter for letter",
            name="math_verify",
        )


def accuracy(
    prompts: list[str], completions: list[str], *, answer: Column, **columns: Column
) -> list[float]:
    """1 if the final answer equals the column `answer` mathematically, else 0.

    The final answer is what the completion marks (see `final_answer`). Without a mark it is the
    last number, or where no number is expected the formula that math-verify finds near the end.
    Raises ValueError for an empty answer; ModuleNotFoundError for one that is no number if
    math-verify is not installed.
    """
    return [
        float(_right(expected(right), completion))
        for right, completion in zip(answer, completions, strict=True)
    ]


def _right(right: str, completion: str) -> bool:
    if len(right) > _MAX_EXPECTED:
        raise ValueError(f"the column 'answer' holds {len(right)} characters: {right[:40]!r}...")
    if same(right, completion):
        return True
    if number(right) is not None:
        return False
    require()
    said = spoken(completion)
    if said is None or not said.strip():
        return False
    found = marked(said)
    return _equal(right, said[-_TAIL:] if found is None else f"\\boxed{{{found}}}")


@lru_cache(maxsize=1 << 14)
def _equal(right: str, text: str) -> bool:
    """math-verify's word; False for what takes too long, too much memory, or ends its process."""
    try:
        return bool(_process().call((right, text), {}, SECONDS, None))
    except NotLoaded:
        raise
    except (TimeoutError, SampleFault):
        return False


@lru_cache(maxsize=1)
def _process() -> FunctionProcess:
    target = "fastllm.train.rewards.math_check:equal"
    return FunctionProcess(target, memory=MEMORY, quiet=True)
