"""`fastllm eval accuracy MODEL DATA`: how many problems a model solves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .console import facts, progress_bar
from .eval_options import (
    add_output_options,
    add_question_options,
    chat_template,
    check_counts,
    journal_path,
    model_state,
    prompt_template,
    shots_and_rest,
    write_json,
)
from .parsing import Parser, add_config, add_model_options, add_sampling_options, command_parser

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from ..engine.llm import LLM
    from ..engine.request import SamplingParams
    from ..train.data.prompts import EncodedPrompt, PromptRecord
    from ..train.evaluation.accuracy import Accuracy
    from ..train.evaluation.answers import Answers

DESCRIPTION = """
Asks questions whose answers can be checked, and prints the share of right ones, how sure it is,
and with several --samples pass@k: the chance that one of k answers is right (the unbiased estimator
of Chen et al. 2021). DATA is a .jsonl, .json or .parquet file with the fields prompt, question,
problem or messages, and answer (GSM8K's "#### n" is understood); or a task that is made here, such
as arithmetic:2 or word:1-3, of which the test split is asked.

An answer is right if its reward is 0.5 or more. Rewards: exact_match (the final number, or all the
text), accuracy (math-verify), FILE.py:FUNCTION (which is run), and the others of `fastllm grpo`.

Answers are greedy unless --temperature is above 0. With --json OUT every finished problem is kept
in OUT's .done.jsonl, and a run that was killed goes on there; the draws do not depend on it.
"""

EXAMPLES = """
fastllm eval accuracy smollm2 arithmetic:2 --limit 100
fastllm eval accuracy ./my-model gsm8k_test.jsonl --json results/gsm8k.json
fastllm eval accuracy ./base gsm8k_test.jsonl --template 'Question: {question}\\nAnswer:'
    --chat-template plain --shots 5 --shots-from gsm8k_train.jsonl --stop Question:
fastllm eval accuracy smollm2 arithmetic:1 --samples 16 --temperature 0.8 --pass-at 1,4,16
fastllm eval accuracy smollm2 arithmetic:2 --adapter runs/grpo/adapter
"""

TASK_COUNT = 200  # problems of a task, unless --limit says another number


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    from ..train.data.prompts import gather_columns
    from ..train.rewards import check, resolve

    options = _parser().parse_args(list(argv))
    check_counts(options)
    params, ks = _sampling(options)
    (reward,) = resolve([options.reward])
    records, shots = _records(options)
    check([reward], gather_columns(records))
    from .answering import load

    llm = load(options, max_num_seqs=options.max_num_seqs)
    problems = _problems(options, llm, records, shots)
    start = time.perf_counter()
    answers, tokens = _answers(options, llm, problems, params)
    seconds = time.perf_counter() - start
    from ..train.evaluation.accuracy import grade, summarize

    rewards = grade(reward, records, answers, options.reward_timeout)
    found = summarize(rewards, answers, ks)
    speed = {"seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds}
    if options.json is not None:
        result = _result(options, found, rewards, records, speed)
        write_json(options, result)
    if options.json != "-":
        show(found, speed)
    return 0


def _parser() -> Parser:
    parser = command_parser("eval accuracy", DESCRIPTION, EXAMPLES)
    parser.add_argument("model", help="a path, a name of `fastllm models`, or a Hugging Face id")
    parser.add_argument("data", nargs="+", metavar="DATA", help="files, folders or tasks")
    add_question_options(parser, "model")
    parser.add_argument(
        "--shot-field", default=None, metavar="NAME",
        help="what of an example is shown as its answer (default: solution, completion or answer)",
    )  # fmt: skip
    parser.add_argument(
        "--reward", default="exact_match", metavar="NAME|FILE.py:FUNCTION",
        help="what judges answers (default: exact_match)",
    )  # fmt: skip
    parser.add_argument(
        "--reward-timeout", type=float, default=60.0, metavar="SECONDS",
        help="for a batch of answers (default: 60)",
    )  # fmt: skip
    parser.add_argument(
        "--samples", type=int, default=1, metavar="N", help="answers to each problem (default: 1)"
    )
    parser.add_argument(
        "--pass-at", default=None, metavar="K,K",
        help="k of pass@k, with commas between (default: the samples, if they are several)",
    )  # fmt: skip
    parser.add_argument(
        "--max-num-seqs", type=int, default=32, metavar="N",
        help="answers that are written together (default: 32)",
    )  # fmt: skip
    add_output_options(parser)
    add_sampling_options(parser, temperature=0.0, max_tokens=512)
    add_model_options(parser)
    add_config(parser)
    return parser


def _sampling(options: Namespace) -> tuple[SamplingParams, list[int]]:
    """The parameters, and the k of pass@k. Raises ValueError naming the option."""
    from .answering import sampling_params

    if options.samples < 1:
        raise ValueError(f"--samples must be 1 or more, got {options.samples}")
    if options.samples > 1 and options.temperature == 0:
        raise ValueError("--samples above 1 are all equal at --temperature 0: raise it")
    params = sampling_params(options)
    if options.pass_at is None:
        return params, [options.samples] if options.samples > 1 else []
    ks = []
    for word in options.pass_at.split(","):
        if not word.strip().isdecimal() or not 1 <= int(word) <= options.samples:
            raise ValueError(
                f"--pass-at: {word.strip()!r} is no number from 1 to the {options.samples} of "
                "--samples"
            )
        ks.append(int(word))
    return params, sorted(set(ks))


def _records(options: Namespace) -> tuple[Sequence[PromptRecord], Sequence[PromptRecord]]:
    """(what is asked, what is shown before)."""
    from ..train.data.prompts import read_prompts

    records = read_prompts(options.data, task_count=options.limit or TASK_COUNT, split="test")
    shown: Sequence[PromptRecord] = ()
    if options.shots_from is not None:
        shown = read_prompts([options.shots_from], task_count=options.shots)
    shots, asked = shots_and_rest(records, shown, options.shots, options.limit)
    return asked, shots


def _problems(
    options: Namespace, llm: LLM, records: Sequence[PromptRecord], shots: Sequence[PromptRecord]
) -> list[EncodedPrompt]:
    """The tokens of what is asked, each with the record as it was read."""
    from ..train.data.prompts import encode_prompts
    from ..train.evaluation.prompting import prompted

    asked = prompted(records, prompt_template(options), shots, options.shot_field)
    prompts = encode_prompts(asked, llm.tokenizer, chat_template(options, llm.tokenizer))
    return [replace(p, record=record) for p, record in zip(prompts, records, strict=True)]


def _answers(
    options: Namespace, llm: LLM, problems: Sequence[EncodedPrompt], params: SamplingParams
) -> tuple[list[Answers], int]:
    """The answers, and the tokens that this run has made."""
    from ..train.evaluation.answers import sample_answers
    from ..train.evaluation.journal import Journal

    made = 0
    with progress_bar(len(problems), "answering", "problems") as draw:

        def progress(done: int, tokens: int) -> None:
            nonlocal made
            made = tokens
            draw(done)

        journal = Journal(journal_path(options))
        state = model_state(options, llm)
        answers = sample_answers(
            llm, problems, params, options.samples, journal, state, progress
        )  # fmt: skip
    return answers, made


def _result(
    options: Namespace, found: Accuracy, rewards: Sequence[Sequence[float]],
    records: Sequence[PromptRecord], speed: dict[str, float],
) -> dict[str, Any]:  # fmt: skip
    each = [
        {"place": record.place, "rewards": row}
        for record, row in zip(records, rewards, strict=True)
    ]
    kept = ("model", "adapter", "quant", "data", "template", "chat_template", "shots", "reward")
    settings = {name: getattr(options, name) for name in kept}
    sampling = {name: getattr(options, name) for name in ("temperature", "max_tokens", "seed")}
    return {**settings, **sampling, **found.record(), **speed, "each": each}


def show(found: Accuracy, speed: dict[str, float]) -> None:
    """The numbers, one a line."""
    several = f", {found.samples} samples each" if found.samples > 1 else ""
    facts([
        ("problems", f"{found.problems:,}{several}"),
        ("accuracy", str(found.accuracy)),
        *((f"pass@{k}", str(share)) for k, share in found.pass_at.items()),
        ("mean reward", f"{found.reward:.3f}"),
        ("mean length", f"{found.length:.0f} tokens, {found.truncated:.1%} of the answers cut off"),
        ("speed", f"{speed['tokens']:,.0f} tokens in {speed['seconds']:.1f} s: "
                  f"{speed['tokens_per_second']:,.0f} tok/s"),
    ])  # fmt: skip
