"""Proximal policy optimization (Schulman et al., 2017) with a critic, as for human feedback.

    prompts -> a completion of each, sampled from the live weights
    reward of a token = -kl_coef KL(policy || first policy), at the last token + the reward
    critic: the reward still to come before every token -> advantages (GAE), whitened
    loss = the clipped policy gradient + vf_coef the critic's clipped squared error

Actor, critic, frozen reference and rewards. With an adapter the three models share one frozen base:
the reference is the base with adapters off, the critic has an adapter and a head of its own.
Rewards are functions, reward models (model:DIRECTORY), or both.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fastllm.train import distributed
from fastllm.train.config import load_config
from fastllm.train.epochs import Say
from fastllm.train.loop_config import LoopConfig
from fastllm.train.rl.algorithms import Algorithm
from fastllm.train.rl.kl_control import LIMIT, KlControl
from fastllm.train.rl.metrics import SAMPLES, SampleFile
from fastllm.train.rl.ppo_collector import PpoCollector, TokenRewards
from fastllm.train.rl.ppo_task import PpoBatches, PpoTask
from fastllm.train.rl.rollout import PromptStream
from fastllm.train.rl.setup import (
    ALIASES,
    RlResult,
    RolloutConfig,
    check,
    make_rollouts,
    open_given,
    rl_loop,
    score_trajectories,
    train,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PpoConfig(RolloutConfig):
    """What is asked, what is rewarded, and how policy and critic follow. Names are TRL's.

    Raises ValueError naming the field.
    """

    group_size: int = 1  # completions of a prompt
    prompts_per_rollout: int = 64
    mini_batches: int = 2  # optimizer steps of one pass over a rollout
    epochs: int = 2  # passes
    kl_coef: float = 0.05  # of the KL to the first policy, taken from every token's reward; 0: none
    kl_target: float | None = None  # nats a completion that an adaptive coefficient aims at
    kl_horizon: float = 10_000  # completions in which it may double
    kl_estimator: Literal["k1", "k3"] = "k1"
    cliprange: float = 0.2  # of the policy's ratio
    cliprange_value: float | None = 0.2  # how far a value may move from the rollout's
    vf_coef: float = 0.1  # weight of the critic's loss
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    missing_eos_penalty: float | None = None  # taken from the score of a completion that was cut
    critic: str | None = None  # a reward model's directory to start from; none: from the policy
    critic_lr: float | None = None
    loop: LoopConfig = field(default_factory=lambda: rl_loop("runs/ppo"))

    def __post_init__(self) -> None:
        RolloutConfig.__post_init__(self)
        self.check_positive("kl_target", "kl_horizon", "cliprange", "cliprange_value", "critic_lr")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        for name in ("kl_coef", "vf_coef", "missing_eos_penalty"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number from 0, got {value}")
        if self.kl_target is not None and not self.kl_coef:
            raise ValueError("kl_coef 0 cannot be adapted to kl_target: give one above 0")
        least = LIMIT * self.prompts_per_rollout * self.group_size
        if self.kl_target is not None and self.kl_horizon <= least:
            raise ValueError(
                f"kl_horizon must be above {least:g}, a fifth of a rollout's completions, got "
                f"{self.kl_horizon:g}: one rollout could turn the coefficient to 0 or below"
            )

    def parts(self) -> Algorithm:
        """A ratio for each token, clipped alike on both sides; the mean over all tokens."""
        return Algorithm(
            ratio="token", clip_low=self.cliprange, clip_high=self.cliprange, aggregation="token"
        )

    def token_rewards(self) -> TokenRewards:
        """What the scores of a rollout become, token by token."""
        return TokenRewards(
            gamma=self.gamma,
            lam=self.lam,
            kl=self.kl_estimator,
            whiten_rewards=self.whiten_rewards,
            missing_eos_penalty=self.missing_eos_penalty,
        )

    def critic_rate(self, hidden: int) -> float:
        """`critic_lr`, or the policy's: a step of Adam moves a value by up to the rate times the
        sum of its inputs' sizes, some hundreds; at 3e-3 SmolLM2's values swung by 1 for rewards
        of 0 and 1."""
        return self.learning_rate(hidden) if self.critic_lr is None else self.critic_lr


def load(path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> PpoConfig:
    """The configuration of a YAML file and overrides. Raises ValueError naming the key."""
    return load_config(PpoConfig, path, overrides, aliases=ALIASES)


def main(config: PpoConfig, say: Say = print) -> RlResult:
    """Train as `config` says; `say` gets lines for people.

    Raises DataError, ModelFileError, RewardError, ValueError and what `loop.run` raises.
    """
    check(config)
    with distributed.process_group(config.device) as device:
        algorithm, given = config.parts(), open_given(config, device)
        hidden = given.source.config.hidden_size
        task = PpoTask(
            config,
            given.source,
            given.tokenizer,
            algorithm,
            temperature=config.temperature,
            lr=config.learning_rate(hidden),
            end_ids=given.end_ids,
            template=given.saved_template,
            device=device,
            critic=config.critic,
            critic_lr=config.critic_rate(hidden),
            value_clip=config.cliprange_value,
            value_weight=config.vf_coef,
        )
        if config.kl_coef:
            task.load_reference()
        rollouts = make_rollouts(config, task, [*given.trained, *given.held_out])
        collector = PpoCollector(
            PromptStream(given.trained, config.loop.seed),
            rollouts,
            lambda found: score_trajectories(config, given.rewards, found),
            names=given.names,
            weights=config.weights,
            algorithm=algorithm,
            prompts=config.prompts_per_rollout,
            reference=task.reference_log_probs if config.kl_coef else None,
            metrics=task.metrics,
            say=say,
            file=SampleFile(Path(config.loop.out) / SAMPLES) if config.samples else None,
            shown=config.samples,
            values=task.values_of,
            control=KlControl(config.kl_coef, config.kl_target, config.kl_horizon),
            rewards=config.token_rewards(),
        )
        task.batches = PpoBatches(
            collector,
            mini_batches=config.mini_batches,
            epochs=config.epochs,
            micro_tokens=task.micro_tokens,
            aggregation=algorithm.aggregation,
            longest=config.max_completion,
            seed=config.loop.seed,
        )
        return train(config, task, given, rollouts, say)
