"""Byte-level BPE, trained on the user's text, ready for chat.

Text is cut by GPT-4's expression as Qwen uses it (every digit is a token of its own: numbers then
look the same at every length), spelled in bytes, and the most frequent pair of tokens is merged
until the vocabulary is full. There is no normalizer: decoding gives back every text byte for byte.
The same text gives the same tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from fastllm.errors import DataError
from fastllm.models.tokenizer import Tokenizer
from fastllm.models.tokenizer_gguf import PRE_TOKENIZERS

END_OF_TEXT, TURN_START, TURN_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
CONTROL = (END_OF_TEXT, TURN_START, TURN_END, PAD)  # decoding leaves these out
# Tokens of their own that are part of an answer: decoding shows them.
SPANS = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
)  # fmt: skip
SPECIAL = (*CONTROL, *SPANS)
MIN_VOCAB_SIZE = len(SPECIAL) + 256

# Merging inside a word takes the square of its length: 3 MB of one letter took more than a minute.
# Letters of one word, or signs and space, beyond so many begin another text.
_LONGEST_RUN = 1024
_LONG_RUN = re.compile(rf"[^\W\d_]{{{_LONGEST_RUN}}}|[\W_]{{{_LONGEST_RUN}}}")

# ChatML with tools and thoughts. Every message is rendered from itself and what came before it, so
# a conversation's text begins with the text of its beginning, and nothing said is left out later.
CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- 'These functions can be called, one JSON schema a line:\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson + '\\n' }}
    {%- endfor %}
    {{- 'A call is a JSON object with name and arguments between <tool_call> and </tool_call>.' }}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.reasoning_content %}
            {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
        {%- endif %}
        {%- if message.role == 'tool' %}
            {{- '<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- elif message.content %}
            {{- message.content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- set function = call.function or call %}
            {%- if message.content or not loop.first %}
                {{- '\\n' }}
            {%- endif %}
            {{- '<tool_call>\\n{"name": ' + function.name | tojson + ', "arguments": ' }}
            {%- if function.arguments is string %}
                {{- function.arguments }}
            {%- else %}
                {{- function.arguments | tojson }}
            {%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    allow_smaller: bool = False,
    chat_template: str = CHAT_TEMPLATE,
    show_progress: bool = False,
) -> Tokenizer:
    """Train a tokenizer.

    texts: read once, one after the other; a pair must occur twice to be merged, and pairs across
    texts do not count, nor do pairs across each 1,024 letters of a word.
    vocab_size: tokens in all: 256 bytes, the special ones, merges.
    allow_smaller: accept fewer where the text supports no more. show_progress: bars on stderr.
    Raises ValueError for sizes that cannot be: too few for the bytes, too many for the text.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size must be at least {MIN_VOCAB_SIZE} (256 bytes and {len(SPECIAL)} special "
            f"tokens), got {vocab_size}"
        )
    backend: Any = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = PRE_TOKENIZERS["qwen2"].build(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=show_progress,
    )
    backend.train_from_iterator((p for text in texts for p in _pieces(text)), trainer)
    found = backend.get_vocab_size()
    if found < vocab_size and not allow_smaller:
        merges = found - MIN_VOCAB_SIZE
        raise ValueError(
            f"the text gave {merges} merges, enough for a vocabulary of {found} and not of "
            f"{vocab_size}: give more text, --vocab-size {found}, or --allow-smaller"
        )
    return Tokenizer(
        _with_visible_spans(backend),
        # A document begins after the end of the one before it; encoding adds nothing by itself.
        special_tokens={"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": PAD},
        eos_token_ids=[backend.token_to_id(TURN_END)],
        chat_template=chat_template,
    )


def save_tokenizer(
    tokenizer: Tokenizer, directory: str | PathLike[str], *, overwrite: bool = False
) -> None:
    """Write a directory that AutoTokenizer and `Tokenizer.from_hf` read, with the ids that end an
    answer in generation_config.json. Raises DataError if one is there and not `overwrite`."""
    path = Path(directory)
    if (path / "tokenizer.json").exists() and not overwrite:
        remedy = "Give another --out, or --overwrite to replace it"
        raise DataError(path / "tokenizer.json", "", "", "the file is there already", remedy)
    tokenizer.save(path)
    config = {
        "eos_token_id": sorted(tokenizer.eos_token_ids),
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = json.dumps(config, indent=2) + "\n"
    (path / "generation_config.json").write_text(text, encoding="utf-8")


def _pieces(text: str) -> Iterator[str]:
    """The text, cut where a run of letters, or of signs and space, is too long to be a word."""
    start = 0
    # Most texts have no such run, and this look is ten times as fast as the expression.
    if " " * _LONGEST_RUN in text or any(len(w) >= _LONGEST_RUN for w in text.split()):
        for run in _LONG_RUN.finditer(text):
            yield text[start : run.end()]
            start = run.end()
    yield text[start:]


def _with_visible_spans(backend: Any) -> Any:
    """The trainer marks all its special tokens as ones that decoding leaves out."""
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["content"] in CONTROL
    return tokenizers.Tokenizer.from_str(json.dumps(state))
