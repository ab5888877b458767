"""What a student is distilled on: conversations, texts, or a token store, as examples.

A text becomes documents as pretraining has them (a start token that is only read, its tokens, an
end token), cut into pieces of `seq_len` places: a piece is read from position 0, as if it were a
document of its own, by teacher and student alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

import numpy as np
from numpy.typing import NDArray

from fastllm.errors import DataError
from fastllm.models.tokenizer import Tokenizer
from fastllm.train.data.conversations import data_files
from fastllm.train.data.masks import Example
from fastllm.train.data.order import permutation
from fastllm.train.data.prepare import vocabulary_of
from fastllm.train.data.records import is_record_file, read_records
from fastllm.train.data.sources import Reader, SourceOptions
from fastllm.train.data.store import INDEX, TokenStore
from fastllm.train.epochs import held_out_count
from fastllm.train.tasks import is_task

Kind = Literal["text", "conversations", "store"]
MAX_HELD_OUT = 64  # pieces of text: some ten thousand tokens
_TURNS = ("messages", "conversations", "conversation")
_CONVERSATION_FIELDS = (*_TURNS, "prompt", "instruction", "question", "problem")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextData:
    """Pieces to train on and to evaluate on, and what to say of them."""

    train: Sequence[Example]
    held_out: Sequence[Example]
    lines: tuple[str, ...]


def kind_of(path: str) -> Kind:
    """What a file or folder holds, judged by its name and its first record.

    Raises FileNotFoundError.
    """
    place = Path(path)
    if place.is_dir():
        if (place / INDEX).is_file():
            return "store"
        inside = sorted(p for p in place.iterdir() if p.is_file() and is_record_file(p))
        return kind_of(str(inside[0])) if inside else "text"
    if not place.is_file():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    if not is_record_file(place):
        return "text"
    record = next((record for _, record in read_records(place)), {})
    chat = any(name in record for name in _CONVERSATION_FIELDS)
    return "text" if "text" in record and not chat else "conversations"


def kind_of_all(paths: Sequence[str]) -> Kind:
    """The one kind of all of them. Raises ValueError if they differ."""
    kinds = {path: kind_of(path) for path in paths}
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{path} ({kind})" for path, kind in kinds.items())
        raise ValueError(f"data must be of one kind, got {listed}")
    if len(paths) > 1 and "store" in kinds.values():
        raise ValueError("data must be one token store, or files")
    return next(iter(kinds.values()))


def are_prompts(paths: Sequence[str]) -> bool:
    """Whether tasks are among them, or files whose first record is a prompt without an answer of
    the assistant's. Raises FileNotFoundError."""
    if any(is_task(path) and not Path(path).exists() for path in paths):
        return True
    if kind_of_all(paths) != "conversations":
        return False
    _, record = next(read_records(data_files(paths[:1])[0]), ("", {}))
    turns = next((record[name] for name in _TURNS if isinstance(record.get(name), list)), None)
    if turns is None:
        return not ("completion" in record or "instruction" in record)
    speakers = {turn.get("role", turn.get("from")) for turn in turns if isinstance(turn, dict)}
    return not speakers & {"assistant", "gpt", "chatgpt", "model"}


def read_texts(
    paths: Sequence[str], tokenizer: Tokenizer, seq_len: int, holdout: str, seed: int
) -> TextData:
    """Text files, each a document, and records with a field "text".

    holdout: "auto" (5% of the pieces, at most 64), "none", a share, or a file of texts.
    Raises DataError if there is no text, ValueError for `holdout`.
    """
    said: list[str] = []
    pieces = _pieces_of_files(paths, tokenizer, seq_len, said)
    if not pieces:
        raise DataError(paths[0], "", "", "holds no text")
    if Path(holdout).exists():
        held = _pieces_of_files([holdout], tokenizer, seq_len, said)[:MAX_HELD_OUT]
        lines = (*said, *_lines(pieces, held, seq_len))
        return TextData(train=pieces, held_out=held, lines=lines)
    count = held_out_count(len(pieces), holdout, MAX_HELD_OUT)
    chosen = set(permutation(len(pieces), seed, -1)[:count].tolist())
    train = [piece for i, piece in enumerate(pieces) if i not in chosen]
    held = [pieces[i] for i in sorted(chosen)]
    return TextData(train=train, held_out=held, lines=(*said, *_lines(train, held, seq_len)))


def read_store(path: str, tokenizer: Tokenizer, seq_len: int) -> TextData:
    """A store's splits "train" and "holdout".

    Raises DataError for a damaged store, or one that another tokenizer made.
    """
    store = TokenStore.open(path)
    if store.tokenizer_hash and store.tokenizer_hash != tokenizer.fingerprint:
        raise DataError(
            path, "", "tokenizer", "the store was made with another tokenizer than the student's",
            "Prepare it with `fastllm data prepare --tokenizer STUDENT`",
        )  # fmt: skip
    train = StorePieces(store, "train", seq_len)
    held = StorePieces(store, "holdout", seq_len) if "holdout" in store.splits else []
    if not len(train):
        raise DataError(path, "", "", "split 'train' holds no tokens")
    few = [held[i] for i in range(min(len(held), MAX_HELD_OUT))]
    return TextData(train=train, held_out=few, lines=_lines(train, few, seq_len))


class StorePieces(Sequence[Example]):
    """The pieces of a split, made when they are asked for: 16 bytes a piece in memory."""

    def __init__(self, store: TokenStore, split: str, seq_len: int) -> None:
        lengths = store.lengths(split)
        counts = -(-lengths // seq_len)
        documents = np.repeat(np.arange(len(lengths)), counts)
        starts = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        self.store, self.seq_len = store, seq_len
        self._documents = documents + store.split(split).first
        self._starts = starts * seq_len

    def __len__(self) -> int:
        return len(self._documents)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        document, start = int(self._documents[index]), int(self._starts[index])
        tokens = self.store.document(document)[max(start - 1, 0) : start + self.seq_len]
        ids = tokens.astype(np.int32)
        if start == 0:
            ids = np.concatenate([np.array([self.store.start_token_id], np.int32), ids])
        return whole(ids, f"{self.store.directory}: document {document}")


def whole(ids: NDArray[np.int32], place: str) -> Example:
    """An example all of whose tokens but the first are learned."""
    trained = np.ones(len(ids), bool)
    trained[0] = False
    return Example(ids=ids, trained=trained, place=place)


def _pieces_of_files(
    paths: Sequence[str], tokenizer: Tokenizer, seq_len: int, said: list[str]
) -> list[Example]:
    """said: gets what the reader has to say of files that it mends or skips."""
    ends = vocabulary_of(tokenizer, paths[0])
    documents = list(Reader(paths, SourceOptions(), warn=said.append))
    encoded = tokenizer.encode_batch(
        [document.text for document in documents], add_special_tokens=False, parse_special=False
    )
    found = []
    for document, tokens in zip(documents, encoded, strict=True):
        if tokens:
            ids = np.array([ends.start_token_id, *tokens, ends.end_token_id], np.int32)
            place = ": ".join(filter(None, (document.file, document.record)))
            found += [whole(piece, place) for piece in _cut(ids, seq_len)]
    return found


def _cut(ids: NDArray[np.int32], seq_len: int) -> Iterator[NDArray[np.int32]]:
    """Pieces of `seq_len` places; each begins with the last token of the one before."""
    for first in range(0, len(ids) - 1, seq_len):
        yield ids[first : first + seq_len + 1]


def _lines(train: Sequence[Example], held: Sequence[Example], seq_len: int) -> tuple[str, ...]:
    return (f"{len(train)} pieces of text of up to {seq_len} tokens, {len(held)} held out",)
