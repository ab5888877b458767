"""Runs that compare distributions: on a data set's tokens, or on the student's own answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from fastllm.engine.llm import LLM
from fastllm.models.loader import read_tokenizer
from fastllm.models.tokenizer import Tokenizer
from fastllm.models.weights import WeightSource, open_weights
from fastllm.train import distributed
from fastllm.train.config import to_dict
from fastllm.train.data.examples import ExampleBatches, fingerprint
from fastllm.train.data.masks import Example, turn_ends
from fastllm.train.data.order import permutation
from fastllm.train.data.prompts import EncodedPrompt, encode_prompts, read_prompts
from fastllm.train.distillation.config import DistillConfig
from fastllm.train.distillation.data import MAX_HELD_OUT, are_prompts
from fastllm.train.distillation.on_policy import (
    OnPolicyBatches,
    OnPolicyTask,
    Question,
    answered,
    check_room,
    questions_of,
)
from fastllm.train.distillation.storing import store_top_k
from fastllm.train.distillation.students import (
    Data,
    check_stored,
    check_vocabularies,
    longest_document,
    read,
    student_path,
    with_rate,
)
from fastllm.train.distillation.task import DistillTask
from fastllm.train.distillation.teacher import LiveTeacher, StoredTeacher, open_teacher
from fastllm.train.distillation.vocabulary import SharedVocabulary
from fastllm.train.epochs import Plan, Say, held_out_count, read_template
from fastllm.train.loop import Result, run
from fastllm.train.sft import choose

Task = TypeVar("Task", bound=DistillTask)


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillResult:
    """How a run ended, and where its model is. before, after: (forward KL from the teacher, cross
    entropy) per held-out token."""

    run: Result
    output: Path  # adapter or model directory
    before: tuple[float, float] | None
    after: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreResult:
    """What `store_top_k` has written, and of how many examples."""

    output: Path
    examples: int


@dataclass(frozen=True, slots=True)
class _Models:
    """Who teaches whom."""

    teacher: LiveTeacher | StoredTeacher
    source: WeightSource
    tokenizer: Tokenizer
    shared: SharedVocabulary
    longest: int  # document that both read


def _open(config: DistillConfig, device: torch.device) -> _Models:
    teacher = open_teacher(config.teacher, device)
    source = open_weights(student_path(config, teacher))
    tokenizer = read_tokenizer(source)
    shared = check_vocabularies(tokenizer, source, teacher)
    longest = longest_document(config, source, teacher)
    return _Models(teacher, source, tokenizer, shared, longest)


def on_data(config: DistillConfig, device: torch.device, say: Say) -> DistillResult | StoreResult:
    """Mode logits. Raises what `fastllm.train.distill.main` does."""
    models = _open(config, device)
    data = read(config, models.tokenizer, models.longest)
    if config.store_top_k is not None:
        return _store(config, models, data, say)
    if isinstance(models.teacher, StoredTeacher):
        check_stored(config, models.teacher, [*data.train, *data.held_out])
    plan = _plan(config, models, data.train)
    task = _task(DistillTask, config, models, data, plan, device)
    batches = ExampleBatches(
        data.train,
        batch_size=plan.batch_size,
        micro_tokens=plan.micro_tokens,
        seed=config.loop.seed,
        count=plan.examples,
        rank=distributed.rank(),
        world=distributed.world(),
    )
    lines = [*data.lines, *plan.lines()]
    task.set_data(batches, data.train, data.held_out, plan.micro_tokens, lines)
    return _train(config, plan, task, say)


def on_own_answers(config: DistillConfig, device: torch.device, say: Say) -> DistillResult:
    """Mode on_policy. Raises what `fastllm.train.distill.main` does."""
    models = _open(config, device)
    if isinstance(models.teacher, StoredTeacher):
        raise ValueError("mode on_policy asks the teacher about new answers: teacher.model must be "
                         "a model, not what one has said before")  # fmt: skip
    questions, data = _questions(config, models, models.teacher)
    plan = _plan(config, models, data.train)
    task = _task(OnPolicyTask, config, models, data, plan, device)
    longest = max(len(q.prompt.ids) for q in questions) + config.on_policy.max_completion
    batches = OnPolicyBatches(
        questions,
        task.make_rollouts(config.on_policy, longest, plan.batch_size, config.loop.seed),
        batch_size=plan.batch_size,
        micro_tokens=plan.micro_tokens,
        student_share=config.on_policy.student_share,
        seed=config.loop.seed,
        count=plan.examples,
    )
    task.set_data(batches, None, data.held_out, plan.micro_tokens, [*data.lines, *plan.lines()])
    return _train(config, plan, task, say)


def _questions(
    config: DistillConfig, models: _Models, teacher: LiveTeacher
) -> tuple[list[Question], Data]:
    """What the student is asked; `train` of the data has one example for each question.

    Prompts of conversations have answers, with which held-out ones are evaluated. Prompts without
    are held out with the teacher's likeliest answers, made once at the start.
    """
    options = config.on_policy
    if not are_prompts(config.data):
        data = read(config, models.tokenizer, models.longest)
        questions = questions_of(data.train)
        check_room([q.prompt for q in questions], models.longest, options.max_completion)
        return questions, data
    if options.student_share < 1:
        raise ValueError(
            f"on_policy.student_share is {options.student_share:g}, and the data has no answers "
            "that the other prompts could be learned with: give conversations, or 1"
        )
    asked, held = _prompts(config, models)
    check_room([*asked, *held], models.longest, options.max_completion)
    template = read_template(config.chat_template)
    own = template is None or config.chat_template == "plain"
    ends = {*models.tokenizer.eos_token_ids, *models.source.config.eos_token_ids}
    used = template or models.tokenizer.chat_template
    if used is not None and config.chat_template != "plain":
        ends |= turn_ends(models.tokenizer, used)
    held_out = _answered(teacher, models.tokenizer, held, options.max_completion, sorted(ends))
    questions = [Question(prompt=prompt, answer=None) for prompt in asked]
    return questions, Data(
        train=[question.example() for question in questions],
        held_out=held_out,
        lines=(f"{len(asked)} prompts, {len(held)} held out with the teacher's answers",),
        end_ids=sorted(ends),
        template=models.tokenizer.chat_template if own else template,
    )


def _prompts(
    config: DistillConfig, models: _Models
) -> tuple[list[EncodedPrompt], list[EncodedPrompt]]:
    """(prompts to train on, held-out prompts). Raises DataError, ValueError for `holdout`."""
    plain = config.chat_template == "plain"
    template = "plain" if plain else read_template(config.chat_template)

    def read_from(sources: Sequence[str]) -> list[EncodedPrompt]:
        records = read_prompts(sources, task_count=config.task_count, seed=config.loop.seed)
        return encode_prompts(records, models.tokenizer, template)

    prompts = read_from(config.data)
    if Path(config.holdout).exists():
        return prompts, read_from([config.holdout])[:MAX_HELD_OUT]
    count = held_out_count(len(prompts), config.holdout, MAX_HELD_OUT)
    chosen = set(permutation(len(prompts), config.loop.seed, -1)[:count].tolist())
    asked = [prompt for i, prompt in enumerate(prompts) if i not in chosen]
    return asked, [prompts[i] for i in sorted(chosen)]


def _answered(
    teacher: LiveTeacher,
    tokenizer: Tokenizer,
    prompts: Sequence[EncodedPrompt],
    max_completion: int,
    end_ids: Sequence[int],
) -> list[Example]:
    """The prompts with the teacher's likeliest answers."""
    if not prompts:
        return []
    llm = LLM.from_model(
        teacher.decoder,
        tokenizer,
        max_model_len=max(len(prompt.ids) for prompt in prompts) + max_completion,
        max_num_seqs=len(prompts),
    )
    return answered(llm, prompts, max_completion, end_ids)


def _plan(config: DistillConfig, models: _Models, examples: Sequence[Example]) -> Plan:
    source = models.source
    return choose(with_rate(config, source, examples), examples, source.config.hidden_size)


def _task(
    kind: type[Task],
    config: DistillConfig,
    models: _Models,
    data: Data,
    plan: Plan,
    device: torch.device,
) -> Task:
    return kind(
        config, models.source, models.tokenizer, models.teacher, config.objective, models.shared,
        lr=plan.lr, end_ids=data.end_ids, template=data.template, device=device,
    )  # fmt: skip


def _train(config: DistillConfig, plan: Plan, task: DistillTask, say: Say) -> DistillResult:
    """The run itself, with what held-out tokens say before and after."""
    before = task.held_out_losses() if config.loop.resume == "none" else None
    result = run(task, config.loop_of(plan.steps), settings=to_dict(config))
    after = task.held_out_losses()
    output = task.save_result(config.loop.out)
    if before is not None and after is not None:
        say(
            f"held-out KL from the teacher: {before[0]:.4f} before, {after[0]:.4f} after; cross "
            f"entropy: {before[1]:.4f} before, {after[1]:.4f} after"
        )
    say(f"saved to {output}")
    return DistillResult(run=result, output=output, before=before, after=after)


def _store(config: DistillConfig, models: _Models, data: Data, say: Say) -> StoreResult:
    """Write the teacher's likeliest ids of the data set to the run's folder."""
    assert config.store_top_k is not None
    teacher, shared = models.teacher, models.shared
    if isinstance(teacher, StoredTeacher):
        raise ValueError("store_top_k asks a live teacher: teacher.model is a store already")
    if distributed.world() > 1:
        raise ValueError("store_top_k runs in one process: start it without torchrun, the runs "
                         "that read the store may have several")  # fmt: skip
    say(teacher.describe())
    for line in (*shared.notes, *data.lines):
        say(line)
    examples = [*data.train, *data.held_out]
    store_top_k(
        teacher,
        examples,
        config.loop.out,
        k=config.store_top_k,
        temperature=config.objective.temperature,
        vocab_size=shared.size,
        data=fingerprint(examples),
        micro_tokens=config.micro_tokens or 2048,
        say=say,
    )
    say(f"stored in {config.loop.out}; learn from it with --teacher {config.loop.out}")
    return StoreResult(output=Path(config.loop.out), examples=len(examples))
