"""Distillation of sequences: the teacher's answers to prompts, kept where a reward says they are
right, as conversations that a student of any vocabulary is fine-tuned on.

    OUT/answers/settings.json        what was asked of whom
    OUT/answers/answers-00000.jsonl  every answer to some prompts
    OUT/sequences.jsonl              the kept ones, in the form that `fastllm sft` reads

A file of answers is written aside and renamed: a run that is killed asks again only what it was
asking. Rewards are given when all answers are there, so that a run with another threshold or other
rewards in the same folder asks nothing again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastllm.engine.llm import LLM
from fastllm.engine.request import SamplingParams
from fastllm.errors import DataError
from fastllm.models.disk import sync
from fastllm.train import distributed
from fastllm.train.data.order import key
from fastllm.train.data.prompts import EncodedPrompt, PromptRecord
from fastllm.train.rewards import NamedReward, check, score

ANSWERS, SETTINGS, SEQUENCES = "answers", "settings.json", "sequences.jsonl"
CHUNK = 64  # prompts of a file of answers
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class SequencesConfig:
    """How the teacher is asked, and what is kept. Raises ValueError naming the field."""

    samples: int = 4  # answers to each prompt
    temperature: float = 1.0
    top_p: float = 1.0
    max_completion: int = 1024  # tokens; an answer that is cut there is not kept
    max_num_seqs: int = 32  # answers that are decoded together
    rewards: tuple[str, ...] = ("accuracy",)  # see fastllm.train.rewards; empty: keep all
    reward_weights: tuple[float, ...] = ()  # default: 1 for each
    reward_timeout: float = 60.0  # seconds for all answers
    threshold: float = 1.0  # least weighted sum of the rewards of a kept answer
    keep: int = 0  # answers to one prompt, at most, the best ones first; 0: all

    def __post_init__(self) -> None:
        for name in ("samples", "max_completion", "max_num_seqs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be a number from 0, got {self.temperature}")
        if not self.temperature and self.samples > 1:
            raise ValueError("samples must be 1 at temperature 0: they would all be the same")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.keep < 0:
            raise ValueError(f"keep must be at least 0, got {self.keep}")
        if self.reward_weights and len(self.reward_weights) != len(self.rewards):
            raise ValueError(
                f"reward_weights has {len(self.reward_weights)} numbers for {len(self.rewards)} "
                "rewards"
            )
        if not all(map(math.isfinite, self.reward_weights)):
            raise ValueError(f"reward_weights must be finite, got {list(self.reward_weights)}")
        if not math.isfinite(self.threshold):
            raise ValueError(f"threshold must be finite, got {self.threshold}")
        if not self.reward_timeout > 0:
            raise ValueError(f"reward_timeout must be above 0, got {self.reward_timeout}")


@dataclass(frozen=True, slots=True)
class Answer:
    """What the teacher said to prompt `number`. cut: it was not done after max_completion."""

    number: int
    sample: int
    text: str
    cut: bool


@dataclass(slots=True)
class Kept:
    """What became of the answers."""

    answers: int = 0
    cut: int = 0  # too long
    low: int = 0  # below the threshold
    repeated: int = 0  # the same text to the same prompt
    beyond: int = 0  # more than `keep`
    kept: int = 0
    prompts: int = 0  # with an answer that is kept

    def line(self) -> str:
        """A sentence."""
        return (
            f"{self.answers} answers: {self.kept} kept, to {self.prompts} prompts; {self.low} "
            f"below the threshold, {self.cut} too long, {self.repeated} repeated, {self.beyond} "
            "more than wanted"
        )


def ask(
    teacher: Callable[[], LLM],
    prompts: Sequence[EncodedPrompt],
    config: SequencesConfig,
    out: Path,
    *,
    settings: dict[str, Any],
    seed: int,
    say: Say,
) -> list[Answer]:
    """The teacher's answers to all prompts; those of a run before are read.

    teacher: makes the engine, if it is needed. settings: what the answers depend on. seed: of the
    run; an answer depends on it, its prompt's number and its own, not on what is asked beside it.
    Raises DataError if `out` holds other answers.
    """
    folder = out / ANSWERS
    with distributed.only_run_in(out):
        _begin(folder, settings)
        answers: list[Answer] = []
        llm = None
        for first in range(0, len(prompts), CHUNK):
            file = folder / f"answers-{first // CHUNK:05d}.jsonl"
            if not file.exists():
                llm = llm or teacher()
                numbers = range(first, min(first + CHUNK, len(prompts)))
                found = _generate(llm, prompts, numbers, config, seed)
                _write_lines(file, ({s: getattr(a, s) for s in Answer.__slots__} for a in found))
                say(f"asked {numbers[-1] + 1} of {len(prompts)} prompts")
            answers += _read(file)
    return answers


def keep(
    answers: Sequence[Answer],
    records: Sequence[PromptRecord],
    rewards: Sequence[NamedReward],
    config: SequencesConfig,
) -> tuple[list[Answer], Kept]:
    """The answers that a student is to learn, in the order of prompts, and what became of the rest.

    Raises RewardError naming a reward that fails; DataError if nothing is left.
    """
    counts = Kept(answers=len(answers))
    whole = [answer for answer in answers if not answer.cut and answer.text.strip()]
    counts.cut = len(answers) - len(whole)
    totals = _rewards(whole, records, rewards, config)
    chosen: dict[int, dict[str, tuple[float, Answer]]] = {}
    for answer, total in zip(whole, totals, strict=True):
        mine = chosen.setdefault(answer.number, {})
        if total < config.threshold:
            counts.low += 1
        elif answer.text.strip() in mine:
            counts.repeated += 1
        else:
            mine[answer.text.strip()] = total, answer
    kept = []
    for number in sorted(chosen):
        best = sorted(chosen[number].values(), key=lambda pair: (-pair[0], pair[1].sample))
        most = config.keep or len(best)
        counts.beyond += len(best[most:])
        counts.prompts += bool(best)
        kept += [answer for _, answer in best[:most]]
    counts.kept = len(kept)
    if not kept:
        best_total = f"; the best has {max(totals):g}" if totals else ""
        raise DataError(
            "sequences", "", "", f"no answer is left to learn from: {counts.line()}{best_total}",
            "Give a stronger teacher, easier prompts, more samples, a larger max_completion or a "
            "lower threshold (--sequences.threshold)",
        )  # fmt: skip
    return kept, counts


def write_sequences(
    path: Path, kept: Sequence[Answer], records: Sequence[PromptRecord], *, plain: bool
) -> None:
    """The kept answers as conversations. plain: as texts without a chat template."""

    def conversation(answer: Answer) -> dict[str, Any]:
        record = records[answer.number]
        if plain:
            prompt = record.text if record.plain is None else record.plain
            return {"prompt": prompt, "completion": answer.text}
        said = {"role": "assistant", "content": answer.text.strip()}
        more = {"tools": tools} if (tools := record.columns.get("tools")) else {}
        return {"messages": [*record.messages, said], **more}

    _write_lines(path, map(conversation, kept))


def check_rewards(rewards: Sequence[NamedReward], columns: dict[str, list[Any]]) -> None:
    """What rewards need of the data, before anything is asked. Raises RewardError."""
    if rewards:
        check(rewards, columns)


def _rewards(
    answers: Sequence[Answer],
    records: Sequence[PromptRecord],
    rewards: Sequence[NamedReward],
    config: SequencesConfig,
) -> list[float]:
    """The weighted sum of each answer's rewards; the threshold without any."""
    if not rewards or not answers:
        return [config.threshold] * len(answers)
    mine = [records[answer.number] for answer in answers]
    names = dict.fromkeys(name for record in mine for name in record.columns)
    found = score(
        rewards,
        config.reward_weights or None,
        [record.prompt for record in mine],
        [answer.text for answer in answers],
        {name: [record.columns.get(name) for record in mine] for name in names},
        config.reward_timeout,
    )
    return [float(total) for total in found.double().sum(1)]


def _generate(
    llm: LLM,
    prompts: Sequence[EncodedPrompt],
    numbers: range,
    config: SequencesConfig,
    seed: int,
) -> Iterator[Answer]:
    params = [
        SamplingParams(
            n=config.samples,
            temperature=config.temperature,
            top_p=config.top_p,
            max_tokens=config.max_completion,
            seed=key(seed, number) >> 2,
        )
        for number in numbers
    ]
    outputs = llm.generate([list(prompts[number].ids) for number in numbers], params)
    for number, output in zip(numbers, outputs, strict=True):
        opened = _opens_thoughts(llm, prompts[number].ids)
        for sample in output.outputs:
            text = sample.text
            if opened and "</think>" in text and "<think>" not in text:
                text = "<think>\n" + text  # the template began the thoughts, the teacher ended them
            yield Answer(number, sample.index, text, sample.finish_reason == "length")


def _opens_thoughts(llm: LLM, ids: Sequence[int]) -> bool:
    """Whether the prompt ends with the beginning of the teacher's thoughts."""
    ending = llm.tokenizer.decode(list(ids[-8:]), skip_special_tokens=False)
    return ending.rstrip().endswith("<think>")


def _begin(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / SETTINGS
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if found.get(name) != value:
                raise DataError(
                    path, "", name, f"is {found.get(name)!r:.80}, this run has {value!r:.80}",
                    "Choose another folder (--out), or give the settings of before",
                )  # fmt: skip
        return
    folder.mkdir(parents=True, exist_ok=True)
    _write_lines(path, [settings])


def _read(file: Path) -> list[Answer]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return [Answer(**json.loads(line)) for line in lines]


def _write_lines(path: Path, values: Any) -> None:
    """JSON lines, whole or not at all."""
    aside = path.with_name(f".{path.name}.part")
    with aside.open("w", encoding="utf-8", newline="\n") as file:
        for value in values:
            file.write(json.dumps(value, ensure_ascii=True) + "\n")
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)
