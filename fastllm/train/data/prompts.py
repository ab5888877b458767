"""Prompts without answers of their own, for rollouts and evaluation, and what goes with each.

A record has one of the fields

    prompt      a string or a list of messages
    question    a string, as in GSM8K
    problem     a string, as in MATH
    messages    a list of messages; a last one of the assistant's becomes the column "completion"

and its other fields are columns: reward functions get them as lists, by name. An `answer` that ends
with GSM8K's "#### n" becomes "n", its whole text the column "solution". A string is one user
message, unless there is no chat template: then it is what the model reads.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastllm.errors import DataError
from fastllm.models.chat_template import CHATML, ChatTemplate
from fastllm.models.tokenizer import Tokenizer
from fastllm.train.data.conversations import ROLES, data_files
from fastllm.train.data.records import read_records

FIELDS = ("prompt", "question", "problem", "messages")
TOO_LONG = ("error", "drop")
_GSM8K = "####"
_THINK = "<think>"

Messages = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRecord:
    """A prompt and the columns that go with it.

    prompt: a string or chat messages. plain: what a model without a chat template reads in their
    stead; None: the contents of the messages. place: file and record, or task and number.
    """

    prompt: str | Messages
    columns: dict[str, Any] = field(default_factory=dict)
    plain: str | None = None
    place: str = "prompt"

    @property
    def messages(self) -> Messages:
        """The prompt as chat messages."""
        if isinstance(self.prompt, str):
            return [{"role": "user", "content": self.prompt}]
        return self.prompt

    @property
    def text(self) -> str:
        """The words of the prompt without any template, as reward functions get them."""
        return prompt_text(self.prompt)

    def error(self, problem: str, remedy: str = "") -> DataError:
        """A DataError that names this record."""
        return DataError(self.place, "", "", problem, remedy)


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt's tokens, as the model is given them, and the record.

    opens_thoughts: the template has begun the answer's thoughts, as that of DeepSeek-R1 does.
    """

    ids: tuple[int, ...]
    record: PromptRecord
    opens_thoughts: bool = False

    def whole(self, text: str) -> str:
        """A completion's text for rewards, with the mark of its thoughts where the prompt has it:
        what is said in thoughts that do not end is no answer."""
        return f"{_THINK}\n{text}" if self.opens_thoughts and _THINK not in text else text


def prompt_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """A string as it is; of messages the contents, with empty lines between them."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(_content(message) for message in prompt)


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def read_prompts(
    sources: Sequence[str | os.PathLike[str]],
    *,
    task_count: int = 1000,
    seed: int = 0,
    split: str = "train",
) -> list[PromptRecord]:
    """The prompts of files, folders and tasks, in order.

    Args:
        sources: .jsonl, .json or .parquet files, folders of them, or tasks ("arithmetic:2").
        task_count: problems of each task.
        seed: of the tasks.
        split: "train" or "test" problems of the tasks; files are read whole.

    Raises DataError naming file, record and field, also if there are no prompts at all;
    FileNotFoundError; ValueError for an unknown task or split.
    """
    from fastllm.train.tasks import is_task, make

    if isinstance(sources, str | os.PathLike):
        raise TypeError("sources must be a sequence of names, not one name")
    records: list[PromptRecord] = []
    for source in sources:
        if isinstance(source, str) and is_task(source) and not os.path.exists(source):
            records += make(source, task_count, seed, split)
            continue
        for file in data_files([source]):
            found = [parse_prompt(record, file, place) for place, record in read_records(file)]
            if not found:
                raise DataError(file, "", "", "the file holds no records")
            records += found
    if not records:
        raise ValueError("no prompts: give files, folders or tasks such as arithmetic:2")
    return records


def parse_prompt(
    record: Mapping[str, Any], file: str | os.PathLike[str] = "data", place: str = ""
) -> PromptRecord:
    """The prompt of one record. Raises DataError naming file, place and field."""
    name = next((name for name in FIELDS if record.get(name) is not None), None)
    if name is None:
        found = ", ".join(map(repr, list(record)[:8])) or "no fields"
        remedy = f"Expected one of {', '.join(FIELDS)}"
        raise DataError(file, place, "", f"has {found}; none of them is a prompt", remedy)
    columns = {key: item for key, item in record.items() if key != name}
    prompt = record[name]
    if isinstance(prompt, str):
        if not prompt.strip():
            raise DataError(file, place, name, "is empty", "Expected words")
    else:
        prompt = _messages(prompt, file, place, name)
        if prompt[-1]["role"] == "assistant":
            columns.setdefault("completion", _content(prompt.pop()))
            if not prompt:
                problem = "is an answer to nothing"
                raise DataError(file, place, name, problem, "Expected a user's message before it")
    _split_answer(columns)
    where = ": ".join(filter(None, (os.fspath(file), place)))
    return PromptRecord(prompt=prompt, columns=columns, place=where)


def _split_answer(columns: dict[str, Any]) -> None:
    """GSM8K's answer holds the way to it."""
    answer = columns.get("answer")
    if isinstance(answer, str) and _GSM8K in answer:
        columns.setdefault("solution", answer)
        columns["answer"] = answer.rpartition(_GSM8K)[2].strip()


def _messages(value: Any, file: str | os.PathLike[str], place: str, name: str) -> Messages:
    expected = "Expected a string or a list of {'role': ..., 'content': ...}"
    if not isinstance(value, list) or not value:
        raise DataError(file, place, name, f"is {value!r:.60}", expected)
    for i, message in enumerate(value):
        where = f"{name}[{i}]"
        if not isinstance(message, dict):
            raise DataError(file, place, where, f"is {message!r:.60}", expected)
        if message.get("role") not in ROLES:
            problem = f"is {message.get('role')!r:.60}"
            remedy = f"Expected one of {', '.join(ROLES)}"
            raise DataError(file, place, f"{where}.role", problem, remedy)
        content = message.get("content")
        parts = isinstance(content, list) and all(
            isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
        )
        if not (isinstance(content, str) or parts or message.get("tool_calls")):
            problem = f"is {content!r:.60}"
            raise DataError(file, place, f"{where}.content", problem, "Expected a string")
    return [{k: v for k, v in message.items() if v is not None} for message in value]


def gather_columns(records: Sequence[PromptRecord]) -> dict[str, list[Any]]:
    """The columns of records as lists, None where a record lacks one."""
    names = dict.fromkeys(name for record in records for name in record.columns)
    return {name: [record.columns.get(name) for record in records] for name in names}


def encode_prompts(
    records: Iterable[PromptRecord],
    tokenizer: Tokenizer,
    template: str | None = None,
    *,
    variables: Mapping[str, Any] | None = None,
    max_tokens: int | None = None,
    too_long: str = "error",
) -> list[EncodedPrompt]:
    """The tokens of prompts, each with what makes the model answer.

    Args:
        records: the prompts.
        tokenizer: the model's.
        template: Jinja source, "chatml", or "plain" for the words alone, with the special tokens
            that the tokenizer puts around a text. None: the tokenizer's own, else "plain".
        variables: further variables of the template (enable_thinking, ...).
        max_tokens: the longest prompt.
        too_long: "error", or "drop" to leave longer ones out.

    Raises DataError naming a record that is empty, too long, or that the template refuses, or if no
    prompt is left; ValueError for another too_long.
    """
    if too_long not in TOO_LONG:
        raise ValueError(f"too_long must be one of {', '.join(TOO_LONG)}, got {too_long!r}")
    records = list(records)
    source = template if template is not None else tokenizer.chat_template or "plain"
    if source == "plain":
        texts = [record.text if record.plain is None else record.plain for record in records]
    else:
        texts = _rendered(records, source, tokenizer, dict(variables or {}))
    encoded = []
    for record, text in zip(records, texts, strict=True):
        if not text.isascii():
            _check_unicode(record, text)
    rows = tokenizer.encode_batch(texts, add_special_tokens=source == "plain")
    for record, text, ids in zip(records, texts, rows, strict=True):
        if not ids:
            raise record.error("the prompt has no tokens", "Expected words")
        if max_tokens is None or len(ids) <= max_tokens:
            opens = source != "plain" and text.rstrip().endswith(_THINK)
            encoded.append(EncodedPrompt(tuple(ids), record, opens))
        elif too_long == "error":
            raise record.error(
                f"the prompt has {len(ids)} tokens, more than {max_tokens}",
                "Shorten it, leave it out, or let answers be shorter (max_completion)",
            )
    if not encoded:
        place = records[0].place if records else "prompts"
        problem = f"every prompt has more than {max_tokens} tokens" if records else "there are none"
        raise DataError(place, "", "", problem, "Give prompts that fit the model's context")
    return encoded


def _rendered(
    records: Sequence[PromptRecord], source: str, tokenizer: Tokenizer, variables: dict[str, Any]
) -> list[str]:
    from fastllm.errors import ChatTemplateError

    template = ChatTemplate(CHATML if source == "chatml" else source, tokenizer.special_tokens)
    texts = []
    for record in records:
        tools = record.columns.get("tools") or None
        try:
            texts.append(template.render(record.messages, True, tools, **variables))
        except (ChatTemplateError, TypeError, ValueError) as error:
            raise record.error(str(error), "Give a template that fits") from error
    return texts


def _check_unicode(record: PromptRecord, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        problem = f"holds the lone surrogate {text[error.start]!r}, which is no character"
        raise record.error(problem) from error
