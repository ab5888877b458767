"""Commands that read text: which files, which fields, what divides documents; calibration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .console import note
from .parsing import Parser

if TYPE_CHECKING:
    from torch import Tensor

    from ..models.tokenizer import Tokenizer
    from ..train.data.sources import SourceOptions

METHODS = ("rtn", "imatrix", "awq", "gptq")  # of quantization


def add_source_options(parser: Parser) -> None:
    """Files and how they are read; the names are those of `SourceOptions`."""
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="FILE",
        help="text, .jsonl, .json, .parquet (also .gz), a folder, or hf:ORG/NAME",
    )
    group: Any = parser.add_argument_group("reading options")
    add_text_field(group)
    group.add_argument(
        "--document-separator",
        default=None,
        metavar="TEXT",
        help=r"divides a text file into documents; blank-line: empty lines; \n and \t are "
        "understood (default: none)",
    )
    group.add_argument(
        "--pattern",
        action="append",
        default=None,
        metavar="GLOB",
        help="files to read in folders, such as '*.py' (default: known types)",
    )
    group.add_argument(
        "--bad-bytes",
        choices=["replace", "error"],
        default="replace",
        help="bytes that are not UTF-8: replaced and counted, or an error (default: replace)",
    )
    group.add_argument("--dataset-config", default=None, metavar="NAME", help="of hf: inputs")
    group.add_argument(
        "--dataset-split", default="train", metavar="NAME", help="of hf: inputs (default: train)"
    )


def source_options(options: Any) -> SourceOptions:
    """What the options ask for."""
    from ..train.data.sources import SourceOptions

    return SourceOptions(
        text_fields=_fields(options),
        separator=_unescaped(options.document_separator),
        patterns=tuple(options.pattern or ()),
        bad_bytes=options.bad_bytes,
        dataset_config=options.dataset_config,
        dataset_split=options.dataset_split,
    )


def add_text_field(parser: Any) -> None:
    """`--text-field`, to a parser or a group of its options."""
    parser.add_argument(
        "--text-field",
        action="append",
        default=None,
        metavar="NAME",
        help="field of records that holds the text; several are joined (default: text)",
    )


def add_method(parser: Any) -> None:
    """`--method` of quantization, to a parser or a group of its options."""
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="rtn",
        help="how values are rounded (default: rtn)",
    )


@contextmanager
def texts(files: Sequence[str], options: Any) -> Iterator[Iterator[str]]:
    """The documents of files, read as `--text-field` says; a ValueError inside names the files."""
    from ..train.data.sources import Reader, SourceOptions

    reader = Reader(files, SourceOptions(text_fields=_fields(options)), note)
    try:
        yield (document.text for document in reader)
    except ValueError as error:
        raise ValueError(f"{', '.join(files)}: {error}") from error


def calibration_tokens(options: Any, tokenizer: Tokenizer, length: int) -> Tensor:
    """Rows `[--samples at most, length]` of token ids from the files of `--calibration`."""
    from ..models.quantizing.calibration import calibration_rows

    with texts(options.calibration, options) as documents:
        rows = calibration_rows(documents, tokenizer, options.samples, length)
    note(f"calibration: {len(rows)} rows of {rows.shape[1]} tokens")
    if len(rows) < options.samples:
        note(f"note: the text has no more; {options.samples} rows were asked for")
    return rows


def _fields(options: Any) -> tuple[str, ...]:
    return tuple(options.text_field or ("text",))


def _unescaped(separator: str | None) -> str | None:
    r"""With line ends and tabs for \n and \t, which a shell leaves as they are typed."""
    if separator is None:
        return None
    return separator.replace(r"\n", "\n").replace(r"\t", "\t")
