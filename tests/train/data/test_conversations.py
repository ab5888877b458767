"""Conversations of every form read as the same messages; what is malformed is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from fastllm.errors import DataError
from fastllm.train.data.conversations import data_files, parse_record, read_conversations

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
CALL = {"function": {"name": "get", "arguments": {"city": "北京"}}}


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    return path


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER, ANSWER]},
        {"conversations": [USER, ANSWER]},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"instruction": "Hi", "input": "", "output": "Hello"},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"messages": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]},
    ],
)
def test_every_form_gives_the_same_messages(tmp_path: Path, record: dict[str, Any]) -> None:
    file = write(tmp_path / "data.jsonl", [record])
    (conversation,) = read_conversations([file])
    assert conversation.messages == [USER, ANSWER]
    assert conversation.answers == (1,)
    assert conversation.tools is None
    assert (conversation.file, conversation.record) == (str(file), "line 1")


def test_containers_hold_the_same_records(tmp_path: Path) -> None:
    records = [{"messages": [USER, {**ANSWER, "content": str(i)}]} for i in range(3)]
    lines = write(tmp_path / "a.jsonl", records).read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "d.json").write_bytes(b"\xef\xbb\xbf\n" + lines + b"\n\n")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = __import__("pyarrow").Table.from_pylist(records)
    parquet.write_table(table, tmp_path / "e.parquet")
    (tmp_path / "notes.txt").write_text("not data")
    assert [f.name for f in data_files([tmp_path])] == [
        "a.jsonl", "b.jsonl.gz", "c.json", "d.json", "e.parquet",
    ]  # fmt: skip
    read = list(read_conversations([tmp_path]))
    assert [c.messages for c in read] == [r["messages"] for r in records] * 5
    assert {c.record for c in read[6:9]} == {"record 1", "record 2", "record 3"}


def test_alpaca_has_system_history_and_input() -> None:
    record = {
        "system": "Be brief.",
        "history": [["a", "b"]],
        "instruction": "Add",
        "input": "1 2",
        "output": "3",
    }
    conversation = parse_record(record, "alpaca")
    assert [(m["role"], m["content"]) for m in conversation.messages] == [
        ("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "Add\n\n1 2"),
        ("assistant", "3"),
    ]  # fmt: skip
    assert conversation.answers == (2, 4)


def test_tools_and_calls_come_as_objects_whatever_spells_them() -> None:
    tools = [{"type": "function", "function": {"name": "get"}}]
    wanted = [{"type": "function", **CALL}]
    spelled = [
        [CALL],
        [{"function": {"name": "get", "arguments": '{"city": "北京"}'}}],
        json.dumps([CALL["function"]]),
    ]
    for calls in spelled:
        turn = {"role": "assistant", "content": None, "tool_calls": calls}
        tool = {"role": "tool", "content": "sunny", "tool_calls": None}
        record = {"messages": [USER, turn, tool, ANSWER], "tools": json.dumps(tools)}
        conversation = parse_record(record, "messages")
        assert conversation.messages[1]["tool_calls"] == wanted
        assert conversation.messages[1]["content"] == ""
        assert conversation.answers == (1, 3)
        assert conversation.tools == tools
    beside = {"role": "system", "content": "x", "tools": json.dumps(tools)}
    conversation = parse_record({"conversations": [beside, USER, ANSWER]}, "messages")
    assert conversation.tools == tools and "tools" not in conversation.messages[0]
    sharegpt = [
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "Hello"},
    ]
    conversation = parse_record(
        {"conversations": sharegpt, "system": "S", "tools": tools}, "sharegpt"
    )
    assert [m["role"] for m in conversation.messages] == [
        "system", "user", "assistant", "tool", "assistant",
    ]  # fmt: skip
    assert conversation.messages[2]["tool_calls"] == wanted
    assert conversation.tools == tools


def test_completions_and_weights_say_what_is_learned() -> None:
    prompt = parse_record({"prompt": [USER, ANSWER, USER], "completion": "x"}, "prompt")
    assert prompt.answers == (3,)
    weighted = parse_record({"messages": [USER, {**ANSWER, "weight": 0}, USER, ANSWER]}, "messages")
    assert weighted.answers == (3,)
    assert "weight" not in weighted.messages[1]


BAD: list[tuple[Any, str]] = [
    ({"text": "x"}, "line 2: has 'text'; that is no form.*'messages'"),
    ({"messages": "x"}, "line 2: .*that is no form"),
    ([1], "line 2: is a JSON list. Each record is a JSON object"),
    ({"messages": []}, "line 2: messages: is empty. Expected at least one"),
    ({"messages": [USER, "x"]}, r"line 2: messages\[1\]: is a str: 'x'. Expected an object"),
    ({"messages": [{"content": "x"}]}, r"line 2: messages\[0\].role: is missing"),
    (
        {"messages": [{"role": "asistant", "content": "x"}]},
        r"role: is 'asistant'. Expected one of system, user.*did you mean assistant",
    ),
    ({"messages": [{"role": "user"}]}, r"messages\[0\].content: is missing. Expected a string"),
    ({"messages": [{"role": "user", "content": 3}]}, r"content: is a int: 3. Expected a string"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        r"messages\[0\].content\[0\]: is a dict",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, r"\[0\].text: is missing"),
    (
        {"messages": [USER, {**ANSWER, "reasoning_content": 1}]},
        r"\[1\].reasoning_content: is a int",
    ),
    ({"messages": [USER, {**ANSWER, "weight": 2}]}, r"\[1\].weight: is 2. Expected 0"),
    ({"messages": [{**USER, "tool_calls": [CALL]}]}, r"\[0\].tool_calls: belongs to role 'user'"),
    ({"messages": [USER, {**ANSWER, "tool_calls": [3]}]}, r"tool_calls\[0\]: is a int"),
    ({"messages": [USER, {**ANSWER, "tool_calls": [{}]}]}, r"tool_calls\[0\]: names no function"),
    ({"messages": [USER, {**ANSWER, "tool_calls": "{"}]}, r"tool_calls: .*not JSON"),
    (
        {"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "[1]"}]}]},
        r"arguments: is a list: \[1\]. Expected an object",
    ),
    ({"messages": [USER, ANSWER], "tools": [1]}, "line 2: tools: is a list"),
    ({"prompt": 3, "completion": "x"}, "line 2: prompt: is a int"),
    ({"prompt": "x", "completion": None}, "line 2: completion: is a NoneType"),
    ({"instruction": "x", "output": 3}, "line 2: output: is a int"),
    ({"instruction": "x", "output": "y", "history": [["a"]]}, r"history\[0\]: is a list"),
    ({"conversations": [{"from": "humen", "value": "x"}]}, r"\[0\].from: is 'humen'.*mean human"),
    ({"conversations": [{"from": "human"}]}, r"conversations\[0\].value: is missing"),
]


@pytest.mark.parametrize(("record", "words"), BAD)
def test_a_malformed_record_is_named_by_line_and_field(
    tmp_path: Path, record: Any, words: str
) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("\n" + json.dumps(record) + "\n")
    with pytest.raises(DataError, match=words) as raised:
        list(read_conversations([file]))
    assert str(raised.value).startswith(f"{file}: line 2: ")


def test_the_form_is_that_of_the_first_record_or_the_one_asked_for(tmp_path: Path) -> None:
    mixed = write(
        tmp_path / "mixed.jsonl",
        [{"messages": [USER, ANSWER]}, {"instruction": "x", "output": "y"}],
    )
    with pytest.raises(DataError, match="line 2: messages: is missing"):
        list(read_conversations([mixed]))
    both = {"messages": [USER], "prompt": "Hi", "completion": "Hello"}
    file = write(tmp_path / "both.jsonl", [both])
    (conversation,) = read_conversations([file], "prompt")
    assert conversation.messages == [USER, ANSWER]
    with pytest.raises(ValueError, match=r"data_format must be one of messages.*'alpacca'"):
        list(read_conversations([file], "alpacca"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"messages": [}\n', "line 1: not JSON: .*column 15"),
        ("a.jsonl", b'{"x": "\xff"}', "line 1: not UTF-8: byte 0xff at offset 7"),
        ("a.json", b'[{"a": 1},\n{"b"}]', "not JSON: .*line 2 column"),
        ("a.jsonl", b"\n \n", "the file holds no records"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON that can be read"),
        ("a.jsonl.gz", b"plain", "damaged"),
        ("a.json.gz", b"plain", "not a gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "a", "completion": "b"}\n')[:-9], "damaged"),
        ("a.txt", b"x", "the name does not say what is in it"),
        ("a.parquet", b"PAR1 not really", "not a parquet file"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError, match=words) as raised:
        list(read_conversations([file]))
    assert str(file) in str(raised.value)


def test_missing_files_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl"):
        list(read_conversations([tmp_path / "nothing.jsonl"]))
    with pytest.raises(DataError, match=r"holds no \.jsonl"):
        list(read_conversations([tmp_path]))
