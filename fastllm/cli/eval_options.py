"""What `fastllm eval accuracy` and `choice` share: how questions are asked, where results go."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .parsing import Parser

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from ..engine.llm import LLM
    from ..models.tokenizer import Tokenizer
    from ..train.evaluation.template import PromptTemplate

PLAIN = "plain"


def add_question_options(parser: Parser, chat_template: str) -> None:
    """How questions are asked and how many; chat_template is the default of that option."""
    group: Any = parser.add_argument_group("questions")
    group.add_argument(
        "--template", default=None, metavar="TEXT|FILE",
        help=r"the words of a question, with fields of the data in braces: 'Q: {question}\nA:'; "
        "{{ and }} are braces",
    )  # fmt: skip
    group.add_argument(
        "--chat-template", default=chat_template, metavar="NAME|FILE",
        help="the words are a user's message in this one: model (its own, if it has one), chatml "
        f"or a Jinja file; plain: they are all that is read (default: {chat_template})",
    )  # fmt: skip
    group.add_argument(
        "--shots", type=int, default=0, metavar="N",
        help="answered examples before each question (default: 0)",
    )  # fmt: skip
    group.add_argument(
        "--shots-from", default=None, metavar="FILE",
        help="where they come from (default: the first ones of the data, then not asked)",
    )  # fmt: skip
    group.add_argument("--limit", type=int, default=None, metavar="N", help="no more questions")


def add_output_options(parser: Parser) -> None:
    """Where results go."""
    parser.add_argument(
        "--json", nargs="?", const="-", default=None, metavar="OUT",
        help="write JSON to OUT and keep what is finished beside it, so that a run that was "
        "killed goes on; without OUT print it",
    )  # fmt: skip


def check_counts(options: Namespace) -> None:
    """Raise ValueError naming an option that is no count."""
    if options.shots < 0:
        raise ValueError(f"--shots must be 0 or more, got {options.shots}")
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit must be 1 or more, got {options.limit}")
    if options.shots_from is not None and not options.shots:
        raise ValueError("--shots-from needs --shots N")


def prompt_template(options: Namespace) -> PromptTemplate | None:
    """What --template says."""
    from ..train.evaluation.template import PromptTemplate

    return None if options.template is None else PromptTemplate.named(options.template)


def chat_template(options: Namespace, tokenizer: Tokenizer) -> str:
    """Jinja source of the chat template, or "plain"."""
    from ..train.epochs import read_template

    if options.chat_template == PLAIN:
        return PLAIN
    source = read_template(options.chat_template)
    return source if source is not None else tokenizer.chat_template or PLAIN


def model_state(options: Namespace, llm: LLM) -> dict[str, Any]:
    """What tells the model of a run from others, as JSON values."""
    from ..models.names import resolve
    from ..train.evaluation.journal import files_state

    return {
        "model": files_state(resolve(options.model)),
        "adapter": files_state(options.adapter),
        "quant": options.quant,
        "dtype": str(llm.model.dtype),
        "activation": llm.model.activation,
        "kv_cache_dtype": options.kv_cache_dtype,
        "max_model_len": llm.max_model_len,
    }


def journal_path(options: Namespace) -> Path | None:
    """The file of finished questions beside the results: results.json has results.done.jsonl."""
    if options.json in (None, "-"):
        return None
    return Path(options.json).with_suffix(".done.jsonl")


def write_json(options: Namespace, result: Mapping[str, Any]) -> None:
    """Print the results, or write them to the file that --json names."""
    if options.json == "-":
        print(json.dumps(result))
        return
    path = Path(options.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def shots_and_rest(
    records: Sequence[Any], shots: Sequence[Any], count: int, limit: int | None
) -> tuple[Sequence[Any], Sequence[Any]]:
    """(examples, questions): of `shots`, or else the first of the records.

    Raises ValueError if there are too few.
    """
    if count and not shots:
        shots, records = records[:count], records[count:]
    if len(shots) < count:
        raise ValueError(f"--shots {count}: there are {len(shots)} examples to show")
    if not records:
        raise ValueError(f"--shots {count} leaves no question to ask: give --shots-from FILE")
    return shots[:count], records[:limit]
