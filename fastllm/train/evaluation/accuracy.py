"""Accuracy and pass@k of a model's answers, and how sure they are."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastllm.train.data.prompts import PromptRecord, gather_columns
from fastllm.train.evaluation.answers import Answers
from fastllm.train.evaluation.statistics import Share, pass_at_k
from fastllm.train.rewards import NamedReward, score

RIGHT = 0.5  # an answer is right from this reward on


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """What came of an evaluation.

    accuracy: share of right samples. pass_at: by k. truncated: share of the samples that were cut
    off at their longest. reward, length: means over samples, of rewards and tokens.
    """

    problems: int
    samples: int
    accuracy: Share
    pass_at: dict[int, Share]
    truncated: float
    reward: float
    length: float

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "problems": self.problems,
            "samples": self.samples,
            "accuracy": self.accuracy.record(),
            "pass_at": {str(k): share.record() for k, share in self.pass_at.items()},
            "truncated": self.truncated,
            "mean_reward": self.reward,
            "mean_tokens": self.length,
        }


def grade(
    reward: NamedReward,
    records: Sequence[PromptRecord],
    answers: Sequence[Answers],
    timeout: float = 60.0,
) -> list[list[float]]:
    """The reward of every sample of every problem.

    Args:
        reward: what judges.
        records: the problems as they were read.
        answers: of each.
        timeout: seconds for all of them.

    Raises:
        RewardError: if the reward raises, takes too long, or gives what is no number; it names the
            reward and the sample.
    """
    asked = [r for r, found in zip(records, answers, strict=True) for _ in found.texts]
    rewards = score(
        [reward], None, [record.prompt for record in asked],
        [text for found in answers for text in found.texts], gather_columns(asked), timeout,
        truncated=[cut for found in answers for cut in found.truncated],
    )  # fmt: skip
    each = iter(rewards[:, 0].tolist())
    return [[next(each) for _ in found.texts] for found in answers]


def summarize(
    rewards: Sequence[Sequence[float]], answers: Sequence[Answers], ks: Sequence[int] = ()
) -> Accuracy:
    """The numbers of graded answers; every problem has as many samples.

    Raises ValueError if there are none, or a k is not from 1 to the number of samples.
    """
    right = [sum(reward >= RIGHT for reward in row) for row in rewards]
    samples = len(rewards[0]) if rewards else 0
    return Accuracy(
        problems=len(rewards),
        samples=samples,
        accuracy=Share.of([count / samples for count in right]),
        pass_at={k: Share.of([pass_at_k(samples, count, k) for count in right]) for k in ks},
        truncated=statistics.fmean(cut for found in answers for cut in found.truncated),
        reward=statistics.fmean(reward for row in rewards for reward in row),
        length=statistics.fmean(length for found in answers for length in found.lengths),
    )
