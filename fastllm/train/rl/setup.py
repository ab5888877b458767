"""What runs with rollouts share: configuration, prompts, rewards, and the engine that samples."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fastllm.engine.request import MAX_SAMPLES
from fastllm.errors import RewardError
from fastllm.models.loader import read_tokenizer
from fastllm.models.names import resolve
from fastllm.models.tokenizer import Tokenizer
from fastllm.models.weights import WeightSource, open_weights
from fastllm.train.checkpoint import newest_of, refuse_used
from fastllm.train.config import to_dict
from fastllm.train.data.masks import turn_ends
from fastllm.train.data.order import permutation
from fastllm.train.data.prompts import (
    EncodedPrompt,
    PromptRecord,
    encode_prompts,
    gather_columns,
    read_prompts,
)
from fastllm.train.epochs import Say, read_template
from fastllm.train.loop import LoopConfig, MetricsConfig, Result, ScheduleConfig, run
from fastllm.train.rewards import NamedReward, score
from fastllm.train.rewards import check as check_rewards
from fastllm.train.rewards import resolve as resolve_rewards
from fastllm.train.rl.policy_task import PolicyTask
from fastllm.train.rl.rollout import Rollouts, Trajectory
from fastllm.train.task import NothingToLearn
from fastllm.train.tasks import is_task
from fastllm.train.tune_config import ALIASES as TUNE_ALIASES
from fastllm.train.tune_config import TuneConfig

ALIASES = TUNE_ALIASES | {"reward": "rewards", "eval_every": "loop.eval_every"}


def rl_loop(out: str) -> LoopConfig:
    """The loop's defaults of such a run."""
    return LoopConfig(
        out=out,
        steps=200,
        schedule=ScheduleConfig(kind="constant"),
        eval_every=20,
        save_every=20,
        metrics=MetricsConfig(every=1),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig(TuneConfig):
    """What is asked, what is rewarded, and how completions are sampled.

    warmup, 5% of the steps as in other stages, is at most one step in runs of less than 30, and a
    warmup of one step is none: the first step has the whole rate. So it is in TRL and verl, which
    warm up over 0 steps unless told to (DAPO takes 20 of some thousand rollouts), and the runs that
    NOTES.md measures learned so. Where rewards fall in the first steps, --warmup 0.2 helps.

    Raises ValueError naming the field.
    """

    data: tuple[str, ...] = ()  # tasks (arithmetic:2), .jsonl, .json, .parquet files, or folders
    task_count: int = 10_000  # problems of a task
    eval_data: tuple[str, ...] = ()  # default: the tasks' test split, or a part of the files
    eval_prompts: int = 100  # held-out prompts, at most; 0: no evaluation
    chat_template: str = "model"  # its own, else plain; chatml, plain, or a Jinja file
    rewards: tuple[str, ...] = ("accuracy",)  # names, file.py:function, model:DIRECTORY
    reward_weights: tuple[float, ...] = ()  # default: 1 for each
    reward_timeout: float = 60.0  # seconds for the completions of a rollout
    group_size: int = 8  # completions of a prompt
    prompts_per_rollout: int = 8
    mini_batches: int = 1  # optimizer steps of one pass over a rollout
    epochs: int = 1  # passes
    max_completion: int = 256  # tokens
    temperature: float = 1.0
    top_p: float = 1.0  # neither may cut the distribution
    top_k: int = 0
    stop: tuple[str, ...] = ()  # strings that end a completion
    max_num_seqs: int | None = None  # completions that are decoded together
    cache_pages: int | None = None  # of the engine's cache; default: what fits in memory
    samples: int = 4  # completions of each rollout that samples.jsonl gets
    loop: LoopConfig = field(default_factory=lambda: rl_loop("runs/rl"))

    def __post_init__(self) -> None:
        TuneConfig.__post_init__(self)
        self.check_positive(
            "task_count", "reward_timeout", "prompts_per_rollout", "mini_batches", "epochs",
            "max_completion", "temperature", "max_num_seqs", "cache_pages",
        )  # fmt: skip
        if not 1 <= self.group_size <= MAX_SAMPLES:
            raise ValueError(
                f"group_size must be from 1 to {MAX_SAMPLES}, got {self.group_size}: give more "
                "prompts_per_rollout in its place"
            )
        for name in ("eval_prompts", "samples"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.top_p != 1 or self.top_k > 0:
            name = "top_p" if self.top_p != 1 else "top_k"
            raise ValueError(
                f"{name} must not cut the distribution, got {getattr(self, name)}: completions "
                "would come from another one than that whose log-probabilities are trained. A "
                "lower temperature is understood by both"
            )
        if not self.rewards:
            raise ValueError("rewards is empty: name at least one")
        if self.reward_weights and len(self.reward_weights) != len(self.rewards):
            raise ValueError(
                f"reward_weights has {len(self.reward_weights)} numbers for {len(self.rewards)} "
                "rewards"
            )
        if not all(map(math.isfinite, self.reward_weights)):
            raise ValueError(f"reward_weights must be finite, got {list(self.reward_weights)}")
        if self.lora.dropout:
            raise ValueError(
                f"lora.dropout must be 0, got {self.lora.dropout}: the policy that is trained "
                "would not be the one that sampled"
            )
        if self.mini_batches > self.prompts_per_rollout * self.group_size:
            raise ValueError(
                f"mini_batches is {self.mini_batches}, more than the "
                f"{self.prompts_per_rollout * self.group_size} completions of a rollout"
            )

    def learning_rate(self, hidden: int) -> float:
        """`lr`, or a tenth of what supervised stages take."""
        rate = TuneConfig.learning_rate(self, hidden)
        return rate if self.lr is not None else rate / 10

    @property
    def weights(self) -> tuple[float, ...]:
        """A weight for each reward."""
        return self.reward_weights or (1.0,) * len(self.rewards)


@dataclass(frozen=True, kw_only=True, slots=True)
class RlResult:
    """How a run ended, where its model is, and what greedy answers to held-out prompts earned."""

    run: Result
    output: Path  # adapter or model directory
    before: Mapping[str, float]  # empty without evaluation, and where a run was resumed

    @property
    def after(self) -> Mapping[str, float]:
        """The last evaluation."""
        return self.run.metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """What a run is given, opened, read and checked."""

    source: WeightSource
    tokenizer: Tokenizer
    template: str  # Jinja source, or "plain"
    rewards: Sequence[NamedReward]
    trained: list[EncodedPrompt]
    held_out: list[EncodedPrompt]

    @property
    def end_ids(self) -> list[int]:
        """Ids that end a completion: the model's, and what ends an answer by the template."""
        ends = {*self.tokenizer.eos_token_ids, *self.source.config.eos_token_ids}
        return sorted(
            ends if self.template == "plain" else {*ends, *turn_ends(self.tokenizer, self.template)}
        )

    @property
    def saved_template(self) -> str | None:
        """The chat template that goes with the weights."""
        return None if self.template == "plain" else self.template

    @property
    def names(self) -> list[str]:
        """Of the rewards."""
        return [reward.name for reward in self.rewards]


def check(config: RolloutConfig) -> None:
    """What a run needs before anything is loaded.

    Raises ValueError without data, and under torchrun: rollouts run in one process; CheckpointError
    if the folder holds a run that is not to be continued.
    """
    if not config.data:
        raise ValueError("data is empty: name tasks, such as arithmetic:2, or files of prompts")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "rollouts run in the one process that trains: start it without torchrun, with all "
            "cores (OMP_NUM_THREADS) or one GPU"
        )
    refuse_used(config.loop.out, config.loop.resume)


def open_given(config: RolloutConfig, device: torch.device) -> Given:
    """Open the model's files, the rewards and the prompts.

    Raises DataError, ModelFileError, RewardError or ValueError before anything is computed.
    """
    rewards = resolve_rewards(config.rewards, str(device))
    source = open_weights(resolve(config.model))
    tokenizer = read_tokenizer(source)
    template = template_or_plain(config.chat_template, tokenizer)
    context = source.config.max_position_embeddings
    trained, held_out = read_data(config, tokenizer, template, context)
    check_rewards(rewards, gather_columns([p.record for p in [*trained, *held_out]]))
    return Given(
        source=source, tokenizer=tokenizer, template=template, rewards=rewards, trained=trained,
        held_out=held_out,
    )  # fmt: skip


def train(
    config: RolloutConfig, task: PolicyTask, given: Given, rollouts: Rollouts, say: Say
) -> RlResult:
    """Run a task that has its batches, with evaluations of the held-out prompts, and save.

    The result of the steps that were done is also there after a reward's failure or when nothing
    more is to be learned, beside the checkpoint that a resume goes on from.
    """
    task.set_evaluation(
        rollouts,
        lambda found: score_trajectories(config, given.rewards, found),
        names=given.names,
        weights=config.weights,
        asked=given.held_out,
        shown=config.samples,
    )
    try:
        result = run(task, config.loop_of(config.loop.steps), settings=to_dict(config))
    except (RewardError, NothingToLearn):
        if newest_of(config.loop.out) is not None:  # live weights: its steps
            say(f"saved to {task.save_result(config.loop.out)}")
        raise
    output = task.save_result(config.loop.out)
    say(f"saved to {output}")
    return RlResult(run=result, output=output, before=task.first_evaluation)


def make_rollouts(
    config: RolloutConfig, task: PolicyTask, prompts: Sequence[EncodedPrompt]
) -> Rollouts:
    """The engine on the task's live weights, as long as the longest prompt needs."""
    total = config.prompts_per_rollout * config.group_size
    pages = {} if config.cache_pages is None else {"num_pages": config.cache_pages}
    llm = task.serve(
        max_model_len=max(len(prompt.ids) for prompt in prompts) + config.max_completion,
        max_num_seqs=config.max_num_seqs or min(total, 64),
        **pages,
    )
    return Rollouts(
        llm,
        group_size=config.group_size,
        temperature=config.temperature,
        max_completion=config.max_completion,
        end_ids=task.end_ids,
        stop=config.stop,
        seed=config.loop.seed,
        stopping=lambda: task.stopping(),
    )


def read_data(
    config: RolloutConfig, tokenizer: Tokenizer, template: str, context: int
) -> tuple[list[EncodedPrompt], list[EncodedPrompt]]:
    """(prompts to train on, held-out prompts), encoded.

    Raises DataError naming the record, also of a prompt that does not fit into the context with a
    completion.
    """
    room = context - config.max_completion
    if room < 1:
        raise ValueError(
            f"max_completion {config.max_completion} fills the model's context of {context}"
        )

    def encoded(records: Sequence[PromptRecord]) -> list[EncodedPrompt]:
        return encode_prompts(records, tokenizer, template, max_tokens=room) if records else []

    count, seed = config.eval_prompts, config.loop.seed
    records = read_prompts(config.data, task_count=config.task_count, seed=seed)
    if not count:
        return encoded(records), []
    if config.eval_data or all(map(is_task, config.data)):
        held = read_prompts(
            config.eval_data or config.data, task_count=count, seed=seed, split="test"
        )
        chosen = set(permutation(len(held), seed, -1)[:count].tolist())
        return encoded(records), encoded([r for i, r in enumerate(held) if i in chosen])
    chosen = set(permutation(len(records), seed, -1)[: min(count, len(records) // 20)].tolist())
    kept = [r for i, r in enumerate(records) if i not in chosen]
    return encoded(kept), encoded([r for i, r in enumerate(records) if i in chosen])


def template_or_plain(name: str, tokenizer: Tokenizer) -> str:
    """Jinja source of the template that `name` means, or "plain". Raises ValueError."""
    if name == "plain":
        return name
    source = read_template(name)
    return tokenizer.chat_template or "plain" if source is None else source


def score_trajectories(
    config: RolloutConfig, rewards: Sequence[NamedReward], found: Sequence[Trajectory]
) -> Tensor:
    """Every reward of every completion, float32 [N, F]. Raises RewardError."""
    return score(
        rewards,
        None,
        [t.record.prompt for t in found],
        [t.text for t in found],
        gather_columns([t.record for t in found]),
        timeout=config.reward_timeout,
        truncated=[t.truncated for t in found],
    )
