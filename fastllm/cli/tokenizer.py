"""`fastllm tokenizer train|stats`: a tokenizer of one's own text, and how well one fits a text."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .console import note, table
from .groups import run_group
from .parsing import command_parser
from .reading import add_source_options, source_options

if TYPE_CHECKING:
    from ..models.tokenizer import Tokenizer
    from ..models.tokenizer_stats import ScriptStats
    from ..train.data.sources import Reader

DESCRIPTION = """
Trains a byte-level BPE tokenizer on text files, or measures one.
"""

EXAMPLES = """
fastllm tokenizer train corpus.txt --vocab-size 8192 --out tokenizer
fastllm tokenizer stats tokenizer corpus.txt chinese.txt
"""

TRAIN = """
Trains a byte-level BPE tokenizer. The vocabulary holds the 256 bytes, so that every text can be
encoded and decodes to the same bytes, 10 special tokens (end of text, turns of a chat, padding,
thoughts and tool calls) and merges. Every digit is a token. The result is in Hugging Face form,
with a chat template; AutoTokenizer reads it.
"""

TRAIN_EXAMPLES = """
fastllm tokenizer train corpus.txt --vocab-size 8192 --out tokenizer
fastllm tokenizer train folder more.jsonl.gz --vocab-size 32768 --out tokenizer
fastllm tokenizer train source --pattern '*.py' --pattern '*.rst' --vocab-size 4096 --out t
"""

STATS = """
Bytes per token of a tokenizer on files, by script: more is better. Chinese, Japanese and Korean are
told apart, and files of source code (by their names) are a row of their own.
"""

STATS_EXAMPLES = """
fastllm tokenizer stats tokenizer corpus.txt
fastllm tokenizer stats smollm2 chinese.txt README.md main.py --json
"""


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    actions = {
        "train": (train, "train a byte-level BPE tokenizer on files"),
        "stats": (stats, "bytes per token of a tokenizer on files, by script"),
    }
    return run_group("tokenizer", DESCRIPTION, EXAMPLES, actions, argv)


def train(argv: Sequence[str]) -> int:
    """`fastllm tokenizer train`."""
    parser = command_parser("tokenizer train", TRAIN, TRAIN_EXAMPLES)
    parser.add_argument(
        "--vocab-size", type=int, required=True, metavar="N", help="tokens in all, at least 266"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="directory to write")
    parser.add_argument(
        "--allow-smaller", action="store_true", help="accept fewer tokens if the text gives no more"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a tokenizer at --out")
    add_source_options(parser)
    options = parser.parse_args(list(argv))
    from ..models.tokenizer_training import MIN_VOCAB_SIZE, save_tokenizer, train_tokenizer
    from ..train.data.sources import Reader

    reader = Reader(options.inputs, source_options(options), note)
    tokenizer = train_tokenizer(
        (text for text, _ in _texts(reader)),
        options.vocab_size,
        allow_smaller=options.allow_smaller,
        show_progress=sys.stderr.isatty(),
    )
    save_tokenizer(tokenizer, options.out, overwrite=options.overwrite)
    merges = tokenizer.vocab_size - MIN_VOCAB_SIZE
    print(f"{options.out}: {tokenizer.vocab_size} tokens, {merges} merges, {reader.files} files")
    return 0


def stats(argv: Sequence[str]) -> int:
    """`fastllm tokenizer stats`."""
    parser = command_parser("tokenizer stats", STATS, STATS_EXAMPLES)
    parser.add_argument("tokenizer", help="directory with tokenizer.json, GGUF file or model name")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_source_options(parser)
    options = parser.parse_args(list(argv))
    from ..models.tokenizer_loading import load_tokenizer
    from ..models.tokenizer_stats import tokenizer_stats
    from ..train.data.sources import Reader

    tokenizer = load_tokenizer(options.tokenizer)
    reader = Reader(options.inputs, source_options(options), note)
    rows, total = tokenizer_stats(tokenizer, _texts(reader))
    if options.json:
        print(json.dumps(_plain(tokenizer, rows, total)))
        return 0
    columns = ("script", "bytes", "characters", "tokens", "bytes per token")
    table(columns, [_cells(row) for row in (*rows, total)], right=columns[1:])
    return 0


def _texts(reader: Reader) -> Iterator[tuple[str, bool]]:
    """Texts in pieces that fit in memory, and whether each is source code."""
    from ..train.data.sources import CODE_SUFFIXES
    from ..train.data.tokenizing import pieces_of

    for document in reader:
        is_code = Path(document.file).suffix.lower() in CODE_SUFFIXES
        for piece in pieces_of(document.text):
            yield piece, is_code


def _cells(row: ScriptStats) -> tuple[str, ...]:
    counts = (f"{count:,}" for count in (row.bytes, row.characters, row.tokens))
    return (row.script, *counts, f"{row.bytes_per_token:.2f}")


def _plain(tokenizer: Tokenizer, rows: list[ScriptStats], total: ScriptStats) -> dict[str, object]:
    return {
        "vocab_size": tokenizer.vocab_size,
        "scripts": [
            {
                "script": row.script,
                "bytes": row.bytes,
                "characters": row.characters,
                "tokens": row.tokens,
                "bytes_per_token": round(row.bytes_per_token, 4),
            }
            for row in (*rows, total)
        ],
    }
