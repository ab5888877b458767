"""The final answer of a completion: what it marks as such, or the last number in it.

    \\boxed{72}          the last one whose braces are balanced
    #### 72             GSM8K's
    Answer: 72          also "the answer is 72", "Final answer = 72"

The mark that stands last counts. Thoughts between <think> and </think> are no answer; a completion
that never ends its thoughts has none. All of it takes time in proportion to the text.
"""

from __future__ import annotations

import re
from collections import deque
from fractions import Fraction

_NUMBER = (
    r"(?:(?<![\w)\]])[-\u2212])?"  # a sign, not a subtraction
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]{1,9}(?![0-9]))?"
    r"(?:/[0-9]+(?![0-9.]))?"
)
_ANY_NUMBER = re.compile(_NUMBER)
_ONLY_NUMBER = re.compile(rf"[$\u20ac\u00a3]?\s*({_NUMBER})\s*(?:\\?%)?")
_MARK = re.compile(r"\\(?:boxed|fbox)\s*\{|####|\banswer(?:\s+is\b\s*:?|\s*[:=])", re.IGNORECASE)
_FRACTION = re.compile(
    r"\\[dt]?frac\s*\{\s*([-\u2212]?[0-9.]{1,500})\s*\}\s*\{\s*([0-9]{1,500})\s*\}"
)
_SHORT_FRACTION = re.compile(r"\\[dt]?frac\s*([0-9])\s*([0-9])")
_UNITS = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]{0,200})\}")
_SPACES = re.compile(r"\\[,!;: ]|\{,\}|~")
_OPERATION = re.compile(r"\s*[-+*/^\u2212\u00d7\u00f7\\]\s*[0-9.(\\]")  # after a number
_OPERATORS = "+*/^(\\-\u2212\u00d7\u00f7"  # before one
_DECORATION = "*_`$ \t\r\n"  # Markdown's and LaTeX's, around an answer
_MAX_DIGITS = 1000  # of a number, its exponent's value included: more is no answer to anything
_TAIL = 4096  # characters at the end in which a number without a mark is looked for
_MAX_MARKS = 100  # at the end: behind them there was a mark with an answer, or never
_MAX_ANSWER = 1000  # characters of a marked answer


def spoken(text: str) -> str | None:
    """What follows the thoughts; None if they do not end."""
    _, end, after = text.rpartition("</think>")
    if end:
        return after
    return None if "<think>" in text else text


def marked(text: str) -> str | None:
    """What the last mark in a text marks, at most a line; None if there is none."""
    for match in reversed(deque(_MARK.finditer(text), _MAX_MARKS)):
        if match[0].endswith("{"):
            found = _braced(text, match.end())
        else:
            rest = text[match.end() : match.end() + _MAX_ANSWER].lstrip(_DECORATION + ":")
            found = rest.partition("\n")[0]
        if found is not None and (found := _plain(found)):
            return found
    return None


def _braced(text: str, start: int) -> str | None:
    """The text up to the brace that closes the one before `start`."""
    depth = 1
    for place in range(start, min(len(text), start + _MAX_ANSWER)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[start:place]
    return None


def _plain(text: str) -> str:
    """Without decoration around it and the full stop after it."""
    text = text.strip(_DECORATION)
    if text.endswith("."):
        text = text[:-1]
    return text.strip(_DECORATION)


def final_answer(text: str) -> str | None:
    """The final answer as it is written: the marked one, or the last number; None: there is none.

    >>> final_answer("27 + 45 = 67 + 5 = 72.")
    '72'
    """
    said = spoken(text)
    if said is None:
        return None
    found = marked(said)
    return found if found is not None else last_number(said)


def last_number(text: str) -> str | None:
    """The last number of a text, as it is written."""
    matches = _ANY_NUMBER.findall(text[-_TAIL:])
    return matches[-1] if matches else None


def number(text: str) -> Fraction | None:
    """The exact value of a text that is a number: "1,234.5", "-3", "3/4", "1e3", "$5", "12%" (12).

    None for other texts, a division that is still to be done ("144/2") among them, and for numbers
    of more than a thousand digits.
    """
    if len(text) > _MAX_DIGITS:
        return None
    match = _ONLY_NUMBER.fullmatch(_plain(text))
    if match is None:
        return None
    written = match[1].replace(",", "").replace("\u2212", "-")
    written, _, divisor = written.partition("/")
    mantissa, _, exponent = written.lower().partition("e")
    if abs(int(exponent or 0)) > _MAX_DIGITS or (divisor and not int(divisor)):
        return None
    value = Fraction(mantissa) * Fraction(10) ** int(exponent or 0) / int(divisor or 1)
    return None if divisor and value.denominator == 1 else value


def number_in(text: str) -> Fraction | None:
    """The number that a marked answer gives: all of it, what is behind its last "=", or the first
    number there, as in "72 apples". None if that is still to be computed ("27 + 45")."""
    text = _FRACTION.sub(r"\1/\2", text[:_MAX_ANSWER])
    text = _SHORT_FRACTION.sub(r"\1/\2", text)
    text = _SPACES.sub("", _UNITS.sub(r" \1 ", text)).replace("\\$", "$")
    value = number(text)
    if value is not None:
        return value
    text = text.rpartition("=")[2]
    match = _ANY_NUMBER.search(text)
    if match is None or set(text[: match.start()]) & set(_OPERATORS):
        return None
    return None if _OPERATION.match(text, match.end()) else number(match[0])


def said_number(text: str) -> Fraction | None:
    """The final answer of a completion as a number."""
    said = spoken(text)
    if said is None:
        return None
    found = marked(said)
    if found is not None:
        return number_in(found)
    found = last_number(said)
    return None if found is None else number(found)


def expected(answer: object) -> str:
    """The text of an item of the column `answer`. Raises ValueError if there is none."""
    if answer is None or isinstance(answer, bool) or not str(answer).strip():
        raise ValueError(f"the column 'answer' holds {answer!r}: expected a text or a number")
    if isinstance(answer, str):
        return _plain(answer)
    if isinstance(answer, int | float):
        return str(int(answer)) if answer == answer // 1 else str(answer)
    raise ValueError(
        f"the column 'answer' holds a {type(answer).__name__}: expected a text or a number"
    )
