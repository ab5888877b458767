"""Chat templates: the text that transformers renders, clear errors, no way to hang or escape."""

from __future__ import annotations

import json
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from fastllm.errors import ChatTemplateError
from fastllm.models.chat_template import CHATML, MAX_SOURCE_CHARS, ChatTemplate
from fastllm.models.gguf import GGUFFile

LLAMA3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' ~ system }}
{%- if tools is not none %}
    {{- 'Environment: ipython\n' }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) ~ '\n\n' }}
    {%- endfor %}
{%- endif %}
{{- '<|eot_id|>' }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'
            + message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception('one tool call at a time') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|python_tag|>' }}
        {%- for name, value in call.arguments | items %}
            {{- name + '="' + value|string + '"' }}{{- ', ' if not loop.last }}
        {%- endfor %}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- '# Tools\n<tools>' }}
    {%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\n</tools><|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == 'user' and message.content is string
           and not (message.content.startswith('<tool_response>')
                    and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and reasoning %}
            {{- '<|im_start|>assistant\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}
            {{- content }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for call in message.tool_calls %}
                {%- if call.function %}{%- set call = call.function %}{%- endif %}
                {{- '\n<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
                {%- if call.arguments is string %}{{- call.arguments }}
                {%- else %}{{- call.arguments | tojson }}{%- endif %}
                {{- '}\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + content + '\n</tool_response><|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""

MISTRAL = """{{ bos_token }}{% for m in messages %}
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if m['role'] == 'user' %}
{{ '[INST] ' + m['content'] + ' [/INST]' }}
{% else %}
{{ ' ' + m['content'] + eos_token }}
{% endif %}
{% endfor %}"""

MACROS = """{% macro shown(m, level=1) -%}
{{ '#' * level }} {{ m.role | upper }}: {{ caller() if caller else m.content }}
{%- endmacro %}
{% set kinds = {'user': 'U', 'assistant': 'A'} %}
{% for m in messages if m.role in kinds %}
  {% if loop.index > 3 %}{% break %}{% endif %}
  {% generation %}{{ shown(m, level=loop.index) }}{% endgeneration %}
  {{ kinds.get(m.role, '?') }}{{ loop.cycle('a', 'b') }}{{ '%s:%02d' % (m.role, loop.index) }}
{% else %}nobody{% endfor %}
{{ messages | map(attribute='role') | unique | sort | join(',') }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{ ['b', 'a'] | sort(reverse=true) | first }} {{ 'x<y' | e }} {{ {'a': '<é>'} | tojson | safe }}
{{ '{}-{x}'.format(1, x='y') }} {{ (7 / 2) | round(1) }} {{ 7 // 2 }} {{ 2 ** 10 }} {{ -3 | abs }}
{{ 'one\ntwo' | indent(2) }} {{ 'abc'[::-1] }} {{ [1, 2] + [3] }} {{ none is none }} {{ undefined }}
{% filter upper %}shout{% endfilter %}{% set b %}block{% endset %}{{ b ~ 1 ~ 2.5 }}
"""

CHAT = [
    {"role": "system", "content": "  Be brief.\n"},
    {"role": "user", "content": "Hi <b> & 'you' 你好"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello!"},
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "get", "arguments": {"city": "北京", "n": 3}}}],
    },
    {"role": "tool", "content": "sunny"},
]
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
TOOLS = [{"type": "function", "function": {"name": "get", "parameters": {"x": "<中>"}}}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def by_transformers(source: str, messages: Any, **kwargs: Any) -> str:
    """transformers' own rendering, special tokens included."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    rendered, _ = utils.render_jinja_template(
        conversations=[messages], chat_template=source, **TOKENS, **kwargs
    )
    return rendered[0]


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        (CHATML, CHAT[:4]),
        (LLAMA3, CHAT),
        (LLAMA3, CHAT[1:3]),
        (QWEN3, CHAT),
        (QWEN3, CHAT[:3]),
        (MISTRAL, [*TURNS, *TURNS]),
        (MACROS, CHAT),
        ("{% for c in messages[0].content %}[{{ c }}]{% endfor %}\n", TURNS),
    ],
)
def test_renders_as_transformers_does(source: str, messages: Any) -> None:
    template = ChatTemplate(source, TOKENS)
    for tools in (None, TOOLS):
        for prompt in (True, False):
            for extra in ({}, {"enable_thinking": False}):
                ours = template.render(messages, prompt, tools, **extra)
                assert ours == by_transformers(
                    source, messages, tools=tools, add_generation_prompt=prompt, **extra
                )


def test_real_template_renders_as_transformers_does(real_model: Path) -> None:
    source = GGUFFile.open(real_model).metadata["tokenizer.chat_template"]
    assert isinstance(source, str)
    for messages in (CHAT[:4], CHAT[1:4], TURNS[:1]):
        for prompt in (True, False):
            assert ChatTemplate(source, TOKENS).render(messages, prompt) == by_transformers(
                source, messages, add_generation_prompt=prompt
            )


def test_text_parts() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "user", "content": parts}]
    joined = ChatTemplate(CHATML).render(messages, add_generation_prompt=False)
    assert joined == "<|im_start|>user\none\ntwo<|im_end|>\n"
    reads_parts = (
        "{% for m in messages %}{% for p in m.content %}({{ p.text }}){% endfor %}{% endfor %}"
    )
    assert ChatTemplate(reads_parts).render(messages) == "(one)(two)"


def test_strftime_now_and_reasoning_variables() -> None:
    template = ChatTemplate("{{ strftime_now('%Y') }} {{ effort }}")
    assert template.render(TURNS, effort="high") == f"{time.strftime('%Y')} high"


@pytest.mark.parametrize(
    ("messages", "kind", "words"),
    [
        ("hi", TypeError, "messages must be a list"),
        ({"role": "user", "content": "x"}, TypeError, "messages must be a list"),
        ([], ValueError, "messages is empty"),
        (["hi"], TypeError, r"messages\[0\] must be a dict, not str"),
        ([*TURNS, {"content": "x"}], TypeError, r"messages\[2\]\['role'\].*nothing"),
        ([{"role": 3, "content": "x"}], TypeError, r"messages\[0\]\['role'\].*int"),
        ([{"role": "user"}], ValueError, r"messages\[0\]\['content'\] is missing"),
        ([{"role": "user", "content": 5}], TypeError, r"\['content'\] must be a string.*int"),
        ([{"role": "user", "content": ["x"]}], ValueError, r"\['content'\]\[0\].*only text"),
        ([{"role": "user", "content": [{"type": "image"}]}], ValueError, "only text"),
        ([{"role": "user", "content": [{"type": "text"}]}], TypeError, r"\['text'\]"),
        ([{"role": "user", "content": "x", "extra": {1, 2}}], TypeError, r"\['extra'\] is a set"),
    ],
)
def test_bad_messages_are_named(messages: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        ChatTemplate(CHATML).render(messages)


def test_bad_tools_and_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="tools must be a list"):
        ChatTemplate(CHATML).render(TURNS, tools=[print])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="thing is a builtin"):
        ChatTemplate(CHATML).render(TURNS, thing=print)
    nested: list[Any] = []
    for _ in range(500):
        nested = [nested]
    with pytest.raises(ValueError, match="100 levels"):
        ChatTemplate(CHATML).render([{"role": "user", "content": "x", "extra": nested}])


def test_the_caller_s_messages_are_not_touched() -> None:
    messages = json.loads(json.dumps(CHAT))
    ChatTemplate("{% set messages = [] %}{{ messages }}").render(messages)
    assert messages == CHAT


DOUBLING = (
    "{% set ns = namespace(s=START) %}{% for i in range(70) %}{% set ns.s = STEP %}{% endfor %}"
)


def doubling(start: str, step: str, use: str) -> str:
    return DOUBLING.replace("START", start).replace("STEP", step) + use


BIG = "{% set s = 'a' * 1000000 %}{% for i in range(100000) %}BODY{% endfor %}"
WORK = {
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "nested loops": "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for i in range(99999) %}{% for j in range(99999) if 0 %}{% endfor %}"
    "{% endfor %}",
    "string product": "{{ 'a' * 10**10 }}",
    "list product": "{{ [0] * 10**10 }}",
    "power": "{{ 2 ** 99999999999 }}",
    "tower": "{{ 10**10**10 }}",
    "squares": doubling("3", "ns.s * ns.s", "{{ ns.s }}"),
    "literal": "{{ 0x" + "f" * 10000 + " }}",
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "two-fold macro": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "recursive loop": "{% for i in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "recursive block": "{% block a %}{{ self.a() }}{% endblock %}",
    "doubling by ~": doubling("'ab'", "ns.s ~ ns.s", "{{ ns.s }}"),
    "doubling by +": doubling("'ab'", "ns.s + ns.s", "{{ ns.s }}"),
    "doubling by join": doubling("'ab'", "[ns.s, ns.s] | join", "{{ ns.s }}"),
    "doubling by replace": doubling("'aa'", "ns.s.replace('a', 'aa')", "{{ ns.s }}"),
    "doubling by format": doubling("'ab'", "'%s%s' % (ns.s, ns.s)", "{{ ns.s }}"),
    "doubling by tojson": doubling("'\"'", "ns.s | tojson", "{{ ns.s }}"),
    "graph printed": doubling("[1]", "[ns.s, ns.s]", "{{ ns.s }}"),
    "graph as json": doubling("[1]", "[ns.s, ns.s]", "{{ ns.s | tojson(indent=9) }}"),
    "graphs compared": doubling("[1]", "[ns.s, ns.s]", "{{ ns.s == [ns.s] }}"),
    "graph tested": doubling("[1]", "[ns.s, ns.s]", "{{ ns.s is equalto [ns.s] }}"),
    "graph hashed": doubling("(1,)", "(ns.s, ns.s)", "{{ {}[ns.s] }}"),
    "width by %": "{{ '%999999999d' % 1 }}",
    "width by format": "{{ '{:999999999}'.format(1) }}",
    "width as argument": "{{ '{:{w}}'.format(1, w=999999999) }}",
    "indent": "{{ 'a' | indent(10**10, true) }}",
    "json indent": "{{ [[1]] | tojson(indent=10**10) }}",
    "replace": "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "join": "{{ range(99999) | map('string') | join('x' * 10000) }}",
    "round": "{{ 1.5 | round(10**9, 'ceil') }}",
    "strftime": "{{ strftime_now('%999999999Y') }}",
    "colliding hashes": "{{ range(0, 10**5 * (2**61 - 1), 2**61 - 1) | unique | list }}",
    "search from the right": "{{ ('ab' * 500000).rsplit('b' * 1000) }}",
    "strip": "{{ ('a' * 1000000).strip('b' * 99999 + 'a') }}",
    "slices": BIG.replace("BODY", "{% set x = s[1:] %}"),
    "comparisons": BIG.replace("BODY", "{% if s == s[::1] %}{% endif %}"),
    "splits": BIG.replace("BODY", "{% set x = s.split('a') %}"),
    "sorts": BIG.replace("BODY", "{% set x = s | sort %}"),
    "literal text": "{% for i in range(99999) %}" + "x" * 99999 + "{% endfor %}",
    "captured text": "{% set x %}{% for i in range(99999) %}"
    + "x" * 99999
    + "{% endfor %}{% endset %}",
    "filtered text": "{% filter upper %}{% for i in range(99999) %}" + "x" * 99999 + "{% endfor %}"
    "{% endfilter %}",
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "negations": "{{ " + "not " * 20000 + "1 }}",
    "filters": "{{ 1" + "|abs" * 20000 + " }}",
    "long sum": "{{ 1" + " + 1" * 20000 + " }}",
    "ifs": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "source": "a" * (MAX_SOURCE_CHARS + 1),
}


@pytest.mark.parametrize("case", WORK)
def test_hostile_work_is_stopped(case: str) -> None:
    start = time.perf_counter()
    tracemalloc.start() if case in ("string product", "doubling by +", "splits") else None
    try:
        with pytest.raises(ChatTemplateError):
            ChatTemplate(WORK[case]).render(TURNS)
        peak = tracemalloc.get_traced_memory()[1] if tracemalloc.is_tracing() else 0
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - start < 20  # about 1 s alone on a machine
    assert peak < 200 << 20


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''['__class__'] }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ namespace.__init__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ '{0.__class__}'.format_map({'0': 1}) }}",
        "{{ messages | attr('__class__') }}",
        "{{ messages | map(attribute='__class__') | list }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ messages | map('!spend') | list }}",
        "{{ 'a'.encode() }}",
        "{{ lipsum() }}",
        "{% include 'x' %}",
        "{% import 'x' as y %}",
        "{% extends 'x' %}",
        "{% autoescape true %}{{ 'a' }}{% endautoescape %}",
    ],
)
def test_hostile_access_is_refused(source: str) -> None:
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source).render(TURNS)


def test_a_thread_other_than_the_main_one_is_protected_too() -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            ChatTemplate(WORK["nested loops"]).render(TURNS)
        except ChatTemplateError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert not thread.is_alive() and len(errors) == 1


def test_threads_share_a_template() -> None:
    template = ChatTemplate(QWEN3)
    want = template.render(CHAT, tools=TOOLS)
    got: list[str] = []
    threads = [
        threading.Thread(
            target=lambda: got.extend(template.render(CHAT, tools=TOOLS) for _ in "ab")
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [want] * 16


def test_long_chats_are_within_the_limits() -> None:
    long = [{"role": r, "content": "word " * 2000} for r in ("user", "assistant")] * 200
    assert len(ChatTemplate(QWEN3).render(long)) > 4_000_000


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% for %}", "malformed in line 1"),
        ("\n\n{{ a b }}", "malformed in line 3"),
        ("{{ x | nosuch }}", "nosuch"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ nothing.role }}", "'nothing' is undefined"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ 'a'.ljust(3) }}", "method 'ljust' of str is not available"),
        ("{{ 1() }}", "cannot be called"),
    ],
)
def test_faulty_templates_are_explained(source: str, words: str) -> None:
    with pytest.raises(ChatTemplateError, match=words):
        ChatTemplate(source).render(TURNS)
