"""Rewards: what an answer is worth, as a number.

A reward is a plain function

    def reward(prompts: list[str], completions: list[str], **columns: list) -> list[float]

that gets the words of the prompts, the answers, and by name the columns of the data, and gives a
number for each answer. One column is not the data's: `finish_reasons`, "length" for an answer that
was cut at the longest length, else "stop". `resolve` turns names into rewards:

    accuracy             1 if the final answer is mathematically equal to the column `answer`, else
                         0: numbers exactly, other answers by math-verify (extra `train`), without
                         which those are an error
    exact_match          equal as a number, or letter for letter
    think_format         1 for <think>thoughts</think> and then an answer, else 0
    length[:N]           0 up to N characters (1,000), then falling, -1 from 2 N on
    repetition[:N]       0 if no N words (3) in a row occur twice, towards -1 the more do
    path/file.py:name    a function of a file, which runs in a process of its own
    model:DIR            the score of a reward model that `fastllm reward` trained

`check` finds before a run what a data set lacks. `score` calls rewards and checks what they give:
one that raises, gives NaN or the wrong number of values, or takes too long, is a RewardError that
names the reward, the answer and its prompt.
"""

from fastllm.train.rewards.answers import final_answer, number
from fastllm.train.rewards.resolving import SHIPPED, NamedReward, RewardFunction, resolve
from fastllm.train.rewards.scoring import check, score

__all__ = [
    "SHIPPED",
    "NamedReward",
    "RewardFunction",
    "check",
    "final_answer",
    "number",
    "resolve",
    "score",
]
