"""The collector of PPO: completions -> rewards of tokens -> advantages by the critic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastllm.train.rl.batches import Sample
from fastllm.train.rl.gae import gae, whiten
from fastllm.train.rl.groups import Group, GroupCollector
from fastllm.train.rl.kl_control import KlControl
from fastllm.train.rl.objective import kl_estimate

Values = Callable[[Sequence[Sample]], list[list[float]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRewards:
    """How the reward of a completion becomes that of its tokens; TRL's names.

    gamma, lam: see `gae`. kl: estimator of the KL to the reference of each token. whiten_rewards:
    divide the tokens' rewards by their deviation. missing_eos_penalty: taken from the score of a
    completion that was cut.
    """

    gamma: float = 1.0
    lam: float = 0.95
    kl: str = "k1"
    whiten_rewards: bool = False
    missing_eos_penalty: float | None = None


class PpoCollector(GroupCollector):
    """Makes the samples of a rollout, with an advantage and a return for every token.

    values: of the tokens of samples, by the critic. control: the coefficient of the KL penalty.
    Other arguments are those of `GroupCollector`; `reference` is needed where the coefficient is
    not 0.
    """

    cuts_help = "a larger max_completion helps, or a missing_eos_penalty"

    def __init__(
        self, *args: Any, values: Values, control: KlControl, rewards: TokenRewards, **more: Any
    ) -> None:
        super().__init__(*args, **more)
        self.values = values
        self.control = control
        self.rewards = rewards
        self._episodes = 0
        self._warned = rewards.missing_eos_penalty is not None

    def _collect(self, step: int) -> list[Sample]:
        """Samples of the next rollout. Raises what rewards and generation raise."""
        numbers = range(self._drawn, self._drawn + self.prompts)
        samples = self._samples(step, self._round(numbers))
        self._drawn += self.prompts
        return samples

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, and the KL coefficient."""
        mine = {"control": self.control.state_dict(), "episodes": self._episodes}
        return super().state_dict() | mine

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go there. Raises ValueError naming what does not fit."""
        super().load_state_dict(state)
        self.control.load_state_dict(state["control"])
        self._episodes = int(state["episodes"])

    def _samples(self, step: int, groups: Sequence[Group]) -> list[Sample]:
        """What is trained on: advantages, and in `extra` the critic's values and returns."""
        trajectories = [t for group in groups for t in group.trajectories]
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
        lengths = torch.tensor([len(s.completion_ids) for s in samples])
        scores = torch.tensor([r for g in groups for r in g.rewards], dtype=torch.float64)
        cut = torch.tensor([t.truncated for t in trajectories])
        if self.rewards.missing_eos_penalty is not None:
            scores = scores - self.rewards.missing_eos_penalty * cut
        kl = self._divergences_of_tokens(samples)
        with self.metrics.phase("value"):
            values = self.values(samples)
        flat = torch.tensor([v for part in values for v in part], dtype=torch.float64)
        advantages, returns = self._advantages_of_tokens(kl, scores, flat, lengths)
        self._note(samples, lengths, kl, scores, int((~cut).sum()))
        self.control.update(_sums(kl, lengths).mean().item(), len(samples))
        whole = whiten(advantages).split(lengths.tolist())
        self._save(step, trajectories, scores.tolist(), [float(part.mean()) for part in whole])
        return [
            replace(sample, advantages=part.tolist(), extra={"values": v, "returns": r.tolist()})
            for sample, part, v, r in zip(
                samples, whole, values, returns.split(lengths.tolist()), strict=True
            )
        ]

    def _divergences_of_tokens(self, samples: Sequence[Sample]) -> Tensor:
        """The KL of every token to the reference, float64 [N]; 0 without one."""
        old = torch.tensor([v for s in samples for v in s.old], dtype=torch.float64)
        if self.reference is None:
            return torch.zeros_like(old)
        with self.metrics.phase("reference"):
            references = self.reference(samples)
        reference = torch.tensor([v for part in references for v in part], dtype=torch.float64)
        return kl_estimate(old, reference, self.rewards.kl)

    def _advantages_of_tokens(
        self, kl: Tensor, scores: Tensor, values: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The score at a completion's last token, less the KL of each token; then GAE."""
        rewards = -self.control.coefficient * kl
        rewards[lengths.cumsum(0) - 1] += scores
        if self.rewards.whiten_rewards:
            rewards = whiten(rewards, shift=False).double()
        return gae(rewards, values, lengths, self.rewards.gamma, self.rewards.lam)

    def _note(
        self, samples: Sequence[Sample], lengths: Tensor, kl: Tensor, scores: Tensor, ended: int
    ) -> None:
        """Numbers of a rollout under TRL's names."""
        self._episodes += len(samples)
        divergence = _sums(kl, lengths).mean().item()
        penalty = -self.control.coefficient * divergence
        surprise = -sum(sum(s.old) for s in samples) / len(samples)
        for name, value in {
            "objective/kl": divergence,
            "objective/entropy": surprise,
            "objective/non_score_reward": penalty,
            "objective/rlhf_reward": penalty + scores.mean().item(),
            "objective/scores": scores.mean().item(),
            "objective/kl_coef": self.control.coefficient,
            "val/num_eos_tokens": float(ended),
        }.items():
            self.metrics.mean(name, value)
        self.metrics.largest("episode", float(self._episodes))


def _sums(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Of each completion."""
    return torch.stack([part.sum() for part in tokens.split(lengths.tolist())])
