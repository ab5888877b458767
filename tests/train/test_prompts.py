"""Prompts of files and tasks, their columns, and the tokens that a model is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastllm.errors import DataError
from fastllm.models.tokenizer import Tokenizer
from fastllm.train.data.prompts import (
    PromptRecord,
    encode_prompts,
    gather_columns,
    parse_prompt,
    read_prompts,
)
from fastllm.train.tasks import make

USER = {"role": "user", "content": "2 + 2?"}
GSM8K = {"question": "Two and two?", "answer": "2+2 = <<2+2=4>>4 in all.\n#### 4"}


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(tiny: Any) -> Tokenizer:
    return Tokenizer.from_hf(tiny.tokenizer)


@pytest.mark.parametrize(
    ("record", "prompt", "columns"),
    [
        ({"prompt": "2 + 2?", "answer": "4"}, "2 + 2?", {"answer": "4"}),
        ({"prompt": [USER], "n": 1}, [USER], {"n": 1}),
        ({"messages": [USER]}, [USER], {}),
        ({"problem": "2 + 2?", "level": "1"}, "2 + 2?", {"level": "1"}),
        ({"question": "a", "choices": ["b", "c"]}, "a", {"choices": ["b", "c"]}),
        ({"prompt": "a", "question": "b"}, "a", {"question": "b"}),
        (
            {"messages": [USER, {"role": "assistant", "content": "4"}]},
            [USER],
            {"completion": "4"},
        ),
        (GSM8K, "Two and two?", {"answer": "4", "solution": GSM8K["answer"]}),
    ],
)
def test_a_record_is_its_prompt_and_columns(record: Any, prompt: Any, columns: Any) -> None:
    found = parse_prompt(record, "data.jsonl", "line 1")
    assert (found.prompt, found.columns) == (prompt, columns)
    assert found.place == "data.jsonl: line 1"
    assert found.messages[-1]["role"] == "user"


def test_files_folders_and_tasks_come_in_order(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    first = write(tmp_path / "a.jsonl", GSM8K)
    write(tmp_path / "more" / "b.jsonl", {"prompt": "one"}, {"prompt": [USER]})
    records = read_prompts([first, "arithmetic:2", str(tmp_path / "more")], task_count=2, seed=5)
    assert [record.text for record in records[:1] + records[3:]] == [
        "Two and two?",
        "one",
        "2 + 2?",
    ]
    assert records[1:3] == make("arithmetic:2", 2, seed=5)
    test = read_prompts(["word:1"], task_count=3, split="test")
    assert test == make("word:1", 3, split="test")
    columns = gather_columns(records)
    assert columns["answer"][0] == "4" and columns["answer"][3:] == [None, None]
    assert columns["task"][:2] == [None, "arithmetic:2"]


def test_parquet_is_read_too(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([GSM8K]), tmp_path / "a.parquet")
    (record,) = read_prompts([tmp_path])
    assert record.columns["answer"] == "4"


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"text": "a"}, "line 1: has 'text'; none of them is a prompt. Expected one of prompt"),
        ({}, "has no fields"),
        ({"prompt": " "}, "line 1: prompt: is empty"),
        ({"prompt": 3}, "prompt: is 3. Expected a string or a list"),
        ({"messages": []}, r"messages: is \[\]"),
        ({"messages": ["a"]}, r"messages\[0\]: is 'a'"),
        ({"messages": [{"role": "bot", "content": "a"}]}, r"messages\[0\].role: is 'bot'"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content: is None"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "an answer to nothing"),
    ],
)
def test_what_is_no_prompt_is_named(tmp_path: Path, record: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_prompts([write(tmp_path / "a.jsonl", record)])


def test_no_prompts_at_all_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no prompts"):
        read_prompts([])
    with pytest.raises(DataError, match="holds no records"):
        read_prompts([write(tmp_path / "a.jsonl")])
    with pytest.raises(FileNotFoundError):
        read_prompts([tmp_path / "b.jsonl"])
    with pytest.raises(ValueError, match="no level 40"):
        read_prompts(["arithmetic:40"])
    with pytest.raises(TypeError, match="sequence of names"):
        read_prompts("arithmetic:2")


def test_chat_templates_ask_for_the_answer(tokenizer: Tokenizer) -> None:
    (record,) = make("arithmetic:2", 1)
    (encoded,) = encode_prompts([record], tokenizer, "chatml")
    text = tokenizer.decode(encoded.ids, skip_special_tokens=False)
    assert text == f"<|im_start|>user\n{record.text}<|im_end|>\n<|im_start|>assistant\n"
    own = "{{ bos_token }}{{ messages[0].content }}{{ mark }}"
    (encoded,) = encode_prompts([record], tokenizer, own, variables={"mark": "!"})
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == (
        f"<|endoftext|>{record.text}!"
    )


def test_thoughts_that_the_template_has_begun_are_marked_in_what_rewards_get(
    tokenizer: Tokenizer,
) -> None:
    from fastllm.train.rewards.shipped import exact_match, think_format

    record = PromptRecord(prompt="2 + 2?")
    (opened,) = encode_prompts([record], tokenizer, "{{ messages[0].content }}<think>\n")
    done, cut = (opened.whole(text) for text in ("it is 4\n</think>\n4", "2 + 2 is 4"))
    assert think_format([record.text] * 2, [done, cut]) == [1, 0]
    assert exact_match([record.text] * 2, [done, cut], answer=[4, 4]) == [1, 0]
    assert opened.whole(done) == done
    for template in ("{{ messages[0].content }}", "plain"):
        (usual,) = encode_prompts([record], tokenizer, template)
        assert usual.whole("4") == "4"


def test_without_a_template_the_words_stand_alone(tokenizer: Tokenizer) -> None:
    task = make("word:1", 1)[0]
    records = [
        PromptRecord(prompt="Once"),
        PromptRecord(prompt=[{"role": "system", "content": "Be brief."}, USER]),
        task,
    ]
    for template in (None, "plain"):  # this tokenizer has no template
        texts = [tokenizer.decode(p.ids) for p in encode_prompts(records, tokenizer, template)]
        assert texts == ["Once", "Be brief.\n\n2 + 2?", task.plain]
    assert records[1].text == "Be brief.\n\n2 + 2?"


def test_long_prompts_are_an_error_or_left_out(tokenizer: Tokenizer) -> None:
    records = [PromptRecord(prompt="ab", place="a: line 1"),
               PromptRecord(prompt="abcdef", place="a: line 2")]  # fmt: skip
    with pytest.raises(DataError, match="a: line 2: the prompt has 6 tokens, more than 4"):
        encode_prompts(records, tokenizer, "plain", max_tokens=4)
    (kept,) = encode_prompts(records, tokenizer, "plain", max_tokens=4, too_long="drop")
    assert kept.record is records[0] and len(kept.ids) == 2
    with pytest.raises(DataError, match="every prompt has more than 1 tokens"):
        encode_prompts(records, tokenizer, "plain", max_tokens=1, too_long="drop")
    with pytest.raises(ValueError, match="too_long must be one of error, drop"):
        encode_prompts(records, tokenizer, "plain", too_long="cut")


@pytest.mark.parametrize(
    ("record", "template", "words"),
    [
        (PromptRecord(prompt="", place="p"), "plain", "p: the prompt has no tokens"),
        (PromptRecord(prompt="a\ud800", place="p"), "plain", "p: holds the lone surrogate"),
        (PromptRecord(prompt="a", place="p"), "{{ raise_exception('no') }}", "p: .*no"),
    ],
)
def test_a_prompt_that_cannot_be_encoded_is_named(
    tokenizer: Tokenizer, record: PromptRecord, template: str, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        encode_prompts([record], tokenizer, template)
    with pytest.raises(DataError, match="there are none"):
        encode_prompts([], tokenizer, template)
