"""Conversations of data files, in the four forms that such files have, as messages of one form.

    messages   {"messages": [{"role": "user", "content": ...}, ...], "tools": [...]}
    prompt     {"prompt": ..., "completion": ...}, strings or lists of messages
    alpaca     {"instruction": ..., "input": ..., "output": ..., "system": ..., "history": [...]}
    sharegpt   {"conversations": [{"from": "human", "value": ...}, ...], "system", "tools": ...}

The form of a file is that of its first record. What a record may hold is checked here, so that a
malformed one is named by file, line and field before any training starts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fastllm.errors import DataError, did_you_mean
from fastllm.train.data.records import is_record_file, read_records

FORMATS = ("messages", "prompt", "alpaca", "sharegpt")
ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_LISTS = ("messages", "conversations", "conversation")


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Messages as a chat template wants them.

    messages: dicts with role and content; an assistant's may have reasoning_content and tool_calls
    (arguments as objects). tools: JSON schemas, or None. answers: places of the messages that are
    to be learned, ascending; the others are what they answer. file, record: where it was read.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    answers: tuple[int, ...]
    file: str = "conversation"
    record: str = ""

    def error(self, field: str, problem: str, remedy: str = "") -> DataError:
        """A DataError that names this record."""
        return DataError(self.file, self.record, field, problem, remedy)


def data_files(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The files that `paths` name; of a folder, those in it that hold records, sorted.

    Raises FileNotFoundError, and DataError for a folder without such files.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(path)
            continue
        inside = sorted(p for p in path.iterdir() if p.is_file() and is_record_file(p))
        if not inside:
            raise DataError(path, "", "", "the folder holds no .jsonl, .json or .parquet file")
        files += inside
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{file}: there is no such file")
    return files


def read_conversations(
    paths: Sequence[str | os.PathLike[str]], data_format: str | None = None
) -> Iterator[Conversation]:
    """The conversations of files and folders, in order.

    data_format: one of FORMATS; None takes it, file by file, from the first record.
    Raises DataError naming file, record and field; ValueError for an unknown data_format;
    FileNotFoundError.
    """
    if data_format is not None and data_format not in FORMATS:
        raise ValueError(f"data_format must be one of {', '.join(FORMATS)}, got {data_format!r}")
    for file in data_files(paths):
        form = data_format
        count = 0
        for place, record in read_records(file):
            form = form or _detect(file, place, record)
            yield parse_record(record, form, file, place)
            count += 1
        if not count:
            raise DataError(file, "", "", "the file holds no records")


def parse_record(
    record: Mapping[str, Any],
    data_format: str,
    file: str | os.PathLike[str] = "data",
    place: str = "",
) -> Conversation:
    """One record of a known form. Raises DataError naming file, place and field."""
    reader = _Reader(os.fspath(file), place)
    parse = {
        "messages": reader.messages_record,
        "prompt": reader.prompt_record,
        "alpaca": reader.alpaca_record,
        "sharegpt": reader.sharegpt_record,
    }[data_format]
    return parse(record)


def _detect(file: Path, place: str, record: Mapping[str, Any]) -> str:
    for name in _LISTS:
        turns = record.get(name)
        if isinstance(turns, list):
            first = turns[0] if turns else None
            return "sharegpt" if isinstance(first, dict) and "from" in first else "messages"
    if "prompt" in record and "completion" in record:
        return "prompt"
    if "instruction" in record and "output" in record:
        return "alpaca"
    found = ", ".join(map(repr, list(record)[:8])) or "no fields"
    raise DataError(
        file,
        place,
        "",
        f"has {found}; that is no form of a conversation",
        "Expected a list 'messages' or 'conversations', or 'prompt' and 'completion', or "
        "'instruction' and 'output'",
    )


class _Reader:
    """Checks and converts one record; its errors name the file and the place."""

    def __init__(self, file: str, place: str) -> None:
        self.file = file
        self.place = place

    def fail(self, field: str, problem: str, expected: str) -> NoReturn:
        raise DataError(self.file, self.place, field, problem, f"Expected {expected}")

    def conversation(
        self, messages: list[dict[str, Any]], tools: Any, first_answer: int = 0
    ) -> Conversation:
        answers = tuple(
            i
            for i, message in enumerate(messages)
            if message["role"] == "assistant" and message.pop("weight", 1) and i >= first_answer
        )
        return Conversation(
            messages=messages,
            tools=self.tools(tools),
            answers=answers,
            file=self.file,
            record=self.place,
        )

    # the four forms

    def messages_record(self, record: Mapping[str, Any]) -> Conversation:
        name = next((n for n in _LISTS if n in record), "messages")
        messages = self.message_list(record.get(name), name)
        tools = record.get("tools")
        if not tools and messages[0].get("tools"):  # as some data sets have it: beside the system's
            tools = messages[0]["tools"]
        for message in messages:
            message.pop("tools", None)
        return self.conversation(messages, tools)

    def prompt_record(self, record: Mapping[str, Any]) -> Conversation:
        prompt = self.text_or_messages(record, "prompt", "user")
        completion = self.text_or_messages(record, "completion", "assistant")
        return self.conversation([*prompt, *completion], record.get("tools"), len(prompt))

    def alpaca_record(self, record: Mapping[str, Any]) -> Conversation:
        messages = []
        if record.get("system"):
            messages.append({"role": "system", "content": self.string(record, "system")})
        history = record.get("history") or []
        if not isinstance(history, list):
            self.fail("history", _is(history), "a list of [question, answer] pairs")
        for i, pair in enumerate(history):
            if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(map(_is_str, pair))):
                self.fail(f"history[{i}]", _is(pair), "a pair [question, answer] of strings")
            messages.append({"role": "user", "content": pair[0]})
            messages.append({"role": "assistant", "content": pair[1]})
        question = self.string(record, "instruction")
        if record.get("input"):
            question += "\n\n" + self.string(record, "input")
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": self.string(record, "output")})
        return self.conversation(messages, record.get("tools"))

    def sharegpt_record(self, record: Mapping[str, Any]) -> Conversation:
        name = next((n for n in ("conversations", *_LISTS) if n in record), "conversations")
        turns = self.items(record.get(name), name, "a list of {'from': ..., 'value': ...}")
        messages = []
        if record.get("system"):
            messages.append({"role": "system", "content": self.string(record, "system")})
        messages += [self.sharegpt_turn(turn, f"{name}[{i}]") for i, turn in enumerate(turns)]
        return self.conversation(messages, record.get("tools"))

    # their parts

    def sharegpt_turn(self, turn: Any, where: str) -> dict[str, Any]:
        if not isinstance(turn, dict):
            self.fail(where, _is(turn), "an object {'from': ..., 'value': ...}")
        speaker = turn.get("from")
        role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            self.fail(f"{where}.from", f"is {speaker!r}", _one_of(speaker, _SHAREGPT_ROLES))
        value = self.string(turn, "value", where)
        message: dict[str, Any] = {"role": role, "content": value}
        if speaker == "function_call":
            message["content"] = ""
            message["tool_calls"] = self.tool_calls(value, f"{where}.value")
        if "weight" in turn:
            message["weight"] = self.weight(turn["weight"], f"{where}.weight")
        return message

    def text_or_messages(
        self, record: Mapping[str, Any], name: str, role: str
    ) -> list[dict[str, Any]]:
        value = record.get(name)
        if isinstance(value, str):
            return [{"role": role, "content": value}]
        if isinstance(value, list):
            return self.message_list(value, name)
        problem = _is(value) if name in record else "is missing"
        self.fail(name, problem, "a string or a list of messages")

    def message_list(self, value: Any, name: str) -> list[dict[str, Any]]:
        items = self.items(value, name, "a list of {'role': ..., 'content': ...}")
        return [self.message(item, f"{name}[{i}]") for i, item in enumerate(items)]

    def message(self, value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.fail(where, _is(value), "an object {'role': ..., 'content': ...}")
        role = value.get("role")
        if role not in ROLES:
            problem = f"is {role!r}" if "role" in value else "is missing"
            self.fail(f"{where}.role", problem, _one_of(role, ROLES))
        message = {key: item for key, item in value.items() if item is not None}
        if "weight" in message:
            message["weight"] = self.weight(message["weight"], f"{where}.weight")
        calls = message.pop("tool_calls", None)
        if calls:
            if role != "assistant":
                self.fail(f"{where}.tool_calls", f"belongs to role {role!r}", "it at an assistant")
            message["tool_calls"] = self.tool_calls(calls, f"{where}.tool_calls")
        reasoning = message.get("reasoning_content")
        if reasoning is not None and not isinstance(reasoning, str):
            self.fail(f"{where}.reasoning_content", _is(reasoning), "a string")
        message["content"] = self.content(message, where)
        return message

    def content(self, message: Mapping[str, Any], where: str) -> str | list[dict[str, Any]]:
        field = f"{where}.content"
        content = message.get("content")
        if content is None:
            if "tool_calls" in message:
                return ""
            self.fail(field, "is missing", "a string")
        if isinstance(content, list):
            for i, part in enumerate(content):
                if not (isinstance(part, dict) and part.get("type") == "text"):
                    self.fail(f"{field}[{i}]", _is(part), "{'type': 'text', 'text': ...}")
                self.string(part, "text", f"{field}[{i}]")
        elif not isinstance(content, str):
            self.fail(field, _is(content), "a string or a list of text parts")
        return content

    def tool_calls(self, value: Any, where: str) -> list[dict[str, Any]]:
        """Calls as {"type": "function", "function": {"name", "arguments": object}, ...}."""
        value = self.from_json(value, where)
        calls = value if isinstance(value, list) else [value]
        return [self.tool_call(call, f"{where}[{i}]") for i, call in enumerate(calls)]

    def tool_call(self, call: Any, where: str) -> dict[str, Any]:
        form = "an object {'function': {'name': ..., 'arguments': {...}}}"
        if not isinstance(call, dict):
            self.fail(where, _is(call), form)
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            self.fail(where, "names no function", form)
        arguments = self.from_json(function.get("arguments") or {}, f"{where}.arguments")
        if not isinstance(arguments, dict):
            self.fail(f"{where}.arguments", _is(arguments), "an object, or one as a JSON string")
        more = {} if function is call else {k: v for k, v in call.items() if k != "function"}
        return {
            "type": "function",
            **more,
            "function": {"name": function["name"], "arguments": arguments},
        }

    def tools(self, value: Any) -> list[dict[str, Any]] | None:
        if value is None or value in ("", [], "[]"):
            return None
        value = self.from_json(value, "tools")
        if not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
            self.fail("tools", _is(value), "a list of JSON schemas (objects)")
        return value

    def weight(self, value: Any, where: str) -> int:
        if value not in (0, 1):
            self.fail(where, f"is {value!r}", "0 (not learned) or 1")
        return int(value)

    def items(self, value: Any, name: str, expected: str) -> list[Any]:
        if not isinstance(value, list):
            self.fail(name, "is missing" if value is None else _is(value), expected)
        if not value:
            self.fail(name, "is empty", "at least one message")
        return value

    def string(self, record: Mapping[str, Any], name: str, where: str = "") -> str:
        field = f"{where}.{name}" if where else name
        value = record.get(name)
        if not isinstance(value, str):
            self.fail(field, "is missing" if value is None else _is(value), "a string")
        return value

    def from_json(self, value: Any, where: str) -> Any:
        """The value, parsed if it is a JSON text."""
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            self.fail(where, f"is a string that is not JSON ({error})", "an object or its JSON")


def _is(value: Any) -> str:
    text = repr(value)
    return f"is a {type(value).__name__}: {text if len(text) <= 60 else text[:57] + '...'}"


def _is_str(value: Any) -> bool:
    return isinstance(value, str)


def _one_of(value: Any, known: Iterable[str]) -> str:
    names = list(known)
    hint = did_you_mean(str(value), names)
    return f"one of {', '.join(names)}" + (f" ({hint})" if hint else "")
