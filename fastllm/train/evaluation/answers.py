"""Samples of every problem's answer, through the engine's continuous batching, resumable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fastllm.engine.llm import LLM
from fastllm.engine.request import MAX_SAMPLES, CompletionOutput, SamplingParams
from fastllm.train.data.prompts import EncodedPrompt
from fastllm.train.evaluation.journal import Journal, keys_of

QUEUED = 512  # requests given to the engine at once, which runs as many as it has room for


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """The samples of one problem: texts, lengths in tokens, and whether each was cut off."""

    texts: list[str]
    lengths: list[int]
    truncated: list[bool]


def sample_answers(
    llm: LLM,
    problems: Sequence[EncodedPrompt],
    params: SamplingParams,
    samples: int,
    journal: Journal,
    settings: Mapping[str, Any],
    progress: Callable[[int, int], None] | None = None,
) -> list[Answers]:
    """The answers to all problems, those that the journal has among them.

    A problem's draws depend on the seed and on its tokens, not on the other problems, their order
    or the batch, so a run that goes on ends as one that was never stopped.

    Args:
        llm: the model, with its tokenizer.
        problems: what is asked.
        params: how to sample; its n is not read, and seed None is 0.
        samples: of each problem.
        journal: finished problems are taken from it and added to it.
        settings: what else the answers depend on (the model), as JSON values.
        progress: is told how many problems are finished, and the tokens of this run.

    Raises:
        ValueError: naming the problem that does not fit, before anything runs.
    """
    check_problems(llm, problems)
    asked = [list(problem.ids) for problem in problems]
    chosen = {**asdict(params), "n": samples, "seed": params.seed or 0}
    keys = keys_of({**settings, "sampling": chosen}, asked)
    seeds = [int(key[:15], 16) for key in keys_of({"seed": params.seed or 0}, asked)]
    left = [i for i, key in enumerate(keys) if key not in journal.done]
    done, tokens = len(problems) - len(left), 0
    if progress is not None:
        progress(done, tokens)
    with journal.writing():
        for number, outputs in _finished(llm, problems, left, params, samples, seeds):
            answers = _answers(problems[number], outputs)
            record = {
                "key": keys[number],
                "place": problems[number].record.place,
                **asdict(answers),
            }
            journal.add(record)
            done, tokens = done + 1, tokens + sum(answers.lengths)
            if progress is not None:
                progress(done, tokens)
    found = [journal.done[key] for key in keys]
    names = ("texts", "lengths", "truncated")
    return [Answers(**{name: record[name] for name in names}) for record in found]


def check_problems(llm: LLM, problems: Sequence[EncodedPrompt]) -> None:
    """Raise ValueError naming the first problem that leaves no room for an answer."""
    for problem in problems:
        if not 1 <= len(problem.ids) < llm.max_model_len:
            raise ValueError(
                f"{problem.record.place}: the prompt has {len(problem.ids)} tokens, and a context "
                f"of {llm.max_model_len} holds prompt and answer: shorten the prompt, give fewer "
                "shots, or load with a larger max_model_len"
            )


def _finished(
    llm: LLM, problems: Sequence[EncodedPrompt], left: Sequence[int], params: SamplingParams,
    samples: int, seeds: Sequence[int],
) -> Iterator[tuple[int, list[CompletionOutput]]]:  # fmt: skip
    """(number, its samples) of each problem as it ends."""
    parts = [min(MAX_SAMPLES, samples - first) for first in range(0, samples, MAX_SAMPLES)]
    requests = [
        (number, part, replace(params, n=count, seed=seeds[number] + MAX_SAMPLES * part))
        for number in left
        for part, count in enumerate(parts)
    ]
    ended: dict[int, dict[int, list[CompletionOutput]]] = {number: {} for number in left}
    for first in range(0, len(requests), QUEUED):
        window = requests[first : first + QUEUED]
        prompts = [list(problems[number].ids) for number, _, _ in window]
        for place, output in llm.generate_as_finished(prompts, [chosen for *_, chosen in window]):
            number, part, _ = window[place]
            ended[number][part] = output.outputs
            if len(ended[number]) == len(parts):
                samples_of = ended.pop(number)
                yield number, [sample for part in sorted(samples_of) for sample in samples_of[part]]


def _answers(problem: EncodedPrompt, outputs: Sequence[CompletionOutput]) -> Answers:
    return Answers(
        texts=[problem.whole(output.text) for output in outputs],
        lengths=[len(output.token_ids) for output in outputs],
        truncated=[output.finish_reason == "length" for output in outputs],
    )
