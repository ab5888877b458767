"""Text to a token store: read, filter, tokenize, drop duplicates, split, shuffle, write.

Documents pass once through the processes, in the order of the inputs; tokens, digests and MinHash
signatures are spooled to disk. Then duplicates are found over all of them and the store is written.
What a document's digest decides, not the order of the files: its split (whatever the seed is) and,
with the seed, its place. So the same texts give the same store in any order of files and for any
number of processes; only of similar texts the first one met is kept.
"""

from __future__ import annotations

import errno
import os
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fastllm.errors import DataError
from fastllm.models.tokenizer import Tokenizer
from fastllm.models.tokenizer_loading import load_tokenizer

from .dedup import DIGEST_BYTES, FUNCTIONS, near_duplicates
from .filters import Filters
from .order import key, mix
from .sources import Document, Reader, SourceOptions
from .store import DTYPES, TokenStore
from .store_writer import StoreWriter, Vocabulary, check_target
from .tokenizing import Processed, Recipe, process

EXAMPLES = 3  # of dropped documents, per reason, in the report
_SHOWN = 120  # characters of each
_END = "<|endoftext|>"
_SMALL = 4 << 20  # bytes of input for which starting processes takes longer than it saves


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """What to make a store of, and how.

    inputs: files, folders, `hf:ORG/NAME`. tokenizer: a directory with
    tokenizer.json, a GGUF file or a model's name. out: the
    store's directory. holdout: share of the documents that training never sees. near_duplicates:
    similarity from which a document is dropped; 0: not looked for. filters: None drops only texts
    without a character. processes: None for as many as there are cores.
    """

    inputs: tuple[str, ...]
    tokenizer: str
    out: str
    source: SourceOptions = field(default_factory=SourceOptions)
    filters: Filters | None = field(default_factory=Filters)
    exact_duplicates: bool = True
    near_duplicates: float = 0.8
    holdout: float = 0.01
    seed: int = 0
    processes: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError naming the field."""
        if not self.inputs:
            raise ValueError("inputs must name at least one file, folder or data set")
        if not 0 <= self.holdout < 1:
            raise ValueError(f"holdout must be at least 0 and below 1, got {self.holdout}")
        if not 0 <= self.near_duplicates <= 1:
            raise ValueError(f"near_duplicates must be from 0 to 1, got {self.near_duplicates}")
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"processes must be at least 1, got {self.processes}")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far `prepare` is."""

    stage: str  # "read", "duplicates", "write"
    done: int
    total: int | None
    documents: int


def prepare(
    config: PrepareConfig,
    *,
    warn: Callable[[str], None] = print,
    progress: Callable[[Progress], None] = lambda _: None,
) -> TokenStore:
    """Make a token store; it appears when it is complete.

    warn: gets a line for whatever is replaced, skipped or odd. progress: called now and then.
    Raises DataError, ValueError, OSError; nothing is left behind then.
    """
    target = Path(os.path.abspath(config.out))
    try:
        return _prepare(config, target, warn, progress)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        needs = "it needs about 4 bytes a token and 600 a document while it is made"
        text = f"the disk of {target.parent} is full: {needs}"
        raise OSError(errno.ENOSPC, text) from error


def _prepare(
    config: PrepareConfig,
    target: Path,
    warn: Callable[[str], None],
    progress: Callable[[Progress], None],
) -> TokenStore:
    check_target(target, overwrite=config.overwrite)
    tokenizer = load_tokenizer(config.tokenizer)
    vocabulary = vocabulary_of(tokenizer, config.tokenizer)
    target.parent.mkdir(parents=True, exist_ok=True)
    warnings: list[str] = []

    def note(text: str) -> None:
        warnings.append(text)
        warn(text)

    reader = Reader(config.inputs, config.source, note)
    # Beside the store: the temporary directory may be small, or memory.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.spool-", dir=target.parent) as aside:
        with Spool(Path(aside), vocabulary.dtype, signed=config.near_duplicates > 0) as spool:
            _read(config, reader, spool, tokenizer, vocabulary, progress)
        kept = _without_duplicates(config, spool, tokenizer, progress)
        splits = _splits(config, spool, kept, note)
        with StoreWriter(target, vocabulary, overwrite=config.overwrite) as writer:
            _write(writer, spool, splits, progress)
            report = {
                "files": reader.files,
                "skipped_files": dict(reader.skipped),
                "replaced_places": reader.replaced,
                "documents_read": spool.read,
                "dropped": dict(spool.dropped),
                "examples": spool.examples,
                "warnings": warnings,
            }
            settings = {k: v for k, v in asdict(config).items() if k not in _NOT_SETTINGS}
            return writer.finish(settings=settings, report=report)


_NOT_SETTINGS = ("out", "overwrite", "processes")


def vocabulary_of(tokenizer: Tokenizer, name: str) -> Vocabulary:
    """The tokens that begin and end a document: <|endoftext|> for both where the tokenizer has it,
    else its bos and eos. Raises ValueError if there is no end token."""
    end = tokenizer.token_to_id(_END)
    start = end
    if end is None:
        end, start = tokenizer.eos_token_id, tokenizer.bos_token_id
    if end is None:
        raise ValueError(f"{name}: the tokenizer has no {_END} and names no eos_token")
    return Vocabulary(
        vocab_size=tokenizer.vocab_size,
        start_token_id=end if start is None else start,
        end_token_id=end,
        sha256=tokenizer.fingerprint,
        name=str(Path(name).resolve()) if Path(name).exists() else name,
    )


class Spool:
    """Documents on the way: tokens and signatures in files, 40 bytes a document in memory."""

    def __init__(self, directory: Path, dtype: str, *, signed: bool) -> None:
        self.directory = directory
        self.dtype = DTYPES[dtype]
        self.signed = signed
        self.read = 0
        self.dropped: Counter[str] = Counter()
        self.examples: dict[str, list[dict[str, str]]] = {}
        self.digests = bytearray()
        self.lengths = array("q")
        self.text_bytes = array("q")

    def __enter__(self) -> Spool:
        self._tokens: IO[bytes] = (self.directory / "tokens").open("wb")
        self._signatures: IO[bytes] = (self.directory / "signatures").open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._tokens.close()
        self._signatures.close()

    def add(self, documents: list[Document], result: Processed) -> None:
        """Append a batch."""
        self.read += len(documents)
        for document, reason in zip(documents, result.reasons, strict=True):
            if reason is not None:
                self.drop(reason, document)
        self._tokens.write(result.tokens.data)
        if result.signatures is not None:
            self._signatures.write(result.signatures.data)
        self.digests += result.digests
        self.lengths.extend(result.lengths.tolist())
        self.text_bytes.extend(result.text_bytes.tolist())

    def drop(self, reason: str, document: Document) -> None:
        """Count a dropped document; the first few are shown in the report."""
        self.dropped[reason] += 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < EXAMPLES:
            where = " ".join(filter(None, (document.file, document.record)))
            shown.append({"from": where, "text": document.text[:_SHOWN]})

    def drop_duplicates(
        self, reason: str, numbers: NDArray[np.int64], tokenizer: Tokenizer
    ) -> None:
        """The same for documents that are in the spool already."""
        self.dropped[reason] = len(numbers)
        tokens, ends = self.tokens(), np.cumsum(np.frombuffer(self.lengths, np.int64))
        self.examples[reason] = [
            {"text": tokenizer.decode(tokens[int(ends[i]) - self.lengths[i] :][:_SHOWN])[:_SHOWN]}
            for i in numbers[:EXAMPLES].tolist()
        ]

    def tokens(self) -> NDArray[np.unsignedinteger]:
        """All tokens, end to end."""
        return _mapped(self.directory / "tokens", self.dtype)

    def signatures(self) -> NDArray[np.uint32]:
        """[documents, 125] uint32."""
        return _mapped(self.directory / "signatures", np.dtype(np.uint32)).reshape(-1, FUNCTIONS)


def _mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


def _read(
    config: PrepareConfig,
    reader: Reader,
    spool: Spool,
    tokenizer: Tokenizer,
    vocabulary: Vocabulary,
    progress: Callable[[Progress], None],
) -> None:
    total = reader.bytes_total
    processes = config.processes or (
        1 if total is not None and total < _SMALL else len(os.sched_getaffinity(0))
    )
    recipe = Recipe(
        tokenizer=tokenizer.to_json(),
        end_token_id=vocabulary.end_token_id,
        dtype=vocabulary.dtype,
        filters=config.filters,
        signatures=config.near_duplicates > 0,
    )
    progress(Progress("read", 0, total, 0))
    for documents, result in process(reader, recipe, processes):
        spool.add(documents, result)
        progress(Progress("read", reader.bytes_done, total, spool.read))
    if not spool.lengths:
        dropped = ", ".join(f"{count} {reason}" for reason, count in spool.dropped.items())
        problem = f"no document is left: {spool.read} read" + (
            f", dropped: {dropped}" * bool(dropped)
        )
        remedy = "Give more text, or --no-filters" if dropped else "Give files that hold text"
        raise DataError(config.inputs[0], "", "", problem, remedy)


def _without_duplicates(
    config: PrepareConfig,
    spool: Spool,
    tokenizer: Tokenizer,
    progress: Callable[[Progress], None],
) -> NDArray[np.int64]:
    """Documents that are kept, ascending."""
    kept = np.arange(len(spool.lengths))
    progress(Progress("duplicates", 0, None, spool.read))
    if config.exact_duplicates:
        names = np.frombuffer(bytes(spool.digests), f"V{DIGEST_BYTES}")
        kept = np.sort(np.unique(names, return_index=True)[1])
        spool.drop_duplicates(
            "exact duplicate", np.setdiff1d(np.arange(len(names)), kept), tokenizer
        )
    if config.near_duplicates:
        similar = near_duplicates(spool.signatures(), config.near_duplicates, kept)
        spool.drop_duplicates("near duplicate", kept[similar], tokenizer)
        kept = kept[~similar]
    return kept


def _splits(
    config: PrepareConfig, spool: Spool, kept: NDArray[np.int64], warn: Callable[[str], None]
) -> dict[str, NDArray[np.int64]]:
    """The documents of each split in their order.

    A document is held out if its digest is below a limit: a text does not change sides when others
    come. Two documents are enough for both splits: where none or all are below, the lowest is held
    out and the others are not.
    """
    names = np.frombuffer(bytes(spool.digests), np.uint64).reshape(-1, 2)[kept]
    values = mix(names[:, 0])
    held = values < np.uint64(min(int(config.holdout * 2.0**64), 2**64 - 1))
    if config.holdout and (held.all() or not held.any()):
        held[:] = False
        held[np.argmin(values)] = len(kept) > 1
        if len(kept) == 1:
            warn(
                "there is one document, so none is held out and training cannot be evaluated; "
                "--document-separator blank-line (or another text) divides a file into documents"
            )
    order = np.argsort(mix(names[:, 1] ^ np.uint64(key(config.seed))), kind="stable")
    return {"train": kept[order[~held[order]]], "holdout": kept[order[held[order]]]}


def _write(
    writer: StoreWriter,
    spool: Spool,
    splits: dict[str, NDArray[np.int64]],
    progress: Callable[[Progress], None],
) -> None:
    tokens = spool.tokens()
    ends = np.cumsum(np.frombuffer(spool.lengths, np.int64))
    total, done = sum(map(len, splits.values())), 0
    for name, documents in splits.items():
        writer.split(name)
        for document in documents.tolist():
            end, length = int(ends[document]), spool.lengths[document]
            writer.add(tokens[end - length : end], spool.text_bytes[document])
            done += 1
            if done % 4096 == 0:
                progress(Progress("write", done, total, spool.read))
    progress(Progress("write", total, total, spool.read))
