"""Policy and critic of a PPO run as the loop sees them: the loss of both, and what is saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastllm.models.tokenizer import Tokenizer
from fastllm.models.weights import WeightSource
from fastllm.train.optim import MasterOptimizer, OptimConfig, make_optimizer
from fastllm.train.rl.algorithms import Algorithm
from fastllm.train.rl.batches import RlBatches, RlMicro, Sample
from fastllm.train.rl.critic import ActorCritic, make_critic, value_loss
from fastllm.train.rl.policy_task import PolicyTask
from fastllm.train.tune_config import TuneConfig


@dataclass(frozen=True, slots=True)
class ValueMicro:
    """A micro batch for the critic. Its tokens count where the policy learns from them."""

    micro: RlMicro
    tokens: int = 0


class PpoBatches(RlBatches):
    """Each micro batch twice: for the policy, then for the critic.

    One after the other they hold the activations of one model at a time.
    """

    def __next__(self) -> list[Any]:
        return [part for micro in super().__next__() for part in (micro, ValueMicro(micro))]


class PpoTask(PolicyTask):
    """A policy with its critic; one optimizer steps both, each at its own rate.

    critic: directory of a reward model to start the critic from; None: see `make_critic`.
    critic_lr: the critic's peak learning rate. value_clip, value_weight: see `value_loss`; the sum
    of both losses is minimized. Other arguments are those of `PolicyTask`.
    """

    name = "ppo"

    def __init__(
        self,
        config: TuneConfig,
        source: WeightSource,
        tokenizer: Tokenizer,
        algorithm: Algorithm,
        *,
        temperature: float,
        lr: float,
        end_ids: Sequence[int],
        template: str | None,
        device: torch.device | str = "cpu",
        critic: str | None = None,
        critic_lr: float,
        value_clip: float | None = 0.2,
        value_weight: float = 0.1,
    ) -> None:
        super().__init__(
            config, source, tokenizer, algorithm, temperature=temperature, lr=lr, end_ids=end_ids,
            template=template, device=device,
        )  # fmt: skip
        self.value_clip = value_clip
        self.value_weight = value_weight
        self.critic = make_critic(
            self.decoder, source, self.lora, start=critic, tokenizer=tokenizer,
            seed=config.loop.seed + 1,
        )  # fmt: skip
        self.model = ActorCritic(self.decoder, self.critic.decoder)
        decay = config.weight_decay
        groups = [
            group
            for model, rate in ((self.decoder, lr), (self.critic.decoder, critic_lr))
            for group in make_optimizer(
                model, OptimConfig(lr=rate, weight_decay=decay)
            ).param_groups
        ]
        self.optimizer = MasterOptimizer(groups)

    def describe(self) -> list[str]:
        """What is trained."""
        return [*super().describe(), self.critic.line()]

    def values_of(self, samples: Sequence[Sample]) -> list[list[float]]:
        """The critic's values of completion tokens, by the live weights."""
        with self.untrained():
            return self.critic.values_of(samples, self.micro_tokens)

    # what the loop calls

    def loss(self, micro: RlMicro | ValueMicro) -> Tensor:
        """The policy's loss of a micro batch, or the critic's, summed over tokens."""
        if isinstance(micro, ValueMicro):
            return self._value_loss(micro.micro.to(self.device))
        policy = super().loss(micro)
        self.metrics.mean("loss/policy_avg", policy.detach() / micro.tokens, micro.tokens)
        return policy

    def _value_loss(self, micro: RlMicro) -> Tensor:
        values = self.critic.values(micro, checkpoint=self.checkpointing)
        losses, clipped = value_loss(
            values, micro.extra["values"], micro.extra["returns"], self.value_clip
        )
        self.metrics.mean("loss/value_avg", losses.detach().mean(), micro.tokens)
        self.metrics.mean("val/clipfrac_avg", clipped.float().mean(), micro.tokens)
        if micro.fresh:
            self._note_values(micro, values.detach())
        return self.value_weight * (losses * micro.weights).sum()

    def _note(self, micro: RlMicro, logp: Tensor, entropy: Tensor) -> None:
        super()._note(micro, logp, entropy)
        delta = logp - micro.old
        ratio = delta.exp()
        self.metrics.mean("policy/approxkl_avg", 0.5 * delta.square().mean(), micro.tokens)
        self.metrics.mean("policy/entropy_avg", entropy, micro.tokens)
        self.metrics.mean("val/ratio", ratio.mean(), micro.tokens)
        self.metrics.mean("val/ratio_var", ratio.var(correction=0), micro.tokens)

    def _note_clip(self, micro: RlMicro, low: Tensor, high: Tensor) -> None:
        super()._note_clip(micro, low, high)
        self.metrics.mean("policy/clipfrac_avg", low + high, micro.tokens)

    def _note_values(self, micro: RlMicro, values: Tensor) -> None:
        """How far the critic is from what came; the values must be those of the rollout."""
        returns = micro.extra["returns"]
        self.metrics.largest("value_difference", (values - micro.extra["values"]).abs().max())
        self.metrics.mean("val/error", (values - returns).square().mean(), micro.tokens)
        self.metrics.mean("val/mean", values.mean(), micro.tokens)

    def flops(self, micro: RlMicro | ValueMicro) -> float:
        """Of forward and backward."""
        if isinstance(micro, ValueMicro):
            return self.training_flops(len(micro.micro.documents.ids), 0)
        return super().flops(micro)

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share."""
        trained = self.critic.trained().values()
        return super().identity() | {"critic_values": sum(p.numel() for p in trained)}

    def state(self) -> dict[str, Tensor]:
        """The critic's trained weights."""
        mine = {f"critic.{name}": p for name, p in self.critic.trained().items()}
        return super().state() | mine
