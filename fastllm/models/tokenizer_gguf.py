"""The tokenizer inside a GGUF file: byte-level BPE from `tokenizer.ggml.*` metadata.

GGUF stores tokens, types and merges, and names the pre-tokenizer instead of storing it. The table
below gives, for each name, the expression that the model's own tokenizer.json splits text with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike, fspath
from typing import Any, TypeVar

import tokenizers
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from fastllm.errors import ModelFileError

_PREFIX = "tokenizer.ggml."
_CONTROL, _USER_DEFINED = 3, 4  # GGUF's token types: 1 normal, 2 unknown, 5 unused, 6 byte
_ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_END_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_T = TypeVar("_T")

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _cl100k(digits: str) -> str:
    """The family of GPT-4's expression: Llama 3 groups 3 digits, Qwen splits every digit."""
    return (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|"
        + _TAIL
    )


_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _TAIL
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreTokenizer:
    """How text is cut before BPE. `pattern` None means GPT-2's expression, built into ByteLevel.

    `ignore_merges`: a piece that is a token as a whole becomes it, whatever the merges say.
    `add_bos`: whether files of this kind that do not say so want a beginning-of-sequence token.
    """

    pattern: str | None = None
    digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def build(self, add_prefix_space: bool) -> pre_tokenizers.PreTokenizer:
        steps: list[pre_tokenizers.PreTokenizer] = []
        if self.digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        if self.pattern is not None:
            steps.append(pre_tokenizers.Split(Regex(self.pattern), behavior="isolated"))
        steps.append(
            pre_tokenizers.ByteLevel(
                add_prefix_space=add_prefix_space, use_regex=self.pattern is None
            )
        )
        return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


_GPT2 = PreTokenizer()
_QWEN2 = PreTokenizer(pattern=_cl100k(r"\p{N}"), nfc=True)
_LLAMA3 = PreTokenizer(pattern=_cl100k(r"\p{N}{1,3}"), ignore_merges=True, add_bos=True)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": PreTokenizer(digits=True),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    # Qwen's expression without its normalizer, which llama.cpp applies under no name: so are
    # tokenizers written whose text is to come back byte for byte.
    "stablelm2": replace(_QWEN2, nfc=False),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "tekken": PreTokenizer(pattern=_TEKKEN, ignore_merges=True, add_bos=True),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class GGUFTokenizer:
    """What the metadata yields: the backend, the text of each role, ids that end an answer."""

    backend: tokenizers.Tokenizer
    special_tokens: dict[str, str]
    end_ids: frozenset[int]
    chat_template: str | None


class _Fields:
    """Typed access to `tokenizer.ggml.*`, with errors that name the file and the field."""

    def __init__(self, metadata: Mapping[str, Any], file: str | PathLike[str]) -> None:
        self.metadata = metadata
        self.file = fspath(file)

    def error(self, name: str, problem: str, remedy: str = "") -> ModelFileError:
        return ModelFileError(self.file, _PREFIX + name, problem, remedy)

    def optional(self, name: str, kind: type[_T]) -> _T | None:
        value = self.metadata.get(_PREFIX + name)
        if value is None:
            return None
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(name, f"is a {type(value).__name__}, not a {kind.__name__}")
        return value

    def required(self, name: str, kind: type[_T], remedy: str) -> _T:
        value = self.optional(name, kind)
        if value is None:
            raise self.error(name, "is missing", remedy)
        return value

    def sequence(self, name: str) -> Sequence[Any]:
        value = self.metadata.get(_PREFIX + name)
        if value is None:
            raise self.error(name, "is missing", "Convert the model to GGUF again")
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise self.error(name, f"is a {type(value).__name__}, not an array")
        return value

    def array(self, name: str, kind: type[_T]) -> list[_T]:
        """The whole array as a list of `kind`; every element's type is checked."""
        items = list(self.sequence(name))
        wrong = sorted(found.__name__ for found in set(map(type, items)) - {kind})
        if wrong:
            raise self.error(name, f"holds {', '.join(wrong)} where {kind.__name__} is expected")
        return items

    def token_id(self, name: str, vocab_size: int) -> int | None:
        value = self.optional(name, int)
        if value is not None and not 0 <= value < vocab_size:
            raise self.error(name, f"is {value}, outside the vocabulary of {vocab_size} tokens")
        return value


def read_gguf_tokenizer(
    metadata: Mapping[str, Any], file: str | PathLike[str], pre: str | None = None
) -> GGUFTokenizer:
    """Build the tokenizer that `metadata` describes; `pre` overrides `tokenizer.ggml.pre`.

    Raises ModelFileError if a field is missing, inconsistent or of a kind that is not supported.
    """
    fields = _Fields(metadata, file)
    recipe = _recipe(fields, pre)
    tokens = fields.array("tokens", str)
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocab[token] != i)
        raise fields.error("tokens", f"holds {twice!r} twice", "Convert the model to GGUF again")
    model = _bpe(fields, vocab, recipe.ignore_merges)
    del vocab
    backend = tokenizers.Tokenizer(model)
    if recipe.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = recipe.build(bool(fields.optional("add_space_prefix", bool)))
    backend.decoder = decoders.ByteLevel()
    _add_special_tokens(fields, backend, tokens)
    ids = {role: fields.token_id(name, len(tokens)) for role, name in _ROLES.items()}
    roles = {role: tokens[i] for role, i in ids.items() if i is not None}
    _add_post_processor(fields, backend, recipe, roles)
    ends = (fields.token_id(name, len(tokens)) for name in _END_IDS)
    return GGUFTokenizer(
        backend=backend,
        special_tokens=roles,
        end_ids=frozenset(i for i in ends if i is not None),
        chat_template=_chat_template(fields),
    )


def _recipe(fields: _Fields, pre: str | None) -> PreTokenizer:
    elsewhere = "Load the model from its Hugging Face directory, whose tokenizer.json is read"
    kind = fields.required("model", str, elsewhere)
    if kind != "gpt2":
        raise fields.error(
            "model", f"is {kind!r}; only 'gpt2' (byte-level BPE) is supported", elsewhere
        )
    known = ", ".join(PRE_TOKENIZERS)
    if pre is None:
        pre = fields.required(
            "pre", str, f"Convert the model to GGUF again, or pass pre=, one of: {known}"
        )
    elif pre not in PRE_TOKENIZERS:
        raise ValueError(f"pre={pre!r} is not a known pre-tokenizer; known: {known}")
    if pre not in PRE_TOKENIZERS:
        raise fields.error("pre", f"pre-tokenizer {pre!r} is not known ({known})", elsewhere)
    return PRE_TOKENIZERS[pre]


class _Merges(Sequence[tuple[str, str]]):
    """The merge rules as pairs, made while BPE() reads them: a list of them costs 7 MB, and its
    49,000 tuples two passes of the garbage collector over everything that torch has loaded."""

    def __init__(self, fields: _Fields, vocab: Mapping[str, int]) -> None:
        self._fields, self._vocab = fields, vocab
        self._rules = fields.sequence("merges")
        self.error: ModelFileError | None = None  # the library reports its own TypeError instead

    def __len__(self) -> int:
        return len(self._rules)

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        vocab = self._vocab
        for rule in self._rules:
            left, _, right = rule.partition(" ") if type(rule) is str else ("", "", "")
            if left not in vocab or right not in vocab or left + right not in vocab:
                self.error = self._fields.error(
                    "merges",
                    f"rule {rule!r} uses a token that the vocabulary lacks",
                    "Convert the model to GGUF again",
                )
                raise self.error
            yield left, right


def _bpe(fields: _Fields, vocab: dict[str, int], ignore_merges: bool) -> models.BPE:
    """Of the ways into the library BPE(vocab, merges) is the fastest and leanest: 49,152 tokens and
    48,900 merges take 36 ms and 14 MB at the peak; the same as JSON text, 70 ms and 21 MB."""
    merges = _Merges(fields, vocab)
    try:
        return models.BPE(vocab, merges, ignore_merges=ignore_merges)
    except (TypeError, ModelFileError):
        if merges.error is not None:
            raise merges.error from None
        raise


def _add_special_tokens(fields: _Fields, backend: tokenizers.Tokenizer, tokens: list[str]) -> None:
    types = fields.array("token_type", int)
    if len(types) != len(tokens):
        raise fields.error(
            "token_type",
            f"has {len(types)} elements for {len(tokens)} tokens",
            "Convert the model to GGUF again",
        )
    added = [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if token and kind in (_CONTROL, _USER_DEFINED)
    ]
    backend.add_tokens(added)


def _add_post_processor(
    fields: _Fields, backend: tokenizers.Tokenizer, recipe: PreTokenizer, roles: dict[str, str]
) -> None:
    add_bos = fields.optional("add_bos_token", bool)
    if add_bos is None:
        add_bos = recipe.add_bos and "bos_token" in roles
    add_eos = bool(fields.optional("add_eos_token", bool))
    wanted = {"bos_token": add_bos, "eos_token": add_eos}
    for role, on in wanted.items():
        if on and role not in roles:
            raise fields.error(f"add_{role}", f"is true but {_PREFIX}{role}_id is missing")
    steps: list[Any] = [processors.ByteLevel(trim_offsets=False)]
    if add_bos or add_eos:
        steps.append(bos_eos_template(backend, roles, bool(add_bos), add_eos))
    backend.post_processor = steps[0] if len(steps) == 1 else processors.Sequence(steps)


def bos_eos_template(
    backend: tokenizers.Tokenizer, roles: Mapping[str, str], add_bos: bool, add_eos: bool
) -> processors.TemplateProcessing:
    """The post-processor that puts bos before, and eos after, each encoded text."""
    head = [roles["bos_token"]] if add_bos else []
    tail = [roles["eos_token"]] if add_eos else []
    return processors.TemplateProcessing(
        single=[*head, "$A", *tail],
        pair=[*head, "$A", *tail, *(f"{t}:1" for t in head), "$B:1", *(f"{t}:1" for t in tail)],
        special_tokens=[(text, backend.token_to_id(text)) for text in {*head, *tail}],
    )


def _chat_template(fields: _Fields) -> str | None:
    template = fields.metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise ModelFileError(
            fields.file, "tokenizer.chat_template", f"is a {type(template).__name__}, not a string"
        )
    return template
