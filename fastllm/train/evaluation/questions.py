"""Multiple-choice questions of data files.

A record has a question, its choices and which of them is right:

    choices   a list of strings; or {"text": [...], "label": ["A", ...]}, as the ARC data has it
    answer    a label of the choices, if they have labels; a number, or one in a string, counted
              from 0; a letter, A for the first

The fields' names may be others (HellaSwag: ctx, endings, label).
"""

from __future__ import annotations

import os
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from fastllm.errors import DataError
from fastllm.train.data.conversations import data_files
from fastllm.train.data.prompts import PromptRecord
from fastllm.train.data.records import read_records
from fastllm.train.evaluation.template import PromptTemplate

TEMPLATE = "Question: {question}\nAnswer:"
ANSWER = "right choice"  # the column of a question's record that a shot shows


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """record: how it is asked, its right choice in the column ANSWER. right: number from 0."""

    record: PromptRecord
    choices: tuple[str, ...]
    right: int


def read_questions(
    paths: Sequence[str | os.PathLike[str]],
    template: PromptTemplate | None = None,
    *,
    choices_field: str = "choices",
    answer_field: str = "answer",
    limit: int | None = None,
) -> list[Question]:
    """The questions of .jsonl, .json and .parquet files, in order.

    Args:
        paths: files, or folders of them.
        template: the words of a question from its record's fields; default TEMPLATE.
        choices_field, answer_field: what the fields are called.
        limit: no more than so many.

    Raises:
        DataError: naming file, record and field.
        FileNotFoundError: if there is no such file.
    """
    chosen = template or PromptTemplate(TEMPLATE)
    records = (
        _question(record, chosen, choices_field, answer_field, os.fspath(file), place)
        for file in data_files(paths)
        for place, record in read_records(file)
    )
    questions = list(islice(records, limit))
    if not questions:
        raise DataError(str(paths[0]), "", "", "the file holds no records")
    return questions


def _question(
    record: Mapping[str, Any], template: PromptTemplate, choices_field: str, answer_field: str,
    file: str, place: str,
) -> Question:  # fmt: skip
    where = f"{file}: {place}"
    choices, labels = _choices(record.get(choices_field), choices_field, file, place)
    if record.get(answer_field) is None:
        known = ", ".join(record) or "no fields"
        remedy = f"It has {known}; name the field with --answer-field"
        raise DataError(file, place, answer_field, "is missing", remedy)
    right = _right(record[answer_field], labels, len(choices))
    if right is None:
        last = len(choices) - 1
        expected = f"one of {', '.join(labels)}" if labels else f"a number from 0 to {last}"
        if not labels and last < len(string.ascii_uppercase):
            expected += f", or a letter from A to {string.ascii_uppercase[last]}"
        problem = f"is {record[answer_field]!r:.60}, which names none of {len(choices)} choices"
        raise DataError(file, place, answer_field, problem, f"Expected {expected}")
    words = template.render(record, file, place)
    columns = {ANSWER: choices[right]}
    return Question(
        record=PromptRecord(prompt=words, columns=columns, plain=words, place=where),
        choices=tuple(choices),
        right=right,
    )


def _choices(value: Any, name: str, file: str, place: str) -> tuple[list[str], list[str]]:
    """(texts, labels); no labels for a plain list."""
    labels: list[str] = []
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        labels = [str(label) for label in value.get("label") or ()]
        value = value["text"]
    if not (isinstance(value, list) and len(value) > 1 and all(isinstance(c, str) for c in value)):
        problem = "is missing" if value is None else f"is {value!r:.60}"
        raise DataError(file, place, name, problem, "Expected a list of two strings or more")
    if not all(choice.strip() for choice in value):
        raise DataError(file, place, name, "holds an empty choice", "Expected words")
    if labels and len(labels) != len(value):
        raise DataError(file, place, name, f"has {len(labels)} labels for {len(value)} texts")
    return value, labels


def _right(answer: Any, labels: Sequence[str], count: int) -> int | None:
    """The number that an answer means, None if it means none."""
    if labels:
        return labels.index(str(answer)) if str(answer) in labels else None
    if isinstance(answer, str):
        text = answer.strip()
        if len(text) == 1 and text.upper() in string.ascii_uppercase:
            answer = string.ascii_uppercase.index(text.upper())
        elif text.isdecimal():
            answer = int(text)
    whole = isinstance(answer, int) and not isinstance(answer, bool)
    return answer if whole and 0 <= answer < count else None
