"""Conversations and streams, with a model that is a list of answers."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from fastllm.cli.answering import Speed, print_stream
from fastllm.cli.chat import converse
from fastllm.engine.request import CompletionOutput, RequestOutput, SamplingParams

PARAMS = SamplingParams(max_tokens=8)


def _item(text: str, delta: str, count: int) -> RequestOutput:
    answer = CompletionOutput(
        index=0, text=text, token_ids=list(range(count)), cumulative_logprob=0.0, delta=delta
    )
    return RequestOutput(
        request_id="0", prompt=None, prompt_token_ids=[1], prompt_logprobs=None,
        outputs=[answer], finished=False, seed=0,
    )  # fmt: skip


class Parrot:
    """Answers with the last message, one word at a time."""

    def __init__(self, on_word: Any = None) -> None:
        self.seen: list[list[dict[str, str]]] = []
        self.closed = 0
        self.on_word = on_word

    def chat(
        self, messages: list[dict[str, str]], params: SamplingParams, stream: bool
    ) -> Iterator[RequestOutput]:
        assert stream
        self.seen.append(list(messages))
        if len(messages[-1]["content"]) > 100:
            raise ValueError("prompt 0 has too many tokens")
        return self._words(messages[-1]["content"].split())

    def _words(self, words: list[str]) -> Iterator[RequestOutput]:
        text = ""
        try:
            for i, word in enumerate(words):
                text += word + " "
                if self.on_word is not None:
                    self.on_word(word)
                yield _item(text, word + " ", i + 1)
        finally:
            self.closed += 1


def _reader(*lines: Any) -> Any:
    rest = iter(lines)

    def read() -> str:
        line = next(rest, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    return read


def test_history_grows_and_reset_forgets_it(capsys: pytest.CaptureFixture[str]) -> None:
    parrot = Parrot()
    history = converse(
        parrot, PARAMS, "Be kind.", _reader("one two", "three", "/reset", "four", "/exit", "five")
    )
    system = {"role": "system", "content": "Be kind."}
    assert [len(messages) for messages in parrot.seen] == [2, 4, 2]
    assert parrot.seen[1][2] == {"role": "assistant", "content": "one two "}
    assert history[0] == system and [m["content"] for m in history[1:]] == ["four", "four "]
    assert capsys.readouterr().out == "one two \nthree \nfour \n"


def test_ctrl_c_at_the_prompt_and_unknown_commands_do_not_end_the_program(
    capsys: pytest.CaptureFixture[str],
) -> None:
    parrot = Parrot()
    converse(parrot, PARAMS, None, _reader(KeyboardInterrupt(), "/what", "", "hello"))
    assert len(parrot.seen) == 1
    assert "/exit" in capsys.readouterr().err


def test_ctrl_c_ends_the_answer_keeps_what_was_said_and_closes_the_stream() -> None:
    def press(word: str) -> None:
        if word == "two":
            os.kill(os.getpid(), signal.SIGINT)

    parrot = Parrot(press)
    before = signal.getsignal(signal.SIGINT)
    history = converse(parrot, PARAMS, None, _reader("one two three four", "again"))
    assert history[1] == {"role": "assistant", "content": "one two "}
    assert history[3]["content"] == "again "
    assert parrot.closed == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_forgets_the_message_and_does_not_end_the_program() -> None:
    def press_twice(word: str) -> None:
        if word == "two":
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    parrot = Parrot(press_twice)
    history = converse(parrot, PARAMS, None, _reader("one two three", "again"))
    assert [m["content"] for m in history] == ["again", "again "]
    assert parrot.closed == 2


def test_a_conversation_that_outgrew_the_context_is_reported_and_goes_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    parrot = Parrot()
    history = converse(parrot, PARAMS, None, _reader("x " * 80, "short"))
    assert [m["content"] for m in history] == ["short", "short "]
    assert "/reset" in capsys.readouterr().err


def test_a_stream_gives_text_and_speed(capsys: pytest.CaptureFixture[str]) -> None:
    text, speed = print_stream(Parrot().chat([{"content": "a b c"}], PARAMS, True))
    assert text == "a b c " and speed.tokens == 3
    assert capsys.readouterr().out == "a b c \n"
    assert str(Speed(tokens=11, first=0.5, total=1.5)) == "11 tokens, 10 tok/s, first after 0.50 s"
