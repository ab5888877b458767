"""Reinforcement learning from groups of samples: GRPO, Dr. GRPO, DAPO, GSPO, RLOO, rejection.

    prompts -> a group of completions of each, sampled from the live weights
    completions -> rewards -> how much better each is than its group: advantages
    loss = the clipped policy gradient of every completion token, + beta KL to the first policy

An algorithm is a choice of parts, see `fastllm.train.rl.algorithms`; every part can be replaced.
The completions' log-probabilities come from the sampler with the bits of the training pass, so the
old policy costs no pass of its own and the first ratio is exactly 1.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from fastllm.train import distributed
from fastllm.train.config import load_config
from fastllm.train.epochs import Say
from fastllm.train.loop_config import LoopConfig
from fastllm.train.rl.algorithms import (
    PRESETS,
    Aggregation,
    Algorithm,
    Baseline,
    KlEstimator,
    Ratio,
    Scale,
)
from fastllm.train.rl.batches import RlBatches
from fastllm.train.rl.groups import GroupCollector
from fastllm.train.rl.metrics import SAMPLES, SampleFile
from fastllm.train.rl.policy_task import PolicyTask
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
class GrpoConfig(RolloutConfig):
    """What is asked, what is rewarded, and how the policy follows. None: as the algorithm has it.

    Raises ValueError naming the field.
    """

    algorithm: Literal["grpo", "dr_grpo", "dapo", "gspo", "rloo", "rejection"] = "grpo"
    advantage: Baseline | None = None
    scale: Scale | None = None
    ratio: Ratio | None = None
    clip_low: float | None = None
    clip_high: float | None = None
    aggregation: Aggregation | None = None
    beta: float | None = None  # of the KL to the first policy; 0: no reference is computed
    kl: KlEstimator | None = None
    kl_in: Literal["loss", "reward"] | None = None
    mask_truncated: bool | None = None
    dynamic_sampling: bool | None = None
    keep_from: float | None = None
    loop: LoopConfig = field(default_factory=lambda: rl_loop("runs/grpo"))

    def __post_init__(self) -> None:
        RolloutConfig.__post_init__(self)
        algorithm = self.parts()
        if self.group_size < algorithm.least_group:
            raise ValueError(
                f"group_size must be at least {algorithm.least_group}, got {self.group_size}: "
                f"advantage {algorithm.advantage} compares a sample with others of its prompt"
            )

    def parts(self) -> Algorithm:
        """The preset with what the configuration says otherwise."""
        named = {f.name: getattr(self, f.name) for f in fields(Algorithm)}
        return replace(PRESETS[self.algorithm], **{k: v for k, v in named.items() if v is not None})


def load(path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> GrpoConfig:
    """The configuration of a YAML file and overrides. Raises ValueError naming the key."""
    return load_config(GrpoConfig, path, overrides, aliases=ALIASES)


def main(config: GrpoConfig, say: Say = print) -> RlResult:
    """Train as `config` says; `say` gets lines for people.

    Raises DataError, ModelFileError, RewardError, ValueError and what `loop.run` raises.
    """
    check(config)
    with distributed.process_group(config.device) as device:
        algorithm, given = config.parts(), open_given(config, device)
        task = PolicyTask(
            config,
            given.source,
            given.tokenizer,
            algorithm,
            temperature=config.temperature,
            lr=config.learning_rate(given.source.config.hidden_size),
            end_ids=given.end_ids,
            template=given.saved_template,
            device=device,
        )
        if algorithm.beta:
            task.load_reference()
        rollouts = make_rollouts(config, task, [*given.trained, *given.held_out])
        collector = GroupCollector(
            PromptStream(given.trained, config.loop.seed),
            rollouts,
            lambda found: score_trajectories(config, given.rewards, found),
            names=given.names,
            weights=config.weights,
            algorithm=algorithm,
            prompts=config.prompts_per_rollout,
            reference=task.reference_log_probs if algorithm.beta else None,
            metrics=task.metrics,
            say=say,
            file=SampleFile(Path(config.loop.out) / SAMPLES) if config.samples else None,
            shown=config.samples,
        )
        task.batches = RlBatches(
            collector,
            mini_batches=config.mini_batches,
            epochs=config.epochs,
            micro_tokens=task.micro_tokens,
            aggregation=algorithm.aggregation,
            longest=config.max_completion,
            seed=config.loop.seed,
            skip=not (algorithm.beta and algorithm.kl_in == "loss"),  # else all of them pull
        )
        return train(config, task, given, rollouts, say)
