"""Completions sampled from the live weights of a model in training, with their log-probabilities.

Token ids in, token ids out: nothing is tokenized again. The log-probabilities that the sampler
reports are those that a training pass would compute for the same weights, bit for bit, so they
serve as the old policy's. That holds for the temperature, and for nothing that cuts the
distribution: top-p and top-k are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastllm.engine.llm import LLM
from fastllm.engine.request import RequestOutput, SamplingParams
from fastllm.train.data.order import key, permutation
from fastllm.train.data.prompts import EncodedPrompt, PromptRecord
from fastllm.train.task import StepAbandoned

_SEED_BITS = 62  # a request's samples count up from its seed


@dataclass(frozen=True, kw_only=True, slots=True)
class Trajectory:
    """One sampled completion."""

    prompt_ids: Sequence[int]
    completion_ids: list[int]  # the end token included
    sampled_logprobs: list[float]  # of each completion token, at the temperature it was drawn at
    text: str  # without the end token; thoughts that the prompt has begun are marked
    finish_reason: str  # "stop", or "length": truncated
    group: int  # the number of the prompt; shared by its samples
    record: PromptRecord

    @property
    def columns(self) -> dict[str, Any]:
        """What goes with the prompt, for rewards."""
        return self.record.columns

    @property
    def truncated(self) -> bool:
        """Whether it was cut before the model ended it."""
        return self.finish_reason == "length"


class PromptStream:
    """An endless stream of prompts: one seeded permutation of all after another, by number."""

    def __init__(self, prompts: Sequence[EncodedPrompt], seed: int) -> None:
        if not prompts:
            raise ValueError("there is no prompt to sample from")
        self.prompts = prompts
        self._seed = seed
        self._order = (-1, permutation(1, seed))

    def __getitem__(self, number: int) -> EncodedPrompt:
        epoch, place = divmod(number, len(self.prompts))
        if self._order[0] != epoch:
            self._order = (epoch, permutation(len(self.prompts), self._seed, epoch))
        return self.prompts[int(self._order[1][place])]


class Rollouts:
    """Samples groups of completions.

    Args:
        llm: from `LLM.from_model` of the model in training.
        group_size: completions of each prompt; they share its pages in the cache.
        temperature: of the sampling, above 0.
        max_completion: tokens of a completion, at most.
        end_ids: ids that end one, beside the model's own. stop: strings that do.
        seed: of the run. A completion depends on it, on its prompt's number in the stream and on
            its place in the group: not on batches, steps or what else is sampled.
        stopping: asked between tokens; once it is true, the rollout raises `StepAbandoned`.
    """

    def __init__(
        self, llm: LLM, *, group_size: int, temperature: float, max_completion: int,
        end_ids: Sequence[int] = (), stop: Sequence[str] = (), seed: int = 0,
        stopping: Callable[[], bool] | None = None,
    ) -> None:  # fmt: skip
        if not temperature > 0:
            raise ValueError(
                f"temperature must be above 0, got {temperature}: greedy completions are all the "
                "same and have no probability to raise"
            )
        self.llm = llm
        self.group_size = group_size
        self.temperature = temperature
        self.max_completion = max_completion
        self.end_ids = tuple(end_ids)
        self.stop = tuple(stop)
        self.seed = seed
        self.stopping = stopping

    def __call__(
        self, prompts: Sequence[EncodedPrompt], numbers: Sequence[int]
    ) -> list[Trajectory]:
        """Completions of every prompt, those of one prompt side by side.

        numbers: of the prompts in the stream.
        Raises NumericalError if the model gives NaN.
        """
        params = [
            SamplingParams(
                n=self.group_size,
                temperature=self.temperature,
                max_tokens=self.max_completion,
                stop_token_ids=self.end_ids,
                stop=self.stop or None,
                seed=key(self.seed, number) >> (64 - _SEED_BITS),
            )
            for number in numbers
        ]
        outputs = self._generate(prompts, params)
        return [
            trajectory
            for prompt, number, output in zip(prompts, numbers, outputs, strict=True)
            for trajectory in _trajectories(prompt, number, output)
        ]

    def _generate(
        self, prompts: Sequence[EncodedPrompt], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[RequestOutput]:
        """The finished outputs, in order. Between two tokens a wish to stop is heard."""
        ids = [list(prompt.ids) for prompt in prompts]
        if self.stopping is None:
            return self.llm.generate(ids, params)
        outputs = self.llm.generate_until(self.stopping, ids, params)
        if any(sample.finish_reason == "abort" for found in outputs for sample in found.outputs):
            raise StepAbandoned("a rollout was asked to stop")
        return outputs

    def greedy(self, prompts: Sequence[EncodedPrompt]) -> list[Trajectory]:
        """The most probable continuation of each prompt."""
        params = SamplingParams(
            temperature=0.0,
            max_tokens=self.max_completion,
            stop_token_ids=self.end_ids,
            stop=self.stop or None,
        )
        outputs = self._generate(prompts, params)
        return [
            trajectory
            for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
            for trajectory in _trajectories(prompt, number, output)
        ]


def _trajectories(
    prompt: EncodedPrompt, number: int, output: RequestOutput
) -> Iterator[Trajectory]:
    for sample in output.outputs:
        assert sample.finish_reason is not None, "generate returns finished samples"
        yield Trajectory(
            prompt_ids=prompt.ids,
            completion_ids=sample.token_ids,
            sampled_logprobs=sample.sampled_logprobs,
            text=prompt.whole(sample.text),
            finish_reason=sample.finish_reason,
            group=number,
            record=prompt.record,
        )
