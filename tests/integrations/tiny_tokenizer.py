"""A tokenizer of ASCII characters for the tiny models: 100 of their 128 tokens, with a template."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0 to 3 are pad, begin, end and unknown, as the tiny models' configs say."""
    letters = [*SPECIAL.values(), "\n", *(chr(c) for c in range(32, 127))]
    vocab = {text: i for i, text in enumerate(letters)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)
    made.chat_template = TEMPLATE
    return made
