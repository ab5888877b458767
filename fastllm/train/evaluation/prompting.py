"""From the records of a data set to what the model reads: the user's template, worked examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastllm.train.data.prompts import FIELDS, Messages, PromptRecord
from fastllm.train.evaluation.template import PromptTemplate

_ANSWERS = ("solution", "completion", "answer")  # where a worked answer is, the fullest first


def fields_of(record: PromptRecord) -> dict[str, Any]:
    """What a template may name: the columns, and the prompt under each name that prompts have."""
    return {**record.columns, **dict.fromkeys(FIELDS, record.text)}


def prompted(
    records: Sequence[PromptRecord],
    template: PromptTemplate | None = None,
    shots: Sequence[PromptRecord] = (),
    answer_field: str | None = None,
) -> list[PromptRecord]:
    """Records whose prompts are as the model is to be asked.

    Args:
        records: of the data set.
        template: makes the words of a question from a record's fields; None: its prompt as it is.
        shots: answered examples that come first: as turns of the conversation, or, where there is
            no chat template, as text with an empty line behind each.
        answer_field: column of the shots that holds what is to be shown as the answer; default the
            first of solution, completion, answer that is there.

    Raises:
        DataError: naming the record and the field that it lacks.
    """
    turns: Messages = []
    text = ""
    for shot in shots:
        words, plain = _words(shot, template)
        answer = _answer(shot, answer_field)
        turns += [*_messages(shot, words, template), {"role": "assistant", "content": answer}]
        text += f"{_before_answer(plain)}{answer.strip()}\n\n"
    found = []
    for record in records:
        words, plain = _words(record, template)
        messages = _messages(record, words, template)
        system = [m for m in messages if m["role"] == "system"]
        rest = [m for m in messages if m["role"] != "system"]
        found.append(replace(record, prompt=[*system, *turns, *rest], plain=text + plain))
    return found


def _words(record: PromptRecord, template: PromptTemplate | None) -> tuple[str, str]:
    """The question as a message, and as plain text."""
    if template is not None:
        words = template.render(fields_of(record), record.place)
        return words, words
    return record.text, record.text if record.plain is None else record.plain


def _messages(record: PromptRecord, words: str, template: PromptTemplate | None) -> Messages:
    return record.messages if template is None else [{"role": "user", "content": words}]


def _answer(record: PromptRecord, name: str | None) -> str:
    for field in _ANSWERS if name is None else (name,):
        if record.columns.get(field) is not None:
            return str(record.columns[field])
    known = ", ".join(record.columns) or "no columns"
    wanted = name if name is not None else ", ".join(_ANSWERS)
    raise record.error(
        f"is to be shown with its answer, and has none in {wanted} (it has {known})",
        "Name the field with --shot-field, or give no shots",
    )


def _before_answer(words: str) -> str:
    return words if words[-1:].isspace() else words + " "
