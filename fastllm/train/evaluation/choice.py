"""Multiple choice by log-likelihood, as lm-evaluation-harness defines its numbers.

    acc        the likeliest choice is the right one: the largest sum of log-probabilities
    acc_norm   ... the largest sum over the number of the choice's characters (that harness's
               acc_norm; not tokens, not bytes)
    acc_bytes  ... over the number of its bytes in UTF-8

The characters and bytes are those of the choice alone, without the space that joins it to the
question. A tie goes to the earlier choice.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastllm.engine.continuations import Continued, continuation_log_probs
from fastllm.errors import ChatTemplateError
from fastllm.models.chat_template import CHATML, ChatTemplate
from fastllm.models.decoder import Decoder
from fastllm.models.tokenizer import Tokenizer
from fastllm.train.data.prompts import PromptRecord
from fastllm.train.evaluation.journal import Journal, keys_of
from fastllm.train.evaluation.questions import Question
from fastllm.train.evaluation.statistics import Share

AT_ONCE = 64  # questions between two writes of the journal
PLAIN = "plain"


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """What came of it: shares of questions, and what guessing would give."""

    questions: int
    acc: Share
    acc_norm: Share
    acc_bytes: Share
    chance: float

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        shares = {name: getattr(self, name).record() for name in ("acc", "acc_norm", "acc_bytes")}
        return {"questions": self.questions, **shares, "chance": self.chance}


def encode_choices(
    records: Sequence[PromptRecord],
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    template: str = PLAIN,
) -> list[Continued]:
    """Tokens of questions with their choices.

    Question and choice are tokenized as one text; what the tokens of all choices share with those
    of the question alone is the context. In plain text a space stands between them, unless the
    question ends with white space: that then belongs to the choices. What looks like a special
    token is text, in a chat template's prompt alone it is one.

    Args:
        records: how each question is asked, shots before it.
        questions: their choices.
        tokenizer: the model's.
        template: Jinja source of a chat template, "chatml", or "plain".

    Raises:
        DataError: naming a question that the template refuses.
    """
    chat = None
    if template != PLAIN:
        source = CHATML if template == "chatml" else template
        chat = ChatTemplate(source, tokenizer.special_tokens)
    found = []
    for record, question in zip(records, questions, strict=True):
        if chat is None:
            text = record.text if record.plain is None else record.plain
            context = text.rstrip()
            joined = [context + (text[len(context) :] or " ") + c for c in question.choices]
        else:
            context = _rendered(chat, record)
            joined = [context + choice for choice in question.choices]
        if chat is None:
            rows = tokenizer.encode_batch([context, *joined], parse_special=False)
        else:
            spans = [[(len(context), len(text))] for text in (context, *joined)]
            places = tokenizer.encode_with_offsets([context, *joined], spans)
            rows = [ids for ids, _ in places]
        shared = min(_common(rows[0], row) for row in rows[1:])
        if not shared or any(len(row) == shared for row in rows[1:]):
            raise record.error("question or choice has no token of its own", "Expected words")
        found.append(Continued(rows[0][:shared], [row[shared:] for row in rows[1:]]))
    return found


def _rendered(chat: ChatTemplate, record: PromptRecord) -> str:
    try:
        return chat.render(record.messages)
    except (ChatTemplateError, TypeError, ValueError) as error:
        raise record.error(str(error), "Give a template that fits") from error


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens at the beginning that both have."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def choice_log_probs(
    model: Decoder,
    groups: Sequence[Continued],
    places: Sequence[str],
    journal: Journal,
    settings: Mapping[str, Any],
    progress: Callable[[int], None] | None = None,
) -> list[list[float]]:
    """The log-probability of every choice: float64 sums of its tokens'.

    Args:
        model: loaded or live.
        groups: from `encode_choices`.
        places: where each question was read, for messages.
        journal: finished questions are taken from it and added to it.
        settings: what else the numbers depend on (the model), as JSON values.
        progress: is told how many questions are finished.

    Raises:
        ValueError: naming a question that is longer than the model's context.
    """
    for group, place in zip(groups, places, strict=True):
        longest = len(group.context) + max(map(len, group.endings)) - 1
        if longest > model.max_positions:
            raise ValueError(
                f"{place}: question and choice have {longest} tokens, more than the "
                f"{model.max_positions} of the context: shorten it or give fewer shots"
            )
    keys = keys_of(dict(settings), [[list(g.context), list(map(list, g.endings))] for g in groups])
    left = [i for i, key in enumerate(keys) if key not in journal.done]
    done = len(groups) - len(left)
    with journal.writing():
        for first in range(0, len(left), AT_ONCE):
            part = left[first : first + AT_ONCE]
            scored = continuation_log_probs(model, [groups[i] for i in part])
            for i, endings in zip(part, scored, strict=True):
                sums = [float(log_probs.double().sum()) for log_probs in endings]
                journal.add({"key": keys[i], "place": places[i], "log_probs": sums})
            done += len(part)
            if progress is not None:
                progress(done)
    return [journal.done[key]["log_probs"] for key in keys]


def chosen(log_probs: Sequence[float], sizes: Sequence[int]) -> int:
    """The choice of the largest log-probability a unit of size; the earlier one of equal ones."""
    ratios = [value / size for value, size in zip(log_probs, sizes, strict=True)]
    return ratios.index(max(ratios))


def summarize(questions: Sequence[Question], log_probs: Sequence[Sequence[float]]) -> Choices:
    """The shares. Raises ValueError if there are no questions."""
    sizes: dict[str, Callable[[str], int]] = {
        "acc": lambda choice: 1,
        "acc_norm": len,
        "acc_bytes": lambda choice: len(choice.encode("utf-8", "surrogatepass")),
    }
    shares = {
        name: Share.of([
            float(chosen(values, [size(c) for c in question.choices]) == question.right)
            for question, values in zip(questions, log_probs, strict=True)
        ])
        for name, size in sizes.items()
    }  # fmt: skip
    chance = statistics.fmean(1 / len(question.choices) for question in questions)
    return Choices(questions=len(questions), chance=chance, **shares)
