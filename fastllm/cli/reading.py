"""Options of commands that read text: which files, which fields, what divides documents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .parsing import Parser

if TYPE_CHECKING:
    from ..train.data.sources import SourceOptions


def add_source_options(parser: Parser) -> None:
    """Files and how they are read; the names are those of `SourceOptions`."""
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="FILE",
        help="text, .jsonl, .json, .parquet (also .gz), a folder, or hf:ORG/NAME",
    )
    group: Any = parser.add_argument_group("reading options")
    group.add_argument(
        "--text-field",
        action="append",
        default=None,
        metavar="NAME",
        help="field of records that holds the text; several are joined (default: text)",
    )
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
        text_fields=tuple(options.text_field or ("text",)),
        separator=_unescaped(options.document_separator),
        patterns=tuple(options.pattern or ()),
        bad_bytes=options.bad_bytes,
        dataset_config=options.dataset_config,
        dataset_split=options.dataset_split,
    )


def _unescaped(separator: str | None) -> str | None:
    r"""With line ends and tabs for \n and \t, which a shell leaves as they are typed."""
    if separator is None:
        return None
    return separator.replace(r"\n", "\n").replace(r"\t", "\t")
