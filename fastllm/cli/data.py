"""`fastllm data prepare|show|tasks`: text to a token store, what a batch holds, made problems."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .console import note, paced_note
from .data_show import describe, show
from .data_tasks import tasks
from .groups import run_group
from .parsing import Parser, add_config, command_parser
from .reading import add_source_options, source_options

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..train.data.filters import Filters
    from ..train.data.prepare import Progress

DESCRIPTION = """
Prepares the data of training, shows what training reads, and makes problems with answers.
"""

EXAMPLES = """
fastllm data prepare corpus.txt --tokenizer tokenizer --out store
fastllm data show store --tokenizer tokenizer
fastllm data tasks arithmetic:2 --count 1000 --out sums.jsonl
"""

PREPARE = """
Turns text, JSON lines, parquet or a data set of the Hugging Face Hub into a token store, a
directory that training maps into memory. Documents that break a rule are dropped, so are equal and
similar ones; what was dropped and why is counted in the store's index.json. The rest is divided by
a hash of the text into training and held-out documents, shuffled by the seed, and tokenized by all
cores. The store appears when it is complete.
"""

PREPARE_EXAMPLES = """
fastllm data prepare corpus.txt --document-separator blank-line --tokenizer tokenizer --out store
fastllm data prepare pages.jsonl.gz more/ --text-field body --tokenizer tokenizer --out store
fastllm data prepare source --pattern '*.py' --no-filters --tokenizer tokenizer --out store
fastllm data prepare hf:ORG/NAME --dataset-split train --tokenizer tokenizer --out store
"""

STAGES = {"read": "reading", "duplicates": "looking for duplicates", "write": "writing"}

RULES = {
    "min_chars": "short: fewer characters that are not space",
    "max_garbled": "garbled: share of control and replacement characters",
    "max_symbols": "symbols: share of punctuation and symbols",
    "max_word_length": "long words: mean length of words, mostly ASCII text only",
    "max_repeated_lines": "repeated lines: share of the text in lines that occurred before",
    "max_repeated_words": "repeated words: share of the most frequent word",
}


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    actions = {
        "prepare": (prepare, "turn text into a token store"),
        "show": (show, "print what a batch of training holds"),
        "tasks": (tasks, "write arithmetic and word problems with their answers"),
    }
    return run_group("data", DESCRIPTION, EXAMPLES, actions, argv)


def prepare(argv: Sequence[str]) -> int:
    """`fastllm data prepare`."""
    parser = command_parser("data prepare", PREPARE, PREPARE_EXAMPLES)
    _add_options(parser)
    add_source_options(parser)
    _add_rules(parser)
    add_config(parser)
    options = parser.parse_args(list(argv))
    from ..train.data.prepare import PrepareConfig
    from ..train.data.prepare import prepare as prepare_store

    config = PrepareConfig(
        inputs=tuple(options.inputs),
        tokenizer=options.tokenizer,
        out=options.out,
        source=source_options(options),
        filters=_filters(options),
        exact_duplicates=not options.keep_duplicates,
        near_duplicates=0.0 if options.keep_duplicates else options.near_duplicates,
        holdout=options.holdout,
        seed=options.seed,
        processes=options.processes,
        overwrite=options.overwrite,
    )
    with progress_bar() as progress:
        store = prepare_store(config, warn=note, progress=progress)
    if options.json:
        print(json.dumps(store.index))
    else:
        describe(store)
    return 0


def _add_options(parser: Parser) -> None:
    parser.add_argument(
        "--tokenizer", required=True, metavar="DIR", help="directory, GGUF file or model name"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the store to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a store at --out")
    numbers: list[tuple[str, type, Any, str]] = [
        ("holdout", float, 0.01, "share of the documents that training never sees"),
        ("seed", int, 0, "of the order of the documents"),
        ("near-duplicates", float, 0.8, "similarity from which one of two is dropped; 0: never"),
    ]
    for name, kind, default, text in numbers:
        text = f"{text} (default: {default})"
        parser.add_argument(f"--{name}", type=kind, default=default, metavar="X", help=text)
    parser.add_argument(
        "--keep-duplicates", action="store_true", help="drop neither equal nor similar documents"
    )
    parser.add_argument(
        "--processes", type=int, default=None, metavar="N", help="default: one a core"
    )
    parser.add_argument("--json", action="store_true", help="print the store's index")


def _add_rules(parser: Parser) -> None:
    from ..train.data.filters import Filters

    group: Any = parser.add_argument_group("rules that documents must keep")
    group.add_argument("--no-filters", action="store_true", help="apply none of them")
    for name, text in RULES.items():
        default = getattr(Filters(), name)
        group.add_argument(
            "--" + name.replace("_", "-"),
            type=type(default),
            default=default,
            metavar="X",
            help=f"{text} (default: {default})",
        )


def _filters(options: Any) -> Filters | None:
    from ..train.data.filters import Filters

    if options.no_filters:
        return None
    return Filters(**{name: getattr(options, name) for name in RULES})


@contextmanager
def progress_bar() -> Iterator[Callable[[Progress], None]]:
    """Draws `prepare`'s progress on stderr: a bar in a terminal, else a line every 10 seconds."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield plain_progress(paced_note())
        return
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[documents]:,} documents"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console) as bar:
        task = bar.add_task(STAGES["read"], total=None, documents=0)

        def draw(at: Progress) -> None:
            bar.update(
                task,
                description=STAGES[at.stage],
                completed=at.done,
                total=at.total,
                documents=at.documents,
            )

        yield draw


def plain_progress(say: Callable[[str], None]) -> Callable[[Progress], None]:
    """Progress as lines for `say`."""

    def tell(at: Progress) -> None:
        share = f" {100 * at.done / at.total:.0f}%" if at.total else ""
        say(f"{STAGES[at.stage]}{share}, {at.documents:,} documents")

    return tell
