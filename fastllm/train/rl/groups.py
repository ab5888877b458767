"""The collector of critic-free algorithms: from prompts by groups and rewards to advantages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastllm.train.data.prompts import EncodedPrompt
from fastllm.train.rl.advantages import group_advantages
from fastllm.train.rl.algorithms import Algorithm
from fastllm.train.rl.batches import Sample
from fastllm.train.rl.metrics import RlMetrics, SampleFile
from fastllm.train.rl.objective import kl_estimate
from fastllm.train.rl.rollout import PromptStream, Rollouts, Trajectory
from fastllm.train.task import NothingToLearn

MANY_CUT = 0.5  # share of completions without an end from which that is said
MAX_ROUNDS = 10  # rollouts in a row that may leave nothing, or too little, to train on; as in DAPO

Score = Callable[[Sequence[Trajectory]], Tensor]  # float32 [N, F]: every reward of every completion
Reference = Callable[[Sequence[Sample]], list[list[float]]]  # log-probabilities by the reference
Say = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Group:
    """The completions of one prompt with their rewards."""

    trajectories: Sequence[Trajectory]
    rewards: Sequence[float]

    @property
    def equal(self) -> bool:
        """Whether all rewards are the same number."""
        return min(self.rewards) == max(self.rewards)


class GroupCollector:
    """Makes the samples of a rollout; see `fastllm.train.rl.batches.Collector`.

    Args:
        stream: the prompts.
        rollouts: samples their completions.
        score: rewards by function.
        names, weights: of those functions.
        algorithm: what becomes of rewards.
        prompts: prompts of a rollout.
        reference: gives the reference's log-probabilities; None: beta is 0.
        metrics: gets the numbers.
        say: gets a line when a rollout leaves nothing to train on.
        file, shown: completions of each rollout that are saved there.
    """

    cuts_help = "a larger max_completion helps, or mask_truncated"

    def __init__(
        self, stream: PromptStream, rollouts: Rollouts, score: Score, *, names: Sequence[str],
        weights: Sequence[float], algorithm: Algorithm, prompts: int, reference: Reference | None,
        metrics: RlMetrics, say: Say, file: SampleFile | None = None, shown: int = 0,
    ) -> None:  # fmt: skip
        self.stream = stream
        self.rollouts = rollouts
        self.score = score
        self.names = list(names)
        self.weights = torch.tensor(list(weights), dtype=torch.float64)
        self.algorithm = algorithm
        self.prompts = prompts
        self.reference = reference
        self.metrics = metrics
        self.say = say
        self.file = file
        self.shown = shown
        self._warned = False
        self._drawn = 0  # prompts taken from the stream
        self._fingerprint = fingerprint(stream.prompts)

    def __call__(self, step: int) -> list[Sample]:
        """Samples of the next rollout. Raises what rewards and generation raise, and NothingToLearn
        if nothing is left to train on of `MAX_ROUNDS` rollouts."""
        with self.metrics.undone_if_raised():
            return self._collect(step)

    def _collect(self, step: int) -> list[Sample]:
        drawn, groups = self._drawn, list[Group]()
        for tried in range(1, MAX_ROUNDS + 1):
            numbers = range(drawn, drawn + self.prompts)
            drawn += self.prompts
            groups += [g for g in self._round(numbers) if self._useful(g)]
            if len(groups) >= (self.prompts if self.algorithm.dynamic_sampling else 1):
                break
            if not groups:
                self.say(f"step {step}: rollout {tried} leaves nothing to train on: {self._why}")
        if not groups:
            raise NothingToLearn(
                f"step {step}: {MAX_ROUNDS} rollouts in a row left nothing to train on: "
                f"{self._why}. Easier prompts (harder ones, if all is right already), a larger "
                "group_size or max_completion help; the steps before are saved"
            )
        if len(groups) < self.prompts and self.algorithm.dynamic_sampling:
            self.say(f"step {step}: {MAX_ROUNDS} rollouts gave {len(groups)} of {self.prompts} "
                     "groups with different rewards: the step is made of these")  # fmt: skip
        samples = self._samples(step, groups[: self.prompts])
        self._drawn = drawn
        return samples

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, and what the next line of metrics has so far."""
        return {
            "prompts": self._drawn, "seed": self.rollouts.seed, "data": self._fingerprint,
            "metrics": self.metrics.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go there. Raises ValueError naming what does not fit."""
        for name, mine in (("seed", self.rollouts.seed), ("data", self._fingerprint)):
            if state[name] != mine:
                raise ValueError(
                    f"the {name} of its prompts is {state[name]!r}, here it is {mine!r}: give the "
                    "data, template and seed of before"
                )
        self._drawn = int(state["prompts"])
        self.metrics.load_state_dict(state.get("metrics") or {"sums": {}, "ends": {}})

    def _round(self, numbers: Sequence[int]) -> list[Group]:
        """Completions of the prompts of these numbers, with their rewards."""
        with self.metrics.phase("rollout"):
            trajectories = self.rollouts([self.stream[n] for n in numbers], numbers)
        self.metrics.rollout(trajectories)
        self._warn_of_cuts(trajectories)
        with self.metrics.phase("reward"):
            table = self.score(trajectories)
        # Not a product of a matrix: it may round equal rows differently, and their group is equal.
        rewards = (table.double() * self.weights).sum(1)
        size = self.rollouts.group_size
        parts = zip(batched(trajectories, size), batched(rewards.tolist(), size), strict=True)
        groups = [Group(*part) for part in parts]
        self.metrics.rewards(table, self.names, rewards, [g.equal for g in groups])
        return groups

    def _warn_of_cuts(self, trajectories: Sequence[Trajectory]) -> None:
        """Say once that most completions have no end, so that ending is not learned: a policy that
        is paid for what it says before the cut unlearns it, and metrics look well."""
        cut = sum(t.truncated for t in trajectories) / len(trajectories)
        if self._warned or cut <= MANY_CUT or self.algorithm.mask_truncated:
            return
        self._warned = True
        self.say(
            f"warning: {cut:.0%} of a rollout's completions were cut at max_completion, and "
            f"are rewarded as they are: {self.cuts_help}"
        )

    def _useful(self, group: Group) -> bool:
        """Whether something of it is trained on."""
        if self.algorithm.dynamic_sampling and group.equal:
            return False
        return any(map(self._trains, group.trajectories, group.rewards))

    def _trains(self, trajectory: Trajectory, reward: float) -> bool:
        if self.algorithm.mask_truncated and trajectory.truncated:
            return False
        return self.algorithm.advantage != "keep" or reward >= self.algorithm.keep_from

    @property
    def _why(self) -> str:
        reasons = []
        if self.algorithm.dynamic_sampling:
            reasons.append("the rewards of each group are equal")
        if self.algorithm.mask_truncated:
            reasons.append("every completion is truncated")
        if self.algorithm.advantage == "keep":
            reasons.append(f"no reward is {self.algorithm.keep_from:g} or more")
        return " or ".join(reasons)

    def _samples(self, step: int, groups: Sequence[Group]) -> list[Sample]:
        """What is trained on, with advantages."""
        trajectories = [t for group in groups for t in group.trajectories]
        rewards = torch.tensor([r for g in groups for r in g.rewards], dtype=torch.float64)
        samples = [
            Sample(
                prompt_ids=t.prompt_ids,
                completion_ids=t.completion_ids,
                old=t.sampled_logprobs,
                advantages=[],
                group=t.group,
            )
            for t in trajectories
        ]
        if self.reference is not None:
            with self.metrics.phase("reference"):
                references = self.reference(samples)
            if self.algorithm.kl_in == "reward":
                rewards = rewards - self.algorithm.beta * self._divergences(samples, references)
            samples = [
                replace(s, extra={"reference": r}) for s, r in zip(samples, references, strict=True)
            ]
        advantages = self._advantages(rewards, [t.group for t in trajectories])
        self._save(step, trajectories, rewards.tolist(), advantages)
        raw = [r for group in groups for r in group.rewards]
        return [
            replace(sample, advantages=[advantage] * len(sample.completion_ids))
            for sample, trajectory, reward, advantage in zip(
                samples, trajectories, raw, advantages, strict=True
            )
            if self._trains(trajectory, reward)
        ]

    def _divergences(
        self, samples: Sequence[Sample], references: Sequence[Sequence[float]]
    ) -> Tensor:
        """The estimated KL of every completion, summed over its tokens: float64 [N]."""
        return torch.stack(
            [
                kl_estimate(
                    torch.tensor(sample.old, dtype=torch.float64),
                    torch.tensor(reference, dtype=torch.float64),
                    self.algorithm.kl,
                ).sum()
                for sample, reference in zip(samples, references, strict=True)
            ]
        )

    def _advantages(self, rewards: Tensor, groups: Sequence[int]) -> list[float]:
        algorithm = self.algorithm
        if algorithm.advantage == "keep":
            return [1.0] * len(rewards)
        found = group_advantages(
            rewards, torch.tensor(groups), algorithm.scale, algorithm.advantage == "leave_one_out"
        )
        values: list[float] = found.tolist()
        return values

    def _save(
        self, step: int, trajectories: Sequence[Trajectory], rewards: Sequence[float],
        advantages: Sequence[float],
    ) -> None:  # fmt: skip
        if self.file is None:
            return
        found = zip(trajectories, rewards, advantages, strict=True)
        rows = [
            {
                "prompt": t.record.text, "completion": t.text, "reward": reward,
                "advantage": advantage, "tokens": len(t.completion_ids),
                "finish_reason": t.finish_reason,
            }
            for t, reward, advantage in islice(found, self.shown)
        ]  # fmt: skip
        self.file.write(step, rows)


def fingerprint(prompts: Sequence[EncodedPrompt]) -> str:
    """A hash of the prompts' tokens and columns, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        text = json.dumps([list(prompt.ids), prompt.record.columns], sort_keys=True, default=str)
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()


def batched(values: Sequence[T], size: int) -> list[Sequence[T]]:
    """Consecutive parts of `size` values."""
    return [values[i : i + size] for i in range(0, len(values), size)]
