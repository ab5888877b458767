"""On-policy distillation: the student's own answers, on which the teacher is asked.

    each prompt of a step is answered by the student (a share of them), else the data set's answer
    is taken; loss = the divergence at every token of the answers

as in Agarwal et al., 2023 (arXiv 2306.13649). The answers come from the live weights, are used for
one step, and are not differentiated through. Who answers, and what is drawn, depends on the seed
and the prompt's number alone: a run that resumes samples what the one before would have.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastllm.engine.llm import LLM
from fastllm.engine.request import SamplingParams
from fastllm.errors import DataError
from fastllm.train.data.batch import MicroBatch
from fastllm.train.data.examples import fingerprint, micro_batches
from fastllm.train.data.masks import Example
from fastllm.train.data.order import key, permutation
from fastllm.train.data.prompts import EncodedPrompt, PromptRecord
from fastllm.train.distillation.task import DistillTask
from fastllm.train.rl.rollout import Rollouts, Trajectory

_SHOWN = 4  # answers of a sample
_WHO = 0x64697374  # keeps the draw of who answers apart from the seeds of answers


@dataclass(frozen=True, kw_only=True, slots=True)
class OnPolicyConfig:
    """Who answers and how. Raises ValueError naming the field."""

    student_share: float = 1.0  # of the prompts; the others' answers are the data set's
    temperature: float = 1.0  # of the student's answers
    max_completion: int = 256  # tokens of an answer
    samples: int = 1  # answers to each prompt
    max_num_seqs: int | None = None  # answers that are decoded together

    def __post_init__(self) -> None:
        if not 0 <= self.student_share <= 1:
            raise ValueError(f"student_share must be from 0 to 1, got {self.student_share}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        for name in ("max_completion", "samples", "max_num_seqs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A prompt, and the data set's answer to it where there is one (prompt included)."""

    prompt: EncodedPrompt
    answer: Example | None

    def example(self) -> Example:
        """The answer, or the prompt alone, of which nothing is learned."""
        return self.answer or completed(self.prompt.ids, (), self.prompt.record.place)


def questions_of(examples: Sequence[Example]) -> list[Question]:
    """The first answer of each conversation, and what it answers."""
    return [
        Question(
            prompt=EncodedPrompt(
                tuple(example.ids[: int(np.flatnonzero(example.trained)[0])].tolist()),
                PromptRecord(prompt="", place=example.place),
            ),
            answer=example,
        )
        for example in examples
    ]


def check_room(prompts: Sequence[EncodedPrompt], context: int, max_completion: int) -> None:
    """Raises ValueError or DataError unless every prompt fits into the context with an answer."""
    room = context - max_completion
    if room < 1:
        raise ValueError(f"max_completion {max_completion} fills the context of {context}: give a "
                         "smaller --on_policy.max_completion")  # fmt: skip
    for prompt in prompts:
        if len(prompt.ids) > room:
            raise DataError(
                prompt.record.place, "", "",
                f"the prompt has {len(prompt.ids)} tokens, more than {room}",
                "Shorten it, or allow shorter answers (--on_policy.max_completion)",
            )  # fmt: skip


def completed(prompt_ids: Sequence[int], completion_ids: Sequence[int], place: str) -> Example:
    """A prompt and its answer, all of whose tokens count."""
    ids = np.array([*prompt_ids, *completion_ids], np.int32)
    trained = np.zeros(len(ids), bool)
    trained[len(prompt_ids) :] = True
    return Example(ids=ids, trained=trained, place=place)


def answered(
    llm: LLM, prompts: Sequence[EncodedPrompt], max_completion: int, end_ids: Sequence[int]
) -> list[Example]:
    """Prompts with a model's likeliest answers: what students of one teacher are compared on."""
    params = SamplingParams(
        temperature=0.0, max_tokens=max_completion, stop_token_ids=end_ids, detokenize=False
    )
    outputs = llm.generate([list(prompt.ids) for prompt in prompts], params)
    return [
        completed(prompt.ids, output.outputs[0].token_ids, prompt.record.place)
        for prompt, output in zip(prompts, outputs, strict=True)
    ]


class OnPolicyBatches:
    """An endless iterator over steps of `batch_size` prompts. count: prompts of the run."""

    def __init__(
        self,
        questions: Sequence[Question],
        rollouts: Rollouts,
        *,
        batch_size: int,
        micro_tokens: int,
        student_share: float,
        seed: int,
        count: int,
    ) -> None:
        self.questions = questions
        self.rollouts = rollouts
        self.batch_size = batch_size
        self.micro_tokens = micro_tokens
        self.student_share = student_share
        self.seed = seed
        self.count = count
        self._done = 0
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        self._data = fingerprint([question.example() for question in questions])
        self._tokens = self._cut = self._answers = 0
        self._seconds = 0.0
        self.newest: list[Trajectory] = []  # the student's answers of the last step that has any

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        last = self._done + self.batch_size
        if self._done < self.count:
            last = min(last, self.count)
        examples: list[Example] = []
        asked: list[int] = []
        for number in range(self._done, last):
            answer = self._at(number).answer
            if answer is None or self._student_answers(number):
                asked.append(number)
            else:
                examples.append(answer)
        examples += self._rollout(asked)
        self._done = last
        longest = max(len(example.ids) - 1 for example in examples)
        return list(micro_batches(examples, range(len(examples)), max(self.micro_tokens, longest)))

    def numbers(self) -> dict[str, float]:
        """Means of the student's answers since the last call, and the seconds they took."""
        answers = max(self._answers, 1)
        found = {
            "completions/mean_length": self._tokens / answers,
            "completions/clipped_ratio": self._cut / answers,
            "seconds/rollout": self._seconds,
        }
        asked = self._answers
        self._tokens = self._cut = self._answers = 0
        self._seconds = 0.0
        return found if asked else {}

    def state_dict(self) -> dict[str, Any]:
        """Where the run is, as JSON values: answers are sampled again from the weights."""
        return {
            "prompts": self._done, "seed": self.seed, "data": self._data,
            "student_share": self.student_share, "answers": self._answers, "tokens": self._tokens,
            "cut": self._cut,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken. Raises ValueError naming what does not fit."""
        mine = self.state_dict()
        for name in ("seed", "data", "student_share"):
            if state.get(name) != mine[name]:
                raise ValueError(
                    f"the position in the prompts was saved with {name} {state.get(name)!r}, this "
                    f"run has {mine[name]!r}: resume with the same"
                )
        self._done = int(state["prompts"])
        self._answers, self._tokens = int(state["answers"]), int(state["tokens"])
        self._cut = int(state["cut"])

    def _rollout(self, numbers: Sequence[int]) -> list[Example]:
        if not numbers:
            return []
        began = time.perf_counter()
        found = self.rollouts([self._at(number).prompt for number in numbers], numbers)
        self._seconds += time.perf_counter() - began
        self.newest = found
        self._answers += len(found)
        self._tokens += sum(len(t.completion_ids) for t in found)
        self._cut += sum(t.truncated for t in found)
        return [completed(t.prompt_ids, t.completion_ids, t.record.place) for t in found]

    def _student_answers(self, number: int) -> bool:
        return key(self.seed, _WHO, number) < self.student_share * 2.0**64

    def _at(self, number: int) -> Question:
        epoch, place = divmod(number, len(self.questions))
        if self._order[0] != epoch:
            self._order = (epoch, permutation(len(self.questions), self.seed, epoch))
        return self.questions[int(self._order[1][place])]


class OnPolicyTask(DistillTask):
    """A student that answers."""

    name = "on-policy distillation"
    batches: OnPolicyBatches

    def make_rollouts(
        self, config: OnPolicyConfig, longest: int, batch: int, seed: int
    ) -> Rollouts:
        """Sampling from the live weights. longest: prompt and answer. batch: prompts of a step."""
        llm = LLM.from_model(
            self.decoder,
            self.tokenizer,
            max_model_len=longest,
            max_num_seqs=config.max_num_seqs or min(batch * config.samples, 64),
        )
        return Rollouts(
            llm,
            group_size=config.samples,
            temperature=config.temperature,
            max_completion=config.max_completion,
            end_ids=self.end_ids,
            seed=seed,
            stopping=lambda: self.stopping(),  # which the loop sets later
        )

    def sample(self) -> list[tuple[str, str]]:
        """The student's newest answers."""
        shown = self.batches.newest[:_SHOWN]
        return [(self.tokenizer.decode(t.prompt_ids), t.text) for t in shown]

    def numbers(self, *, whole: bool) -> dict[str, Any]:
        """Also of the answers."""
        return super().numbers(whole=whole) | self.batches.numbers()
