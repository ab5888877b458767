# ruff: noqa: RUF001 (texts of other scripts)
"""Trained tokenizers: equal here and in transformers, exact, deterministic; their chat template."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllm.errors import DataError
from fastllm.models.chat_template import ChatTemplate
from fastllm.models.tokenizer import Tokenizer
from fastllm.models.tokenizer_stats import tokenizer_stats
from fastllm.models.tokenizer_training import (
    CHAT_TEMPLATE,
    CONTROL,
    MIN_VOCAB_SIZE,
    SPANS,
    save_tokenizer,
    train_tokenizer,
)

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not care.\n" * 3,
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。" * 3,
    "def main(argv):\n    return 0\n" * 3,
]
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the weather in Rome?"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "I should look.",
        "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}},
            {"type": "function", "function": {"name": "time", "arguments": {}}},
        ],
    },
    {"role": "tool", "content": "sunny"},
    {"role": "tool", "content": "noon"},
    {"role": "assistant", "content": "Sunny.", "reasoning_content": "Easy."},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained")
    save_tokenizer(train_tokenizer(TEXTS, 320), path)
    return path


@pytest.fixture(scope="module")
def trained(directory: Path) -> Tokenizer:
    return Tokenizer.from_hf(directory)


@pytest.fixture(scope="module")
def peer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


SAMPLES = [*TEXTS, "", " ", "a  b\n\n c", "é\u0301 😀 3.14159", "<|im_start|>user\nhi<|im_end|>"]


@pytest.mark.parametrize("text", [*SAMPLES, "<think>so</think>"])
def test_transformers_gives_the_same_ids(trained: Tokenizer, peer: Any, text: str) -> None:
    ids = trained.encode(text)
    assert peer(text)["input_ids"] == ids
    assert peer.decode(ids, skip_special_tokens=True) == trained.decode(ids)


@given(text=st.text(max_size=40))
def test_every_text_comes_back(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text, parse_special=False)
    assert trained.decode(ids, skip_special_tokens=False) == text


def test_special_tokens_have_their_roles(trained: Tokenizer, peer: Any, directory: Path) -> None:
    assert trained.vocab_size == 320
    assert [trained.encode(token) for token in (*CONTROL, *SPANS)] == [[i] for i in range(10)]
    assert trained.decode(range(10)) == "".join(SPANS)  # answers show thoughts, not turns
    assert trained.eos_token_ids == {0, 2} and trained.pad_token_id == 3
    assert (peer.bos_token_id, peer.eos_token_id, peer.pad_token_id) == (0, 0, 3)
    config = json.loads((directory / "generation_config.json").read_text())
    assert config == {"eos_token_id": [0, 2], "pad_token_id": 3}


def test_digits_are_tokens_of_their_own() -> None:
    trained = train_tokenizer(["2026 2026 2026 2026 in 2026"] * 5, 300, allow_smaller=True)
    assert len(trained.encode("2026")) == 4


def test_training_is_deterministic_for_any_number_of_threads(tmp_path: Path) -> None:
    program = (
        "import sys, hashlib; from fastllm.models.tokenizer_training import train_tokenizer; "
        "print(train_tokenizer([f'word{i % 97} and word{i % 31}' for i in range(3000)], 500, "
        "allow_smaller=True).fingerprint)"
    )
    prints = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "3")
    }
    assert len(prints) == 1 and len(prints.pop().strip()) == 64


def test_a_vocabulary_that_the_text_does_not_support_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"the text gave (\d+) merges.*and not of 5000"):
        train_tokenizer(TEXTS, 5000)
    smaller = train_tokenizer(TEXTS, 5000, allow_smaller=True)
    assert train_tokenizer(TEXTS, smaller.vocab_size).fingerprint == smaller.fingerprint
    with pytest.raises(ValueError, match=f"at least {MIN_VOCAB_SIZE}"):
        train_tokenizer(TEXTS, MIN_VOCAB_SIZE - 1)
    assert train_tokenizer([], MIN_VOCAB_SIZE).decode(range(10, 266)).count("A") == 1


def test_an_error_while_reading_ends_the_training() -> None:
    def broken() -> Any:
        yield "some text"
        raise DataError("file", "line 2", "", "broken")

    with pytest.raises(DataError, match="line 2"):
        train_tokenizer(broken(), 300)


def test_a_tokenizer_is_not_overwritten_unasked(directory: Path, trained: Tokenizer) -> None:
    with pytest.raises(DataError, match="--overwrite"):
        save_tokenizer(trained, directory)
    save_tokenizer(trained, directory, overwrite=True)


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_a_conversation_s_text_begins_with_the_text_of_its_beginning(
    peer: Any, tools: list[dict[str, Any]] | None
) -> None:
    template = ChatTemplate(CHAT_TEMPLATE)
    whole = template.render(MESSAGES, add_generation_prompt=False, tools=tools)
    for count in range(1, len(MESSAGES)):
        start = template.render(MESSAGES[:count], add_generation_prompt=False, tools=tools)
        assert whole.startswith(start)
        answer = MESSAGES[count]["role"] == "assistant"
        prompt = template.render(MESSAGES[:count], add_generation_prompt=True, tools=tools)
        assert whole.startswith(prompt) == answer
    assert peer.apply_chat_template(MESSAGES, tools=tools, tokenize=False) == whole


def test_the_template_keeps_thoughts_tools_and_answers() -> None:
    text = ChatTemplate(CHAT_TEMPLATE).render(MESSAGES, add_generation_prompt=False, tools=TOOLS)
    assert text == (
        "<|im_start|>system\nBe brief.\n\n"
        "These functions can be called, one JSON schema a line:\n"
        '{"type": "function", "function": {"name": "weather", "parameters": {}}}\n'
        "A call is a JSON object with name and arguments between <tool_call> and </tool_call>."
        "<|im_end|>\n<|im_start|>user\nWhat is the weather in Rome?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nI should look.\n</think>\n\n"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool\n<tool_response>\nsunny\n</tool_response><|im_end|>\n"
        "<|im_start|>tool\n<tool_response>\nnoon\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\nEasy.\n</think>\n\nSunny.<|im_end|>\n"
    )


def test_stats_count_every_byte_and_token_once(trained: Tokenizer) -> None:
    texts = [(text, False) for text in SAMPLES[:-1]]
    rows, total = tokenizer_stats(trained, texts)
    assert total.bytes == sum(len(text.encode()) for text, _ in texts)
    assert total.characters == sum(len(text) for text, _ in texts)
    assert total.tokens == sum(len(trained.encode(text)) for text, _ in texts)
    for name in ("bytes", "characters", "tokens"):
        assert getattr(total, name) == sum(getattr(row, name) for row in rows)


@pytest.mark.parametrize(
    ("text", "is_code", "script", "characters"),
    [
        ("hello", False, "Latin", 5),
        ("Привет", False, "Cyrillic", 6),
        ("你好", False, "Chinese", 2),
        ("東京へ行く", False, "Japanese", 5),
        ("한국어", False, "Korean", 3),
        ("123", False, "digits", 3),
        ("x = 1", True, "code", 5),
        ("שלום", False, "Hebrew", 4),
    ],
)
def test_scripts_are_told_apart(
    trained: Tokenizer, text: str, is_code: bool, script: str, characters: int
) -> None:
    (row,), _ = tokenizer_stats(trained, [(text, is_code)])
    assert (row.script, row.characters, row.bytes) == (script, characters, len(text.encode()))


@pytest.mark.parametrize("run", ["x" * 300_000, " " * 300_000, "-" * 300_000, "天" * 300_000])
def test_words_without_end_take_no_time(run: str) -> None:
    began = time.process_time()
    tokenizer = train_tokenizer([*TEXTS, f"a {run} b", *TEXTS], 300)
    assert time.process_time() - began < 5  # a word in one piece: its length squared, minutes
    assert tokenizer.decode(tokenizer.encode(f"a {run} b")) == f"a {run} b"
