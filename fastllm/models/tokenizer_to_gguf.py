"""The `tokenizer.ggml.*` metadata of a GGUF file from a tokenizer: the inverse of tokenizer_gguf.

GGUF holds tokens, types and merges of a byte-level BPE, and names the expression that cuts text
before: a tokenizer whose expression has no name there cannot be written.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from fastllm.models.tokenizer import Tokenizer
from fastllm.models.tokenizer_gguf import PRE_TOKENIZERS

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
# "default" names another expression in llama.cpp than in files that say it, so it is never written
_NAMES = tuple(name for name in PRE_TOKENIZERS if name != "default")
_MAX_ENDS = 3  # end of sequence, of turn, of message


def tokenizer_metadata(
    tokenizer: Tokenizer, vocab_size: int, end_ids: tuple[int, ...] = ()
) -> dict[str, object]:
    """Metadata of a tokenizer and its chat template.

    Args:
        tokenizer: a byte-level BPE.
        vocab_size: rows of the model's embedding; those without a token become unused tokens.
        end_ids: further ids that end an answer, such as those of the model's configuration.

    Raises:
        ValueError: if the format cannot express the tokenizer, saying what it is about.
    """
    parts = json.loads(tokenizer.to_json())
    model = parts["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise ValueError(
            f"the tokenizer's model is {model['type']}, and only byte-level BPE can be written to "
            "GGUF: use a tokenizer of `fastllm tokenizer train`, GPT-2's, Llama 3's or Qwen's kind"
        )
    name, prefix_space = _pre_tokenizer(parts)
    tokens, types = _tokens(parts, vocab_size)
    metadata: dict[str, object] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32),  # llama.cpp takes no other type
        "tokenizer.ggml.merges": [
            rule if isinstance(rule, str) else " ".join(rule) for rule in model["merges"]
        ],
        "tokenizer.ggml.add_space_prefix": prefix_space,
    }
    metadata |= {f"tokenizer.ggml.{k}": v for k, v in _special_ids(tokenizer, end_ids).items()}
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata


def _pre_tokenizer(parts: dict[str, Any]) -> tuple[str, bool]:
    """The name of how text is cut, and whether a space is put before it."""
    steps = _steps(parts["pre_tokenizer"])
    nfc = parts["normalizer"] is not None
    if nfc and (parts["normalizer"] or {}).get("type") != "NFC":
        raise ValueError(
            f"the tokenizer's normalizer {parts['normalizer'].get('type')!r} has no GGUF form: "
            "only NFC has"
        )
    ignore_merges = bool(parts["model"].get("ignore_merges"))
    for prefix_space in (False, True):
        for name in _NAMES:
            recipe = PRE_TOKENIZERS[name]
            built = json.loads(recipe.build(prefix_space).__getstate__())
            same = (recipe.nfc, recipe.ignore_merges) == (nfc, ignore_merges)
            if same and _steps(built) == steps:
                return name, prefix_space
    raise ValueError(
        "the way the tokenizer cuts text before BPE has no name in GGUF; these have: "
        f"{', '.join(_NAMES)}"
    )


def _steps(value: dict[str, Any] | None) -> list[tuple[Any, ...]]:
    """What a pre-tokenizer does to text, without what only concerns offsets."""
    if value is None:
        return []
    kind = value["type"]
    if kind == "Sequence":
        return [step for part in value["pretokenizers"] for step in _steps(part)]
    if kind == "ByteLevel":
        return [(kind, value["add_prefix_space"], value.get("use_regex", True))]
    if kind == "Digits":
        return [(kind, value["individual_digits"])]
    if kind == "Split":
        return [(kind, json.dumps(value["pattern"]), value["behavior"], value["invert"])]
    return [(kind, json.dumps(value))]


def _tokens(parts: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """The text and the type of every id below vocab_size."""
    found = {i: (token, _NORMAL) for token, i in parts["model"]["vocab"].items()}
    for added in parts["added_tokens"]:
        found[added["id"]] = (added["content"], _CONTROL if added["special"] else _USER_DEFINED)
    highest = max(found, default=-1)
    if highest >= vocab_size:
        raise ValueError(
            f"the tokenizer has {highest + 1} tokens, the model's embedding {vocab_size} rows: "
            "the tokenizer belongs to another model"
        )
    rows = [found.get(i, (f"[unused {i}]", _UNUSED)) for i in range(vocab_size)]
    return [text for text, _ in rows], [kind for _, kind in rows]


def _special_ids(tokenizer: Tokenizer, end_ids: tuple[int, ...]) -> dict[str, object]:
    roles = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "unknown_token_id": tokenizer.unk_token_id,
        "padding_token_id": tokenizer.pad_token_id,
    }
    known: dict[str, object] = {name: i for name, i in roles.items() if i is not None}
    ends = list(dict.fromkeys([*sorted(tokenizer.eos_token_ids), *end_ids]))
    if tokenizer.eos_token_id is not None:
        ends.remove(tokenizer.eos_token_id)
        ends.insert(0, tokenizer.eos_token_id)
    if len(ends) > _MAX_ENDS:
        raise ValueError(f"{len(ends)} ids end an answer ({ends}); GGUF has keys for {_MAX_ENDS}")
    known |= dict(zip(("eos_token_id", "eot_token_id", "eom_token_id"), ends, strict=False))
    plain = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    at = whole.index(plain[0]) if plain and plain[0] in whole else 0
    head, tail = whole[:at], whole[at + len(plain) :]
    for around, role in ((head, "bos_token_id"), (tail, "eos_token_id")):
        if around and around != [known.get(role)]:
            raise ValueError(
                f"the tokenizer puts the ids {around} around a text; GGUF can say that of "
                "one beginning-of-sequence and one end-of-sequence token alone"
            )
    return known | {"add_bos_token": bool(head), "add_eos_token": bool(tail)}
