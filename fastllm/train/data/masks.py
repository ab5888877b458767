"""Which tokens of a conversation are learned: the assistant's words and the token that ends them.

A model answers turn i after the prompt P(i), the chat template's rendering of the messages before
it with the generation prompt. The rendering R(i) of the messages up to and including turn i begins
with P(i); what follows, up to the end token, is what the model has to say: its words, and think and
tool-call markup as the template writes them. So the spans come from rendering prefixes, never from
a search for markers.

Some templates rewrite earlier turns once later ones are there (Qwen3 drops their thinking). Such a
turn is learned where it stands when it is said, in R(i), as a document of its own. Turns whose
R(i) is a prefix of a later turn's share its document; with most templates that is all of them.

Texts are tokenized whole. Spans are mapped to tokens by the places of the tokens in the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from fastllm.errors import ChatTemplateError, DataError
from fastllm.models.chat_template import CHATML, ChatTemplate
from fastllm.models.tokenizer import Tokenizer
from fastllm.train.data.conversations import Conversation

LOSSES = ("assistant", "all")
_THINKING = ("enable_thinking", "thinking")  # the names that templates read
_REMEDY = "Give a template that fits: --chat-template chatml, plain, or a Jinja file"
_BATCH = 256  # conversations tokenized together

# Prompt and completion as they are, for base models.
PLAIN = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "plain": PLAIN}


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One document to learn from.

    ids: int32 [T]. trained: bool [T], whether the token is to be predicted; the first never is.
    place: the record it comes from.
    """

    ids: np.ndarray
    trained: np.ndarray
    place: str

    def targets(self) -> np.ndarray:
        """int64 [T]: at each place the id to predict there, -100 for none."""
        following = np.full(len(self.ids), -100, dtype=np.int64)
        following[:-1] = np.where(self.trained[1:], self.ids[1:], -100)
        return following


@dataclass(slots=True)
class Rendering:
    """A text and the spans of characters in it that are learned, in order; words: the same without
    the tokens that end them."""

    text: str
    spans: list[tuple[int, int]] = field(default_factory=list)
    words: list[tuple[int, int]] = field(default_factory=list)


class ConversationEncoder:
    """Turns conversations into examples, by one chat template and one tokenizer.

    template: its Jinja source; None takes the tokenizer's own, or ChatML if it has none. variables:
    further variables of the template (enable_thinking, ...). loss: "assistant", or "all" for every
    token of the conversation. literal: special tokens that learned turns spell are characters, not
    tokens, as answers have them that were sampled; default: tokens, as a template's are.

    Unless `variables` says so, each turn with reasoning is rendered with enable_thinking=True and
    each without with False: the prompt that a template makes then already holds the empty thoughts
    which would otherwise be learned.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | None = None,
        *,
        loss: str = "assistant",
        variables: Mapping[str, Any] | None = None,
        literal: bool = False,
    ) -> None:
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
        source = template if template is not None else tokenizer.chat_template or CHATML
        self.tokenizer = tokenizer
        self.loss = loss
        self.literal = literal
        self.variables = dict(variables or {})
        self.template = ChatTemplate(source, tokenizer.special_tokens)
        ends = (tokenizer.decode([i], skip_special_tokens=False) for i in tokenizer.eos_token_ids)
        self._ends = tuple(sorted(filter(None, {*tokenizer.special_texts, *ends})))
        self.seen_ends: set[str] = set()  # the texts that ended turns so far

    def render(self, conversation: Conversation) -> list[Rendering]:
        """The documents of a conversation, in its order.

        Raises DataError naming record and turn if nothing in it is to be learned, or the template
        refuses it, leaves out a part of a turn, or does not end the turn.
        """
        if self.loss == "all":
            text = self._text(conversation, len(conversation.messages), False, {})
            return [Rendering(text, [(0, len(text))])]
        documents: list[Rendering] = []
        for turn in reversed(conversation.answers):
            if turn == 0:
                continue  # the first words of a conversation answer nothing
            text, start, end = self._turn(conversation, turn)
            for document in documents:
                if document.text.startswith(text):
                    document.spans.insert(0, (start, len(text)))
                    document.words.insert(0, (start, end))
                    break
            else:
                documents.insert(0, Rendering(text, [(start, len(text))], [(start, end)]))
        if not documents:
            problem = "no message of it is an assistant's answer that is to be learned"
            raise conversation.error("", problem, "Expected an assistant's turn after a user's")
        return documents

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end answers: the tokenizer's, and those of the turns seen so far."""
        ids = map(self.tokenizer.token_to_id, self.seen_ends)
        return self.tokenizer.eos_token_ids | {i for i in ids if i is not None}

    def prompt(self, conversation: Conversation, turn: int) -> str:
        """P(turn): what the model is given to say message `turn`. Raises DataError."""
        text, length, _ = self._turn(conversation, turn)
        return text[:length]

    def encode(self, conversations: Iterable[Conversation]) -> Iterator[Example]:
        """The examples of conversations, in order. Raises DataError naming the record."""
        conversations = iter(conversations)
        while batch := list(islice(conversations, _BATCH)):
            pairs = [(c, document) for c in batch for document in self.render(c)]
            yield from self._examples(pairs)

    def _examples(self, pairs: list[tuple[Conversation, Rendering]]) -> Iterator[Example]:
        for conversation, document in pairs:
            if not document.text.isascii():
                _check_unicode(conversation, document.text)
        literal = [document.words for _, document in pairs] if self.literal else None
        tokens = self.tokenizer.encode_with_offsets([d.text for _, d in pairs], literal)
        for (conversation, document), (ids, places) in zip(pairs, tokens, strict=True):
            trained = _tokens_in(document.spans, places)
            if not trained.any():
                raise conversation.error(
                    "", "nothing in it is to be learned: no token of the assistant's", _REMEDY
                )
            yield Example(
                ids=np.asarray(ids, dtype=np.int32),
                trained=trained,
                place=": ".join(filter(None, (conversation.file, conversation.record))),
            )

    def _turn(self, conversation: Conversation, turn: int) -> tuple[str, int, int]:
        """R(turn) up to its end token, the length of P(turn), and where the end token begins."""
        message = conversation.messages[turn]
        for variables in self._thinking(message):
            prompt = self._text(conversation, turn, True, variables)
            whole = self._text(conversation, turn + 1, False, variables)
            if whole.startswith(prompt):
                break
        else:
            said = whole[_common(prompt, whole) :]
            raise self._misfit(
                conversation,
                turn,
                f"the chat template asks for it with ...{prompt[-40:]!r} but renders it as "
                f"...{said[:40]!r}, which that does not lead to",
            )
        if prompt == self._text(conversation, turn, False, variables):
            self._check_header(conversation, turn, variables, prompt)
        text = whole.rstrip()
        end = next((end for end in self._ends if text.endswith(end)), None)
        if end is None or len(text) <= len(prompt):
            raise self._misfit(
                conversation,
                turn,
                f"the chat template ends it with {text[-20:]!r}, no special token: a model that "
                "learns it would never stop",
            )
        self._check_complete(conversation, turn, text[len(prompt) :])
        self.seen_ends.add(end)
        return text, len(prompt), len(text) - len(end)

    def _thinking(self, message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Variables to try: thinking on or off as the turn itself has it, then the defaults."""
        if not any(name in self.variables for name in _THINKING):
            yield dict.fromkeys(_THINKING, _thinks(message))
        yield {}

    def _text(
        self, conversation: Conversation, count: int, prompt: bool, variables: Mapping[str, Any]
    ) -> str:
        """The rendering of the first `count` messages."""
        try:
            return self.template.render(
                conversation.messages[:count],
                prompt,
                conversation.tools,
                **{**variables, **self.variables},
            )
        except (ChatTemplateError, TypeError, ValueError) as error:
            problem = f"cannot be rendered up to message {count - 1}: {error}"
            raise conversation.error("", problem) from error

    def _check_header(
        self, conversation: Conversation, turn: int, variables: Mapping[str, Any], prompt: str
    ) -> None:
        """A template without a generation prompt must not write a header before the answer: the
        model would have to say it. Two answers without a common start show what it writes."""
        starts = []
        for words in ("a", "b"):
            probe = {"role": "assistant", "content": words}
            messages = [*conversation.messages[:turn], probe]
            other = Conversation(
                messages=messages,
                tools=conversation.tools,
                answers=(turn,),
                file=conversation.file,
                record=conversation.record,
            )
            starts.append(self._text(other, turn + 1, False, variables)[len(prompt) :])
        header = starts[0][: _common(*starts)]
        if header.strip():
            raise self._misfit(
                conversation,
                turn,
                f"the chat template has no generation prompt, yet writes {header!r} before it",
            )

    def _check_complete(self, conversation: Conversation, turn: int, said: str) -> None:
        message = conversation.messages[turn]
        missing = ""
        if (message.get("reasoning_content") or "").strip() not in said:
            missing = "reasoning_content"
        elif any(c["function"]["name"] not in said for c in message.get("tool_calls", ())):
            missing = "tool_calls"
        if missing:
            raise self._misfit(conversation, turn, "the chat template leaves it out", f".{missing}")

    def _misfit(
        self, conversation: Conversation, turn: int, problem: str, part: str = ""
    ) -> DataError:
        return conversation.error(f"messages[{turn}]{part}", problem, _REMEDY)


def turn_ends(tokenizer: Tokenizer, template: str) -> frozenset[int]:
    """The special tokens that end an answer by a chat template, none if it ends answers by others.

    A tokenizer need not name them: base models of Qwen2.5 have ChatML and end with texts alone.
    """
    encoder = ConversationEncoder(tokenizer, template)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        encoder.render(Conversation(messages=messages, answers=(1,), file="template", record=""))
    except DataError:  # the template refuses such a turn, or no special token ends it
        return frozenset()
    return encoder.end_ids - tokenizer.eos_token_ids


def _thinks(message: Mapping[str, Any]) -> bool:
    content = message["content"]
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return bool((message.get("reasoning_content") or "").strip()) or "</think>" in text


def _common(first: str, second: str) -> int:
    """Length of the common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _tokens_in(spans: Iterable[tuple[int, int]], places: list[tuple[int, int]]) -> np.ndarray:
    """bool [T]: tokens with a character in a span; the first is nobody's answer."""
    table = np.asarray(places, dtype=np.int64).reshape(-1, 2)
    inside = np.zeros(len(table), dtype=bool)
    for start, end in spans:
        inside |= (table[:, 1] > start) & (table[:, 0] < end)
    inside[:1] = False
    return inside


def _check_unicode(conversation: Conversation, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise conversation.error(
            "", f"holds the lone surrogate {text[error.start]!r}, which is no character"
        ) from error
