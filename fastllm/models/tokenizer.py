"""Text to token ids and back, over the `tokenizers` library.

A tokenizer comes from a Hugging Face directory (`Tokenizer.from_hf`) or from the metadata of a GGUF
file (`Tokenizer.from_gguf`). Both are data: known keys of JSON or GGUF, never code.

Special tokens in text. As in transformers and vLLM, `encode` recognises the model's special tokens
wherever they are spelled in the text, because rendered chat templates spell them. Text that must
not be able to forge a turn boundary is encoded with `parse_special=False`: there "<|im_end|>" is
a row of ordinary characters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import tokenizers

from fastllm.errors import ModelFileError
from fastllm.models.detokenizer import Detokenizer, PieceDecoder, piece_decoder
from fastllm.models.literal_tokens import LiteralTokens, Spans
from fastllm.models.tokenizer_gguf import read_gguf_tokenizer

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
_MAX_JSON_BYTES = 1 << 28  # of tokenizer.json; the largest in use (262k tokens) has 34 MB


class Tokenizer:
    """Encodes and decodes for one model. Immutable once built, safe to share between threads.

    `special_tokens` maps bos_token, eos_token, unk_token, pad_token (those that exist) to their
    text, as chat templates want them. `chat_template` is the template's source or None.
    `eos_token_ids` holds every id that ends an answer: end of sequence, of turn, of message.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        eos_token_ids: Iterable[int] = (),
        chat_template: str | None = None,
        file: str | PathLike[str] = "tokenizer",
    ) -> None:
        self._backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_template = chat_template
        ids = {role: _role_id(backend, self.special_tokens, role, file) for role in _ROLES}
        self.bos_token_id = ids["bos_token"]
        self.eos_token_id = ids["eos_token"]
        self.unk_token_id = ids["unk_token"]
        self.pad_token_id = ids["pad_token"]
        main = () if self.eos_token_id is None else (self.eos_token_id,)
        self.eos_token_ids = frozenset((*eos_token_ids, *main))
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        # What `tokenizers` skips when it decodes it recognises by text, not by id.
        self._special_texts = frozenset(token.content for token in added.values() if token.special)
        decoder = backend.decoder
        config = None if decoder is None else json.loads(decoder.__getstate__())
        self._new_pieces = piece_decoder(config, file)

    @classmethod
    def from_hf(cls, directory: str | PathLike[str]) -> Tokenizer:
        """Read tokenizer.json, and tokenizer_config.json, special_tokens_map.json,
        generation_config.json (ids that end an answer) and chat_template.jinja where they exist.

        Raises ModelFileError, naming the file and the field, if one of them cannot be used.
        """
        path = Path(directory) / "tokenizer.json"
        backend = _read_backend(path)
        config_path = path.with_name("tokenizer_config.json")
        config = _read_json(config_path)
        named = {**_read_json(path.with_name("special_tokens_map.json")), **config}
        tokens = {role: _token_text(named.get(role), role, config_path) for role in _ROLES}
        return cls(
            backend,
            special_tokens={role: text for role, text in tokens.items() if text is not None},
            eos_token_ids=_generation_ends(path.with_name("generation_config.json"), backend),
            chat_template=_hf_chat_template(config_path, config),
            file=path,
        )

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        *,
        file: str | PathLike[str] = "GGUF metadata",
        pre: str | None = None,
    ) -> Tokenizer:
        """Build the byte-level BPE that `tokenizer.ggml.*` describes.

        `pre` replaces `tokenizer.ggml.pre`, which old files lack; `file` is named in errors.
        Raises ModelFileError if a field is missing, inconsistent or of an unsupported kind.
        """
        parts = read_gguf_tokenizer(metadata, file, pre)
        return cls(
            parts.backend,
            special_tokens=parts.special_tokens,
            eos_token_ids=parts.end_ids,
            chat_template=parts.chat_template,
            file=file,
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. A model's embedding may be padded beyond it."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def _literal_backend(self) -> tokenizers.Tokenizer:
        """A twin that reads special tokens in text as text. It shares the vocabulary (no copy);
        switching the one flag on the shared object would race between threads."""
        source = self._backend
        twin = tokenizers.Tokenizer(source.model)
        for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
            value = getattr(source, part)
            if value is not None:
                setattr(twin, part, value)
        added = source.get_added_tokens_decoder()
        twin.add_tokens([added[i] for i in sorted(added)])
        twin.encode_special_tokens = True
        return twin

    def encode(
        self, text: str | bytes, add_special_tokens: bool = True, parse_special: bool = True
    ) -> list[int]:
        """Token ids of `text`; bytes are decoded as strict UTF-8 first.

        add_special_tokens: add the bos/eos that the model wants around a text (a rendered chat
        template already holds them: pass False). parse_special: see the module's docstring.
        Raises TypeError for other types, ValueError for invalid UTF-8 and lone surrogates.
        """
        backend = self._backend if parse_special else self._literal_backend
        return backend.encode(_valid_text(text), add_special_tokens=add_special_tokens).ids

    def encode_batch(
        self,
        texts: Sequence[str | bytes],
        add_special_tokens: bool = True,
        parse_special: bool = True,
    ) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        if isinstance(texts, str | bytes):
            raise TypeError("texts must be a sequence of strings, not one string")
        backend = self._backend if parse_special else self._literal_backend
        valid = [_valid_text(text, f"texts[{i}]") for i, text in enumerate(texts)]
        batch = backend.encode_batch_fast(valid, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in batch]

    def encode_with_offsets(
        self, texts: Sequence[str], literal: Sequence[Spans] | None = None
    ) -> list[tuple[list[int], Any]]:
        """Of each text the ids that `encode(text, add_special_tokens=False)` gives, and where the
        tokens are in it: [(start, end), ...] in characters. Tokens that share the bytes of one
        character share its place; the space before a word is part of the word's token.

        literal: of each text the spans of characters that hold no special tokens, whatever they
        spell; default none."""
        valid = [_valid_text(text, f"texts[{i}]") for i, text in enumerate(texts)]
        batch = self._place_backend.encode_batch(valid, add_special_tokens=False)
        found: list[tuple[list[int], Any]] = [(each.ids, each.offsets) for each in batch]
        for i, spans in enumerate(literal or ()):
            if self._literal_tokens.spelled(valid[i], spans):
                found[i] = self._literal_tokens.encode(valid[i], spans)
        return found

    @cached_property
    def _literal_tokens(self) -> LiteralTokens:
        return LiteralTokens(self._backend)

    @cached_property
    def _place_backend(self) -> tokenizers.Tokenizer:
        """A twin without post-processing: it adds nothing here but may trim spaces off places."""
        if self._backend.post_processor is None:
            return self._backend
        twin = tokenizers.Tokenizer.from_str(self._backend.to_str())
        twin.post_processor = None
        return twin

    @property
    def special_texts(self) -> frozenset[str]:
        """The texts of the control tokens, which `decode` leaves out by default."""
        return self._special_texts

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Bytes that are not valid UTF-8 become U+FFFD; an id that has no token
        (models pad their embeddings) becomes nothing. Raises ValueError for a negative id."""
        known = [i for i in ids if _is_uint32(i)]
        return self._backend.decode(known, skip_special_tokens=skip_special_tokens)

    def detokenizer(self, skip_special_tokens: bool = True) -> Detokenizer:
        """A new incremental decoder whose deltas add up to `decode` of all the pushed ids."""
        return Detokenizer(self, skip_special_tokens)

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's spelling of a token (byte-level alphabet), None if there is none."""
        return self._backend.id_to_token(token_id) if _is_uint32(token_id) else None

    def piece(self, token_id: int, skip_special_tokens: bool = True) -> str | None:
        """`id_to_token`, but None also for a token that decoding leaves out."""
        token = self.id_to_token(token_id)
        return None if skip_special_tokens and token in self._special_texts else token

    def piece_decoder(self) -> PieceDecoder:
        """A fresh decoder of token spellings, for one answer."""
        return self._new_pieces()

    def token_to_id(self, token: str) -> int | None:
        """The id of a token in the vocabulary's spelling, None if there is none."""
        return self._backend.token_to_id(token)

    def is_special(self, token_id: int) -> bool:
        """Whether the id is a control token, which `decode` leaves out by default."""
        return token_id in self._special_ids

    def to_json(self) -> str:
        """The contents of tokenizer.json: what another process needs to encode the same way."""
        return self._backend.to_str(pretty=False)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of `to_json`: equal for tokenizers that give equal ids."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def save(self, directory: str | PathLike[str]) -> None:
        """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and, if there is
        a template, chat_template.jinja: a directory that AutoTokenizer.from_pretrained reads.

        `eos_token_ids` beyond eos_token belong to generation_config.json, written with the model.
        """
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self.special_tokens,
        }
        _write(path / "tokenizer.json", self.to_json())
        _write(path / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2))
        _write(
            path / "special_tokens_map.json",
            json.dumps(self.special_tokens, ensure_ascii=False, indent=2),
        )
        if self.chat_template is not None:
            _write(path / "chat_template.jinja", self.chat_template)


def _is_uint32(token_id: int) -> bool:
    """Whether the library can look the id up; negative ids are errors of the caller."""
    if token_id < 0:
        raise ValueError(f"token ids must not be negative, got {token_id}")
    return token_id < 1 << 32


def _role_id(
    backend: tokenizers.Tokenizer, tokens: Mapping[str, str], role: str, file: str | PathLike[str]
) -> int | None:
    if role not in tokens:
        return None
    token_id = backend.token_to_id(tokens[role])
    if token_id is None:
        raise ModelFileError(
            file, role, f"{tokens[role]!r} is not in the vocabulary", "Correct its spelling"
        )
    return token_id


def _valid_text(text: str | bytes, name: str = "text") -> str:
    """The text as a str that the library can take; it wants valid Unicode."""
    if isinstance(text, bytes):
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name} is not valid UTF-8: byte {text[error.start]:#04x} at offset "
                f"{error.start}; decode it first, for example with errors='replace'"
            ) from error
    if not isinstance(text, str):
        raise TypeError(f"{name} must be str or bytes, not {type(text).__name__}")
    if not text.isascii():  # O(1): CPython stores it
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name} holds the lone surrogate {text[error.start]!r} at index {error.start}, "
                "which is not a Unicode character; remove it, for example by "
                "text.encode('utf-8', 'replace').decode()"
            ) from error
    return text


class _LibraryErrors:
    """Turns what `tokenizers` raises while it parses a file into ModelFileError.

    It raises bare Exception, and PanicException (a BaseException) for states its authors did not
    expect, so there is no narrower class to name in an `except` clause.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is Exception or (kind is not None and kind.__name__ == "PanicException"):
            remedy = "Save the tokenizer again with a current `tokenizers`"
            raise ModelFileError(self.path, "", f"not a tokenizer: {error}", remedy) from error


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        remedy = "Save the model's fast tokenizer there (AutoTokenizer.save_pretrained)"
        raise ModelFileError(path, "", "the file does not exist", remedy)
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ModelFileError(path, "", f"larger than {_MAX_JSON_BYTES >> 20} MiB")
    with _LibraryErrors(path):
        backend = tokenizers.Tokenizer.from_file(str(path))
    backend.no_padding()
    backend.no_truncation()
    return backend


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} if there is no such file."""
    if not path.is_file():
        return {}
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ModelFileError(path, "", f"larger than {_MAX_JSON_BYTES >> 20} MiB")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelFileError(path, "", f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelFileError(path, "", f"holds a JSON {type(value).__name__}, not an object")
    return value


def _token_text(value: object, role: str, path: Path) -> str | None:
    """A token is written as a string or as {"content": string, ...}."""
    if isinstance(value, dict):
        value = value.get("content")
    if value is None or isinstance(value, str):
        return value
    raise ModelFileError(path, role, f"is a {type(value).__name__}, not a string")


def _generation_ends(path: Path, backend: tokenizers.Tokenizer) -> list[int]:
    value = _read_json(path).get("eos_token_id")
    ends = [] if value is None else value if isinstance(value, list) else [value]
    for end in ends:
        if not isinstance(end, int) or isinstance(end, bool) or end < 0:
            raise ModelFileError(path, "eos_token_id", f"{end!r} is not a token id")
    return ends


def _hf_chat_template(config_path: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else the config's chat_template: a string or named templates, of which
    "default" is the one for chat."""
    file = config_path.with_name("chat_template.jinja")
    if file.is_file():
        try:
            return file.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelFileError(file, "", f"not valid UTF-8: {error}") from error
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
        value = named.get("default")
    if value is None or isinstance(value, str):
        return value
    raise ModelFileError(config_path, "chat_template", f"is a {type(value).__name__}, not a string")


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
