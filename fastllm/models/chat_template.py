"""Chat messages to prompt text, by the model's own Jinja template.

Templates render as in transformers: trim_blocks and lstrip_blocks, loop controls, tojson that does
not escape HTML, raise_exception, strftime_now, `{% generation %}`. They are untrusted; see
`template_sandbox` for what keeps them harmless.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import CodeType
from typing import Any

import jinja2
from jinja2 import nodes

from fastllm.errors import ChatTemplateError
from fastllm.models.template_costs import MAX_DEPTH
from fastllm.models.template_sandbox import MeteredEnvironment, instrument

MAX_SOURCE_CHARS = 1 << 17  # the longest template in use has about 30,000
MAX_OUTPUT_CHARS = 1 << 24
WORK_UNITS = 4_000_000  # about 1 s; a chat of 20 messages through a tool template takes 20,000
WORK_UNITS_PER_CHAR = 32  # of messages and tools: long chats may take long

# What a model without a template gets: OpenAI's ChatML, the format most fine-tunes know.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# What Jinja and the Python operations of a template raise; each is the template's (or the
# messages') fault and is reported as such.
_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,  # RecursionError too
    SyntaxError,
    TypeError,
    ValueError,
)


class ChatTemplate:
    """A compiled chat template. Safe to share between threads.

    source: the Jinja text. special_tokens: names (bos_token, eos_token, ...) to their text, which
    the template sees as variables.
    Raises ChatTemplateError if the source is too long, malformed or uses includes.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        if not isinstance(source, str):
            raise TypeError(f"source must be a string, not {type(source).__name__}")
        if len(source) > MAX_SOURCE_CHARS:
            raise ChatTemplateError(
                f"the chat template has {len(source)} characters, more than {MAX_SOURCE_CHARS}"
            )
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        self._code, self._takes_parts = _compile(source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt of a conversation, special tokens spelled out: encode it with
        add_special_tokens=False.

        messages: dicts with role (str) and content (str, or a list of {"type": "text", "text": str}
        parts, joined by newlines unless the template reads parts itself); content may be absent or
        None beside tool_calls. tools: JSON schemas. kwargs: further variables of the template
        (enable_thinking, ...). Raises TypeError or ValueError naming the message and the key, and
        ChatTemplateError if the template refuses the messages, fails or does too much work.
        """
        reader = _PlainData()
        variables: dict[str, Any] = {
            **self.special_tokens,
            **{key: reader.copy(value, key) for key, value in kwargs.items()},
            "messages": _read_messages(messages, reader, self._takes_parts),
            "tools": None if tools is None else _read_tools(tools, reader),
            "add_generation_prompt": bool(add_generation_prompt),
        }
        variables.setdefault("documents", None)
        return _run(self._code, variables, WORK_UNITS + WORK_UNITS_PER_CHAR * reader.size)


def _compile(source: str) -> tuple[CodeType, bool]:
    """Metered code of a template, and whether it reads content parts itself."""
    environment = MeteredEnvironment(WORK_UNITS)
    try:
        tree = environment.parse(source)
        takes_parts = any(_mentions_content(loop.iter) for loop in tree.find_all(nodes.For))
        return environment.compile(instrument(tree), filename="<chat template>"), takes_parts
    except ChatTemplateError:
        raise
    except jinja2.TemplateSyntaxError as error:
        raise ChatTemplateError(
            f"the chat template is malformed in line {error.lineno}: {error.message}"
        ) from error
    except _TEMPLATE_FAULTS as error:
        raise ChatTemplateError(f"the chat template cannot be compiled: {_words(error)}") from error


def _mentions_content(node: nodes.Node) -> bool:
    """`for part in message.content`, `message['content']`, or a variable named content."""
    return (
        (isinstance(node, nodes.Getattr) and node.attr == "content")
        or (
            isinstance(node, nodes.Getitem)
            and isinstance(node.arg, nodes.Const)
            and node.arg.value == "content"
        )
        or (isinstance(node, nodes.Name) and node.name == "content")
    )


def _run(code: CodeType, variables: dict[str, Any], units: int) -> str:
    environment = MeteredEnvironment(units)
    pieces, size = [], 0
    try:
        template = environment.template_class.from_code(environment, code, environment.globals)
        for piece in template.generate(variables):
            size += len(piece)
            if size > MAX_OUTPUT_CHARS:
                raise ChatTemplateError(
                    f"the chat template writes more than {MAX_OUTPUT_CHARS} characters"
                )
            pieces.append(piece)
    except ChatTemplateError:
        raise
    except _TEMPLATE_FAULTS as error:
        raise ChatTemplateError(f"the chat template failed: {_words(error)}") from error
    return "".join(pieces)


def _words(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it nests too deep"
    text = str(error)[:1000]
    if isinstance(error, jinja2.TemplateError):
        return text
    return f"{type(error).__name__}: {text}"


class _PlainData:
    """Copies caller data into plain JSON types: the sandbox need not know any other object, and a
    template cannot change the caller's. `size` counts characters and values."""

    def __init__(self) -> None:
        self.size = 0

    def copy(self, value: Any, where: str, depth: int = 0) -> Any:
        self.size += 1
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            self.size += len(value)
            return str.__str__(value)  # without a subclass's methods
        if isinstance(value, int):
            return int.__int__(value)
        if isinstance(value, float):
            return float.__float__(value)
        if depth >= MAX_DEPTH:
            raise ValueError(f"{where} nests more than {MAX_DEPTH} levels deep")
        if isinstance(value, Mapping):
            return {
                self.copy(key, where, depth + 1): self.copy(item, f"{where}[{key!r}]", depth + 1)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.copy(v, f"{where}[{i}]", depth + 1) for i, v in enumerate(value)]
        raise TypeError(f"{where} is a {type(value).__name__}; only JSON values are accepted")


def _read_messages(messages: Any, reader: _PlainData, takes_parts: bool) -> list[dict[str, Any]]:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise TypeError(
            f"messages must be a list of {{'role', 'content'}} dicts, not {type(messages).__name__}"
        )
    if not messages:
        raise ValueError("messages is empty; give at least one message")
    return [_read_message(m, f"messages[{i}]", reader, takes_parts) for i, m in enumerate(messages)]


def _read_message(
    message: Any, where: str, reader: _PlainData, takes_parts: bool
) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TypeError(f"{where} must be a dict, not {type(message).__name__}")
    if not isinstance(message.get("role"), str):
        got = type(message["role"]).__name__ if "role" in message else "nothing"
        raise TypeError(f"{where}['role'] must be a string such as 'user', got {got}")
    if message.get("content") is None and not message.get("tool_calls"):
        raise ValueError(f"{where}['content'] is missing; give a string")
    plain = reader.copy(message, where)
    content = plain.get("content")
    if isinstance(content, list):
        texts = [_part_text(part, f"{where}['content'][{i}]") for i, part in enumerate(content)]
        if not takes_parts:
            plain["content"] = "\n".join(texts)
    elif content is not None and not isinstance(content, str):
        raise TypeError(
            f"{where}['content'] must be a string or a list of text parts, "
            f"not {type(content).__name__}"
        )
    return plain


def _part_text(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise ValueError(f"{where} must be {{'type': 'text', 'text': ...}}: only text is supported")
    if not isinstance(part.get("text"), str):
        raise TypeError(f"{where}['text'] must be a string")
    return part["text"]


def _read_tools(tools: Any, reader: _PlainData) -> list[Any]:
    if not isinstance(tools, list | tuple) or not all(isinstance(t, Mapping) for t in tools):
        raise TypeError("tools must be a list of JSON schemas (dicts)")
    return reader.copy(list(tools), "tools")
