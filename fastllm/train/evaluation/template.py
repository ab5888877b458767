"""Prompt templates of evaluations: text with fields of the data in braces."""

from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastllm.errors import DataError, did_you_mean


class PromptTemplate:
    """`Question: {question}` and a line end: `{name}` is a field's value, `{{` and `}}` are braces.

    Nothing else is understood in braces: no attributes, no formats, no code. A value that is no
    string is written as Python writes it.

    Raises ValueError if the text has no field, or braces that name none.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            pieces = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ValueError(
                f"the template {text!r:.80} has a single brace: write {{{{ or }}}} for one"
            ) from error
        self._pieces: list[tuple[str, str | None]] = []
        for literal, name, format, conversion in pieces:
            if name is not None and (format or conversion or not name.isidentifier()):
                raise ValueError(
                    f"the template's field {{{name}}} is not a name alone: write {{question}} for "
                    "a field, {{ and }} for braces"
                )
            self._pieces.append((literal, name))
        self.fields = tuple(dict.fromkeys(name for _, name in self._pieces if name is not None))
        if not self.fields:
            raise ValueError(
                f"the template {text!r:.80} names no field of the data, such as {{question}}, and "
                "there is no file of that name"
            )

    @classmethod
    def named(cls, value: str) -> PromptTemplate:
        r"""Of a text, in which \n is a line end, or of the file that `value` names."""
        if "\n" not in value and len(value) < 1024 and Path(value).is_file():
            return cls(Path(value).read_text(encoding="utf-8"))
        return cls(value.replace(r"\n", "\n").replace(r"\t", "\t"))

    def render(self, fields: Mapping[str, Any], file: str = "data", place: str = "") -> str:
        """The text of one record. Raises DataError naming the field that it lacks."""
        parts: list[str] = []
        for literal, name in self._pieces:
            parts.append(literal)
            if name is not None:
                if fields.get(name) is None:
                    raise _missing(name, fields, file, place)
                parts.append(str(fields[name]))
        return "".join(parts)


def _missing(name: str, fields: Mapping[str, Any], file: str, place: str) -> DataError:
    known = [key for key, value in fields.items() if value is not None]
    hint = did_you_mean(name, known)
    remedy = f"It has {', '.join(known) or 'no fields'}" + (f" ({hint})" if hint else "")
    return DataError(file, place, name, "the template names this field, which is missing", remedy)
