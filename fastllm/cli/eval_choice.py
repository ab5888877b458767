"""`fastllm eval choice MODEL FILE`: multiple choice by log-likelihood."""

from __future__ import annotations

import time
from collections.abc import Sequence
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
from .parsing import Parser, add_config, add_model_options, command_parser

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from ..engine.llm import LLM
    from ..train.evaluation.choice import Choices
    from ..train.evaluation.questions import Question

DESCRIPTION = """
Which of its choices does a model find likeliest? Nothing is generated: the log-probabilities of the
choices' tokens behind the question are added up. FILE is .jsonl, .json or .parquet with

  question   words; other fields can be named by --template
  choices    a list of strings, or {"text": [...], "label": [...]}
  answer     a label, a number from 0, or a letter from A

The numbers are lm-evaluation-harness's: acc takes the largest sum, acc_norm the largest sum over
the number of characters of the choice; acc_bytes, over its bytes in UTF-8.
"""

EXAMPLES = """
fastllm eval choice smollm2 arc.jsonl --limit 200
fastllm eval choice ./base hellaswag.jsonl --template '{ctx}' --choices-field endings
    --answer-field label --json results/hellaswag.json
fastllm eval choice ./my-model exam.jsonl --shots 5 --shots-from exam-dev.jsonl --quant int4
"""


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    options = _parser().parse_args(list(argv))
    check_counts(options)
    questions, shots = _questions(options)
    from .answering import load

    llm = load(options, max_num_seqs=1)
    start = time.perf_counter()
    log_probs = _scored(options, llm, questions, shots)
    from ..train.evaluation.choice import summarize

    found = summarize(questions, log_probs)
    if options.json is not None:
        kept = ("model", "adapter", "quant", "data", "template", "chat_template", "shots")
        settings = {name: getattr(options, name) for name in kept}
        each = [
            {"place": question.record.place, "right": question.right, "log_probs": values}
            for question, values in zip(questions, log_probs, strict=True)
        ]
        seconds = time.perf_counter() - start
        write_json(options, {**settings, **found.record(), "seconds": seconds, "each": each})
    if options.json != "-":
        show(found)
    return 0


def _parser() -> Parser:
    parser = command_parser("eval choice", DESCRIPTION, EXAMPLES)
    parser.add_argument("model", help="a path, a name of `fastllm models`, or a Hugging Face id")
    parser.add_argument("data", nargs="+", metavar="FILE", help="files, or folders of them")
    add_question_options(parser, "plain")
    for name in ("choices", "answer"):
        parser.add_argument(
            f"--{name}-field", default=name, metavar="NAME", help=f"of records (default: {name})"
        )
    add_output_options(parser)
    add_model_options(parser)
    add_config(parser)
    return parser


def _questions(options: Namespace) -> tuple[Sequence[Question], Sequence[Question]]:
    """(what is asked, what is shown before)."""
    from ..train.evaluation.questions import read_questions

    fields: dict[str, Any] = {
        "template": prompt_template(options),
        "choices_field": options.choices_field,
        "answer_field": options.answer_field,
    }
    limit = None if options.limit is None else options.limit + options.shots
    found = read_questions(options.data, **fields, limit=limit)
    shown: Sequence[Question] = ()
    if options.shots_from is not None:
        shown = read_questions([options.shots_from], **fields, limit=options.shots)
    shots, asked = shots_and_rest(found, shown, options.shots, options.limit)
    return asked, shots


def _scored(
    options: Namespace, llm: LLM, questions: Sequence[Question], shots: Sequence[Question]
) -> list[list[float]]:
    """The log-probability of every choice."""
    from ..train.evaluation.choice import choice_log_probs, encode_choices
    from ..train.evaluation.journal import Journal
    from ..train.evaluation.prompting import prompted
    from ..train.evaluation.questions import ANSWER

    asked = [question.record for question in questions]
    records = prompted(asked, None, [shot.record for shot in shots], ANSWER)
    template = chat_template(options, llm.tokenizer)
    groups = encode_choices(records, questions, llm.tokenizer, template)
    with progress_bar(len(questions), "scoring", "questions") as progress:
        return choice_log_probs(
            llm.model, groups, [record.place for record in records],
            Journal(journal_path(options)), model_state(options, llm), progress,
        )  # fmt: skip


def show(found: Choices) -> None:
    """The numbers, one a line."""
    facts([
        ("questions", f"{found.questions:,}; guessing gives {found.chance:.1%}"),
        ("acc", str(found.acc)),
        ("acc_norm", f"{found.acc_norm}, by characters"),
        ("acc_bytes", f"{found.acc_bytes}, by bytes"),
    ])  # fmt: skip
