"""Masks: what is learned, decoded, is the assistant's words and its end token, nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm.errors import DataError
from fastllm.models.chat_template import CHATML
from fastllm.models.gguf import GGUFFile
from fastllm.models.tokenizer import Tokenizer
from fastllm.train.data.conversations import Conversation, parse_record
from fastllm.train.data.masks import PLAIN, ConversationEncoder, Example

LLAMA3 = """{{- bos_token }}{%- for message in messages %}
    {%- if message.tool_calls %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
        {{- '<|python_tag|>{"name": "' + message.tool_calls[0].function.name + '", ' }}
        {{- '"parameters": ' + message.tool_calls[0].function.arguments | tojson + '}<|eom_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
        {{- message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
MISTRAL = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}
{{- '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}
{%- endfor %}"""
GEMMA = """{{ bos_token }}{% for m in messages %}
{%- set role = 'model' if m.role == 'assistant' else m.role %}
{{- '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
PHI3 = """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
DEEPSEEK = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}
{{- '<\uff5cUser\uff5c>' + m.content }}{% elif m.role == 'assistant' %}
{{- '<\uff5cAssistant\uff5c>' + m.content + eos_token }}
{%- else %}{{ m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c>' }}{% endif %}"""
# The thinking of a turn is written, empty too, while no question of the user follows it.
QWEN3 = """{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last and (loop.last or m.reasoning_content) %}
            {{- '<think>\n' + (m.reasoning_content or '').strip('\n') + '\n</think>\n\n' }}
        {%- endif %}
        {{- m.content }}
        {%- for call in m.tool_calls or [] %}
            {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
R1 = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}
{{- '<\uff5cUser\uff5c>' + m.content }}
{%- else %}{{ '<\uff5cAssistant\uff5c>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c><think>\n' }}{% endif %}"""
SMOLLM2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# template -> what comes before an answer's words, after them
STYLES = {
    "chatml": (CHATML, "", "<|im_end|>"),
    "smollm2": (SMOLLM2, "", "<|im_end|>"),
    "llama3": (LLAMA3, "", "<|eot_id|>"),
    "mistral": (MISTRAL, " ", "</s>"),
    "gemma": (GEMMA, "", "<end_of_turn>"),
    "phi3": (PHI3, "", "<|end|>"),
    "deepseek": (DEEPSEEK, "", "</s>"),
    "qwen3": (QWEN3, "", "<|im_end|>"),
    "plain": (PLAIN, "", "</s>"),
}
SPECIAL = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>",
    "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "<|end|>",
    "<|user|>", "<|assistant|>", "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "[INST]",
    "[/INST]",
]  # fmt: skip
WORDS = ["Hello there, friend!", "It's 12.5 °C in 北京 🎉.", "a\n\n- b\n", "x"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Byte-level BPE with some merges and the special tokens of all styles."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    # As many published tokenizers have it: places without the space before a word.
    backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator([*WORDS * 5, QWEN3, "user assistant model system\n\n"], trainer)
    roles = {"bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(backend, special_tokens=roles)


def chat(*texts: str, system: str = "") -> Conversation:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    head = [{"role": "system", "content": system}] if system else []
    return parse_record({"messages": [*head, *messages]}, "messages", "data.jsonl", "line 7")


def learned(tokenizer: Tokenizer, example: Example) -> list[str]:
    """The runs of learned tokens, decoded."""
    runs: list[list[int]] = []
    before = False
    for token, trained in zip(example.ids.tolist(), example.trained.tolist(), strict=True):
        if trained:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
        before = trained
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


def whole(tokenizer: Tokenizer, example: Example) -> str:
    return tokenizer.decode(example.ids.tolist(), skip_special_tokens=False)


@pytest.mark.parametrize("style", STYLES)
def test_learned_tokens_are_the_answers_and_their_end_tokens(
    tokenizer: Tokenizer, style: str
) -> None:
    template, before, after = STYLES[style]
    encoder = ConversationEncoder(tokenizer, template)
    answers = [WORDS[0], WORDS[1], "x"]
    conversation = chat("Hi " + WORDS[1], answers[0], "More?", answers[1], WORDS[0], answers[2])
    examples = list(encoder.encode([conversation]))
    runs = [run for example in examples for run in learned(tokenizer, example)]
    assert runs == [before + answer + after for answer in answers]
    assert len(examples) == (3 if style == "qwen3" else 1)
    for example in examples:
        text = whole(tokenizer, example)
        assert example.ids.tolist() == tokenizer.encode(text, add_special_tokens=False)
        assert example.place == "data.jsonl: line 7"
        assert text.endswith(after)


@given(
    texts=st.lists(st.text(min_size=1, max_size=12), min_size=2, max_size=6),
    style=st.sampled_from(sorted({*STYLES} - {"llama3", "gemma"})),  # these two trim
)
@settings(max_examples=60, deadline=None)
def test_any_text_is_learned_as_it_is(tokenizer: Tokenizer, texts: list[str], style: str) -> None:
    template, before, after = STYLES[style]
    conversation = chat(*texts[: len(texts) // 2 * 2])
    examples = ConversationEncoder(tokenizer, template).encode([conversation])
    runs = [run for example in examples for run in learned(tokenizer, example)]
    assert runs == [before + text + after for text in texts[1 : len(texts) // 2 * 2 : 2]]


def test_each_turn_is_learned_after_the_prompt_that_generation_gives(
    tokenizer: Tokenizer,
) -> None:
    """Also where a template drops the thinking of earlier turns: these become their own documents,
    and turns whose past no later turn rewrites share one."""
    call = {"function": {"name": "get", "arguments": {"city": "北京"}}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello", "reasoning_content": "greet"},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "reasoning_content": "ask", "tool_calls": [call]},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "Sunny.", "reasoning_content": "so it is"},
    ]
    conversation = parse_record({"messages": messages}, "messages")
    encoder = ConversationEncoder(tokenizer, QWEN3)
    first, second = encoder.encode([conversation])
    assert learned(tokenizer, first) == ["<think>\ngreet\n</think>\n\nHello<|im_end|>"]
    assert learned(tokenizer, second) == [
        '<think>\nask\n</think>\n\n\n<tool_call>\n{"name": "get", "arguments": {"city": "北京"}}\n'
        "</tool_call><|im_end|>",
        "<think>\nso it is\n</think>\n\nSunny.<|im_end|>",
    ]
    assert "greet" not in whole(tokenizer, second)
    prompts = [encoder.template.render(messages[:turn]) for turn in (1, 3, 5)]
    for document, prompt in zip((first, second, second), prompts, strict=True):
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        assert document.ids[: len(ids)].tolist() == ids
        assert document.trained[len(ids)] and not document.trained[len(ids) - 1]


def test_empty_thoughts_belong_to_the_prompt_unless_asked_for(tokenizer: Tokenizer) -> None:
    conversation = chat("Hi", "Hello")
    (example,) = ConversationEncoder(tokenizer, QWEN3).encode([conversation])
    assert learned(tokenizer, example) == ["Hello<|im_end|>"]
    assert "<think>\n\n</think>\n\nHello" in whole(tokenizer, example)
    thinking = ConversationEncoder(tokenizer, QWEN3, variables={"enable_thinking": True})
    (example,) = thinking.encode([conversation])
    assert learned(tokenizer, example) == ["<think>\n\n</think>\n\nHello<|im_end|>"]


def test_only_the_answers_asked_for_are_learned(tokenizer: Tokenizer) -> None:
    turns = [*chat("a", "first", "b", "second").messages]
    prompt = parse_record({"prompt": turns[:3], "completion": "second"}, "prompt")
    weighted = parse_record({"messages": [turns[0], {**turns[1], "weight": 0}, *turns[2:]]},
                            "messages")  # fmt: skip
    for conversation in (prompt, weighted):
        (example,) = ConversationEncoder(tokenizer, CHATML).encode([conversation])
        assert learned(tokenizer, example) == ["second<|im_end|>"]
        assert "first" in whole(tokenizer, example)


def test_the_first_words_of_a_conversation_are_not_an_answer(tokenizer: Tokenizer) -> None:
    greeted = [{"role": "assistant", "content": "Welcome"}, *chat("Hi", "Hello").messages]
    conversation = parse_record({"messages": greeted}, "messages")
    (example,) = ConversationEncoder(tokenizer, CHATML).encode([conversation])
    assert learned(tokenizer, example) == ["Hello<|im_end|>"]


def test_targets_are_the_next_tokens_that_are_learned(tokenizer: Tokenizer) -> None:
    (example,) = ConversationEncoder(tokenizer, CHATML).encode([chat("Hi", "Hello")])
    targets = example.targets()
    assert targets[-1] == -100
    assert [t for t in targets.tolist() if t != -100] == example.ids[example.trained].tolist()


def test_loss_on_all_learns_every_token_but_the_first(tokenizer: Tokenizer) -> None:
    conversation = chat("Hi", "Hello", "More?", "Yes")
    (example,) = ConversationEncoder(tokenizer, CHATML, loss="all").encode([conversation])
    assert example.trained[1:].all() and not example.trained[0]
    assert whole(tokenizer, example) == encoder_text(CHATML, conversation)
    with pytest.raises(ValueError, match="loss must be one of assistant, all, got 'none'"):
        ConversationEncoder(tokenizer, CHATML, loss="none")


def encoder_text(template: str, conversation: Conversation) -> str:
    from fastllm.models.chat_template import ChatTemplate

    return ChatTemplate(template).render(conversation.messages, add_generation_prompt=False)


@pytest.mark.parametrize(
    ("template", "conversation", "words"),
    [
        (CHATML, chat("only a question"), "no message of it is an assistant's answer"),
        (R1, chat("a", "<think>\nhm\n</think>\n\nb"), r"messages\[1\]: .*<think>.*not lead to"),
        (R1, chat("a", "b"), r"messages\[1\]: the chat template asks for it with"),
        (
            "{% for m in messages %}{{ m.content }}\n{% endfor %}",
            chat("a", "b"),
            r"messages\[1\]: the chat template ends it with .*would never stop",
        ),
        (
            "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}",
            chat("a", "b"),
            r"messages\[1\]: .*no generation prompt, yet writes 'assistant: ' before it",
        ),
        (
            MISTRAL.replace("{% else %}", "{% elif false %}", 1),
            chat("a", "b"),
            r"messages\[1\]: the chat template ends it with",
        ),
        (
            CHATML,
            parse_record(
                {"messages": [*chat("a").messages,
                              {"role": "assistant", "content": "b", "reasoning_content": "hm"}]},
                "messages", "data.jsonl", "line 7",
            ),
            r"messages\[1\].reasoning_content: the chat template leaves it out",
        ),
        (
            CHATML,
            parse_record(
                {"messages": [*chat("a").messages,
                              {"role": "assistant", "tool_calls": [{"name": "f"}]}]},
                "messages", "data.jsonl", "line 7",
            ),
            r"messages\[1\].tool_calls: the chat template leaves it out",
        ),
        ("{{ raise_exception('roles!') }}", chat("a", "b"), "cannot be rendered.*roles!"),
        (CHATML, chat("a", "\ud83d"), r"holds the lone surrogate '\\ud83d'"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_is_named(
    tokenizer: Tokenizer, template: str, conversation: Conversation, words: str
) -> None:
    good = chat("a", "b")
    with pytest.raises(DataError, match=words) as raised:
        list(ConversationEncoder(tokenizer, template).encode([good, conversation]))
    assert str(raised.value).startswith("data.jsonl: line 7")


def test_llama3_tool_calls_are_learned_as_the_template_writes_them(tokenizer: Tokenizer) -> None:
    call = {"name": "get", "arguments": json.dumps({"n": 1})}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": " One. "},
    ]
    conversation = parse_record({"messages": messages}, "messages")
    (example,) = ConversationEncoder(tokenizer, LLAMA3).encode([conversation])
    assert learned(tokenizer, example) == [
        '<|python_tag|>{"name": "get", "parameters": {"n": 1}}<|eom_id|>', "One.<|eot_id|>",
    ]  # fmt: skip


def test_real_model_learns_its_answers(real_model: Path) -> None:
    tokenizer = Tokenizer.from_gguf(GGUFFile.open(real_model).metadata)
    conversation = chat(*WORDS, system="Be brief.")
    (example,) = ConversationEncoder(tokenizer).encode([conversation])
    assert learned(tokenizer, example) == [WORDS[1] + "<|im_end|>", WORDS[3] + "<|im_end|>"]
