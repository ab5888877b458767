"""Documents from where the user has them: text files, JSON lines, parquet, folders, the Hub.

Text is UTF-8, or UTF-16 that says so by its byte order mark. What is not is never passed over in
silence: bytes that do not decode are replaced (U+FFFD), counted, and the first is named by file and
byte, or they are an error, as the user chooses; a binary file is an error where it was named, and
skipped, counted and named where a folder held it.
"""

from __future__ import annotations

import codecs
import gzip
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from fastllm.errors import DataError

from .records import is_record_file, read_records

HUB = "hf:"  # marks an id of the Hugging Face Hub: a mistyped path must not go to the network
BLANK_LINE = "blank-line"
CODE_SUFFIXES = frozenset(
    ".py .pyi .c .h .cc .cpp .cxx .hpp .cu .cuh .java .js .jsx .ts .tsx .go .rs .rb .php .cs "
    ".swift .kt .scala .jl .r .lua .pl .sh .bash .sql .html .css .xml .yaml .yml .toml .ini .cmake "
    ".tex".split()
)
TEXT_SUFFIXES = frozenset({".txt", ".text", ".md", ".rst", ".tex"}) | CODE_SUFFIXES

_CHUNK = 1 << 20
_BORDER = 256  # characters in which a separator across two pieces is looked for
_SAID = 5  # files that are named, of those skipped for one reason
_FOREIGN = 0.05  # share of replaced bytes in a file's first MiB from which it is not UTF-8 at all
_SURROGATE = re.compile("[\ud800-\udfff]")
_BLANK_LINES = re.compile(r"\r?\n(?:[ \t]*\r?\n)+")
_AT_ENDS = re.compile(r"\A(?:[ \t]*\r?\n)+|(?:\r?\n[ \t]*)+\Z")


class Document(NamedTuple):
    """A text and where it is from."""

    text: str
    file: str
    record: str  # "line 3" of a file of records; empty for text


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceOptions:
    """How files are read.

    text_fields: of records; several are joined by a line end. separator: what divides the documents
    of a text file: BLANK_LINE, any other string as it stands, or None (a file is a document).
    patterns: names of files to take from folders (shell wildcards; empty: the known suffixes).
    bad_bytes: "replace" or "error". dataset_config, dataset_split: of `hf:` inputs.
    """

    text_fields: tuple[str, ...] = ("text",)
    separator: str | None = None
    patterns: tuple[str, ...] = ()
    bad_bytes: str = "replace"
    dataset_config: str | None = None
    dataset_split: str = "train"

    def __post_init__(self) -> None:
        """Raises ValueError naming the option."""
        if self.bad_bytes not in ("replace", "error"):
            raise ValueError(f"bad_bytes must be 'replace' or 'error', got {self.bad_bytes!r}")
        if not self.text_fields:
            raise ValueError("text_fields must name at least one field")
        if self.separator == "":
            raise ValueError("separator must not be empty")


@dataclass(slots=True)
class Reader:
    """Reads documents one after the other and counts what it met.

    Iterating raises DataError, FileNotFoundError, ModuleNotFoundError (of an extra).
    """

    inputs: Sequence[str]
    options: SourceOptions = field(default_factory=SourceOptions)
    warn: Callable[[str], None] = print
    files: int = 0
    replaced: int = 0  # places in texts that are no characters
    skipped: Counter[str] = field(default_factory=Counter)  # why -> files
    bytes_done: int = 0
    _found: list[tuple[Path, bool]] | None = None

    @property
    def bytes_total(self) -> int | None:
        """Size of all files; None where the Hub's are among them."""
        if any(name.startswith(HUB) for name in self.inputs):
            return None
        return sum(path.stat().st_size for path, _ in self._paths())

    def __iter__(self) -> Iterator[Document]:
        for name in self.inputs:
            if name.startswith(HUB):
                yield from map(self._valid, _hub_documents(name.removeprefix(HUB), self.options))
        before = 0
        for path, named in self._paths():
            size = path.stat().st_size
            self.files += 1
            try:
                for document in self._documents(path):
                    self.bytes_done = min(self.bytes_done + len(document.text), before + size)
                    yield document
            except _NotText as error:
                if named:
                    raise error.error from error
                self._skip("not text", str(error.error))
            before += size
            self.bytes_done = before

    def _skip(self, why: str, text: str) -> None:
        """Count a file; the first ones are said."""
        self.skipped[why] += 1
        if self.skipped[why] <= _SAID:
            more = " (further ones are only counted)" if self.skipped[why] == _SAID else ""
            self.warn(f"skipped: {text}{more}")

    def _paths(self) -> list[tuple[Path, bool]]:
        if self._found is None:
            self._found = list(self._find())
        return self._found

    def _find(self) -> Iterator[tuple[Path, bool]]:
        """Files to read and whether the user named each."""
        for name in self.inputs:
            path = Path(name)
            if name.startswith(HUB):
                continue
            if path.is_dir():
                found = sorted(self._in_folder(path))
                if not found:
                    wanted = ", ".join(self.options.patterns) or "known types (see --pattern)"
                    raise DataError(path, "", "", f"the folder holds no files of {wanted}")
                yield from ((inner, False) for inner in found)
            elif path.is_file():
                yield path, True
            else:
                hint = f"; a data set of the Hub is written {HUB}{name}" if "." not in name else ""
                raise FileNotFoundError(f"{name}: there is no such file or folder{hint}")

    def _in_folder(self, folder: Path) -> Iterator[Path]:
        for here, folders, files in os.walk(folder):
            folders[:] = [inner for inner in folders if not inner.startswith(".")]
            for file in files:
                path = Path(here, file)
                if file.startswith(".") or not path.is_file():
                    continue
                if self._wanted(path):
                    yield path
                else:
                    self.skipped["other type"] += 1

    def _wanted(self, path: Path) -> bool:
        if self.options.patterns:
            return any(fnmatch(path.name, pattern) for pattern in self.options.patterns)
        # A .json file in a folder is a setting more often than records: those are named or matched.
        records = is_record_file(path) and _suffix(path) != ".json"
        return records or _suffix(path) in TEXT_SUFFIXES

    def _documents(self, path: Path) -> Iterator[Document]:
        if is_record_file(path):
            fields = self.options.text_fields
            # Parquet tells its columns at once; a record of it lacks those that are null.
            known = path.name.lower().endswith(".parquet")
            for place, record in read_records(path, fields if known else None):
                full = {**dict.fromkeys(fields), **record} if known else record
                text = _field_text(path, place, full, self.options)
                yield self._valid(Document(text, str(path), place))
            return
        empty = True
        for text in split_documents(self._decoded(path), self.options.separator):
            empty = False
            yield Document(text, str(path), "")
        if empty:
            self._skip("empty", f"{path}: the file is empty")

    def _valid(self, document: Document) -> Document:
        """JSON can spell half of a character (a lone surrogate), which no encoding can."""
        text = document.text
        if text.isascii() or not (lone := _SURROGATE.findall(text)):
            return document
        if self.options.bad_bytes == "error":
            problem = f"holds the lone surrogate {lone[0]!r}, which is no character"
            raise DataError(document.file, document.record, "", problem)
        if not self.replaced:
            self.warn(f"{document.file}: {document.record}: a lone surrogate is replaced")
        self.replaced += len(lone)
        return document._replace(text=_SURROGATE.sub("\ufffd", text))

    def _decoded(self, path: Path) -> Iterator[str]:
        """The text of a file in pieces of about 1 MiB; bad bytes by `options.bad_bytes`."""
        with _open(path) as file:
            data = _read(path, file)
            if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                yield _decode_utf16(path, data + file.read())
                return
            at = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
            data, replaced = data[at:] or _read(path, file), 0
            while data:
                ahead = _read(path, file)
                text, used, count, first = _decode(path, data, at, final=not ahead)
                if count:
                    self._bad_bytes(path, at + first, data[first], count / len(data), replaced)
                replaced += count
                yield text
                at, data = at + used, data[used:] + ahead
        if replaced:
            self.replaced += replaced
            self.warn(f"{path}: {replaced} places that are not UTF-8 were replaced")

    def _bad_bytes(self, path: Path, at: int, byte: int, share: float, before: int) -> None:
        """Bytes that do not decode, the first at `at`: an error, or the file's first a warning."""
        if not before and share > _FOREIGN:
            raise _NotText(path, at, f"{byte:#04x} and much after it is not UTF-8")
        if self.options.bad_bytes == "error":
            remedy = "Convert the file, or let --bad-bytes replace such bytes"
            raise DataError(path, f"byte {at}", "", f"{byte:#04x} is not UTF-8", remedy)
        if not before:
            self.warn(f"{path}: byte {at}: {byte:#04x} is not UTF-8: replaced")


def split_documents(pieces: Iterable[str], separator: str | None) -> Iterator[str]:
    """The documents of a text that comes in pieces; those of nothing but space are left out."""
    rest: list[str] = []
    for piece in pieces:
        border = rest[-1][-_BORDER:] if rest else ""
        rest.append(piece)
        # Only new text is searched: a document of many pieces is joined once.
        if separator is not None and len(_split(border + piece, separator)) > 1:
            *whole, last = _split("".join(rest), separator)
            rest = [last]
            yield from _documents_of(whole, separator)
    text = "".join(rest)
    yield from _documents_of([text] if separator is None else _split(text, separator), separator)


def _split(text: str, separator: str) -> list[str]:
    return _BLANK_LINES.split(text) if separator == BLANK_LINE else text.split(separator)


def _documents_of(texts: Iterable[str], separator: str | None) -> Iterator[str]:
    """Those that hold more than space; blank lines at their ends belong to the separator."""
    for text in texts:
        if text and not text.isspace():
            yield _AT_ENDS.sub("", text) if separator == BLANK_LINE else text


class _NotText(Exception):
    """A file that is not text: an error or a reason to skip it."""

    def __init__(self, path: Path, byte: int, problem: str) -> None:
        super().__init__(path)
        self.error = DataError(path, f"byte {byte}", "", problem, "Give text, in UTF-8")


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _open(path: Path) -> IO[bytes]:
    if path.name.lower().endswith(".gz"):
        return cast("IO[bytes]", gzip.open(path, "rb"))
    return path.open("rb")


def _read(path: Path, file: IO[bytes]) -> bytes:
    try:
        return file.read(_CHUNK)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(path, "", "", f"the compressed data is damaged: {error}") from error


def _decode(path: Path, data: bytes, at: int, *, final: bool) -> tuple[str, int, int, int]:
    """Text, bytes used (the last character may be unfinished), replaced places, the first one."""
    null = data.find(0)
    if null >= 0:
        raise _NotText(path, at + null, "is binary (a null byte)")
    try:
        return *codecs.utf_8_decode(data, "strict", final), 0, 0
    except UnicodeDecodeError as error:
        first = error.start
    text, used = codecs.utf_8_decode(data, "replace", final)
    return text, used, text.count("\ufffd") - data.count("\ufffd".encode()), first


def _decode_utf16(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-16")
    except UnicodeDecodeError as error:
        place = f"byte {error.start}"
        raise DataError(path, place, "", "begins as UTF-16 and is not", "Convert it") from error


def _field_text(
    file: str | Path, place: str, record: dict[str, Any], options: SourceOptions
) -> str:
    """The fields that hold text; null is no text."""
    texts = []
    for name in options.text_fields:
        if name not in record:
            remedy = f"Name the field with --text-field; it has {', '.join(map(str, record))}"
            raise DataError(file, place, name, "the record has no such field", remedy)
        value = record[name]
        if value is not None and not isinstance(value, str):
            raise DataError(file, place, name, f"is a {type(value).__name__}, not a text")
        texts.append(value or "")
    return "\n".join(texts)


def _hub_documents(name: str, options: SourceOptions) -> Iterator[Document]:
    """Streams a data set: nothing but what is read is downloaded."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{HUB}{name} needs the library datasets: pip install 'fastllm-engine[train]'"
        ) from error
    rows = datasets.load_dataset(
        name, options.dataset_config, split=options.dataset_split, streaming=True
    )
    for number, row in enumerate(rows, 1):
        place = f"record {number}"
        yield Document(_field_text(HUB + name, place, row, options), HUB + name, place)
