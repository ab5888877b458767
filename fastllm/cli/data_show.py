"""`fastllm data show`: the documents of a training batch, coloured by what is trained."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import console, facts, heading, human_bytes, table
from .parsing import Parser, command_parser

if TYPE_CHECKING:
    from ..models.tokenizer import Tokenizer
    from ..train.data.batch import MicroBatch
    from ..train.data.store import TokenStore

DESCRIPTION = """
Prints one micro batch as training reads it: from a token store, or from a file of conversations by
the tokenizer's chat template. In a terminal, tokens that are learned are green, each in another
shade than the one before, and tokens that are only read are grey; elsewhere learned text stands
between [[ and ]], unless all of it is.
"""

EXAMPLES = """
fastllm data show store
fastllm data show store --split holdout --seq-len 2048 --rows 2 --step 7
fastllm data show chats.jsonl --tokenizer smollm2
fastllm data show chats.jsonl --tokenizer tokenizer --loss all --json
"""

_BAR = 40  # characters of the longest bar


@dataclass(frozen=True, slots=True)
class Shown:
    """A batch and what the command says about it."""

    batch: MicroBatch
    places: list[str]  # per document: where it is from
    capacity: int  # places that the batch could hold
    lengths: list[int]  # of all documents, or all examples
    kind: str  # what these are


def show(argv: Sequence[str]) -> int:
    """`fastllm data show`."""
    parser = command_parser("data show", DESCRIPTION, EXAMPLES)
    _add_options(parser)
    options = parser.parse_args(list(argv))
    for name in ("seq_len", "rows", "max_documents", "max_chars"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.step < 0:
        parser.error("--step must not be negative")
    if not Path(options.data).exists():
        raise ValueError(f"{options.data}: there is no such token store or file of conversations")
    is_store = Path(options.data).is_dir()
    tokenizer = _tokenizer(options, is_store)
    shown = _of_store(options) if is_store else _of_conversations(options, tokenizer)
    if options.json:
        print(json.dumps(_plain(shown, tokenizer), ensure_ascii=False))
        return 0
    for number, (ids, learned) in enumerate(_documents(shown.batch)):
        if number == options.max_documents:
            print(f"\n... {len(shown.places) - number} more documents (--max-documents)")
            break
        heading(f"{shown.places[number]}: {len(ids) - 1} places, {sum(learned)} learned")
        _print_document(tokenizer, ids, learned, options.max_chars)
    _print_facts(shown)
    if is_store:
        from ..train.data.store import TokenStore

        heading("store")
        describe(TokenStore.open(options.data))
    return 0


def _add_options(parser: Parser) -> None:
    parser.add_argument("data", help="a token store, or a file of conversations")
    parser.add_argument(
        "--tokenizer",
        default=None,
        metavar="DIR",
        help="directory, GGUF file or model name (default: the one that made the store)",
    )
    numbers = [
        ("seq-len", 512, "tokens of a row"),
        ("rows", 4, "rows of the batch; of conversations: examples of the step"),
        ("step", 0, "which step of training"),
        ("seed", 0, "of the order"),
        ("max-documents", 8, "documents that are printed"),
        ("max-chars", 600, "characters that are printed of a document"),
    ]
    for name, default, text in numbers:
        text = f"{text} (default: {default})"
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text)
    parser.add_argument("--split", default="train", metavar="NAME", help="train or holdout")
    parser.add_argument(
        "--loss",
        choices=["assistant", "all"],
        default="assistant",
        help="of conversations: what is learned (default: assistant)",
    )
    parser.add_argument("--verify", action="store_true", help="read the whole store, check hashes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _tokenizer(options: Any, is_store: bool) -> Tokenizer:
    from ..models.tokenizer_loading import load_tokenizer
    from ..train.data.store import TokenStore

    name = options.tokenizer
    if is_store:
        store = TokenStore.open(options.data, verify=options.verify)
        name = name or store.index["tokenizer"].get("name") or ""
        if not name or not (options.tokenizer or Path(name).exists()):
            raise ValueError(f"the store's tokenizer {name!r} is not here: give --tokenizer")
        tokenizer = load_tokenizer(name)
        if store.tokenizer_hash and tokenizer.fingerprint != store.tokenizer_hash:
            raise ValueError(f"{name} is not the tokenizer that made {options.data}")
        return tokenizer
    if name is None:
        raise ValueError("a file of conversations needs --tokenizer")
    return load_tokenizer(name)


def _of_store(options: Any) -> Shown:
    from ..train.data.loader import Loader
    from ..train.data.store import TokenStore

    store = TokenStore.open(options.data)
    loader = Loader(
        store,
        seq_len=options.seq_len,
        rows_per_step=options.rows,
        seed=options.seed,
        split=options.split,
    )
    loader.load_state_dict({**loader.state_dict(), "row": options.step * options.rows})
    (batch,) = next(loader)
    places = [
        f"document {document}" + (f" from token {start}" if start else "")
        for document, start, _ in batch.sources.tolist()
    ]
    lengths = store.lengths(options.split).tolist()
    capacity = options.rows * options.seq_len
    return Shown(batch, places, capacity, lengths, f"documents of {options.split}")


def _of_conversations(options: Any, tokenizer: Tokenizer) -> Shown:
    from ..train.data.conversations import read_conversations
    from ..train.data.examples import ExampleBatches, fit_examples
    from ..train.data.masks import ConversationEncoder

    encoder = ConversationEncoder(tokenizer, loss=options.loss)
    found = encoder.encode(read_conversations([options.data]))
    examples, _ = fit_examples(found, options.seq_len)
    batches = ExampleBatches(
        examples, batch_size=options.rows, micro_tokens=options.seq_len, seed=options.seed
    )
    for _ in range(options.step):
        next(batches)
    batch = next(batches)[0]
    places = [examples[number].place for number in batch.sources[:, 0].tolist()]
    lengths = [len(example.ids) - 1 for example in examples]
    return Shown(batch, places, options.seq_len, lengths, "examples")


def _documents(batch: MicroBatch) -> Iterator[tuple[list[int], list[bool]]]:
    """Of each document its tokens, the one before its first target included, and which of them are
    targets."""
    ids, targets = batch.documents.ids.tolist(), batch.targets.tolist()
    edges = batch.documents.cu_seqlens.tolist()
    for low, high in itertools.pairwise(edges):
        learned = [target >= 0 for target in targets[low:high]]
        last = targets[high - 1] if learned[-1] else None
        tokens = ids[low:high] + ([last] if last is not None else [])
        yield tokens, [False, *learned][: len(tokens)]


def _print_document(
    tokenizer: Tokenizer, ids: list[int], learned: list[bool], max_chars: int
) -> None:
    from rich.text import Text

    pieces, drawn, mixed = _pieces(tokenizer, ids, max_chars), Text(), not all(learned[1:])
    if not console().is_terminal:
        print(_marked(pieces, learned) if mixed else "".join(pieces))
        return
    for number, piece in enumerate(pieces):
        shade = number % 2
        green, grey = ("green", "bright_green")[shade], ("bright_black", "white")[shade]
        drawn.append(piece, style=green if learned[number] else grey)
    console().print(drawn)


def _pieces(tokenizer: Tokenizer, ids: list[int], max_chars: int) -> list[str]:
    """The text that each token completes, until there are `max_chars` characters."""
    detokenizer = tokenizer.detokenizer(skip_special_tokens=False)
    pieces: list[str] = []
    size = 0
    for token in ids:
        text = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1]
                       for c in detokenizer.push(token))  # fmt: skip
        pieces.append(text)
        size += len(text)
        if size > max_chars:
            pieces[-1] += " ..."
            break
    else:
        pieces[-1] += detokenizer.flush()
    return pieces


def _marked(pieces: list[str], learned: list[bool]) -> str:
    """The text with [[ and ]] around what is learned."""
    marked, inside = "", False
    for piece, counts in zip(pieces, learned, strict=False):
        if counts != inside:
            marked += "[[" if counts else "]]"
            inside = counts
        marked += piece
    return marked + "]]" * inside


def _counts(shown: Shown) -> dict[str, Any]:
    places = len(shown.batch.targets)
    return {
        "documents": len(shown.places),
        "places": places,
        "learned": shown.batch.tokens,
        "fill": round(places / shown.capacity, 4),
        "capacity": shown.capacity,
    }


def _print_facts(shown: Shown) -> None:
    counts = _counts(shown)
    heading("batch")
    facts(
        [
            ("documents", counts["documents"]),
            ("places", f"{counts['places']:,} of {shown.capacity:,}: fill {counts['fill']:.1%}"),
            ("learned", f"{counts['learned']:,} ({counts['learned'] / counts['places']:.1%})"),
        ]
    )
    heading(f"lengths of {len(shown.lengths):,} {shown.kind}, in tokens")
    rows = histogram(shown.lengths)
    most = max(count for _, count in rows)
    table(
        ("tokens", "count", ""),
        [(name, f"{count:,}", "#" * -(-_BAR * count // most)) for name, count in rows],
        right=("tokens", "count"),
    )


def describe(store: TokenStore) -> None:
    """Print what is in a store and what was left out."""
    report = store.index["report"]
    print(f"{store.directory}: {store.index['dtype']}, vocabulary of {store.vocab_size}")
    for name, split in store.splits.items():
        per_token = split.text_bytes / split.tokens if split.tokens else 0.0
        facts(
            [
                (f"{name} documents", f"{split.documents:,}"),
                (f"{name} tokens", f"{split.tokens:,}"),
                (f"{name} text", f"{human_bytes(split.text_bytes)}, {per_token:.2f} bytes a token"),
            ]
        )
    for reason, count in report.get("dropped", {}).items():
        if count:
            print(f"  dropped, {reason}: {count:,} of {report['documents_read']:,}")
    for reason, count in report.get("skipped_files", {}).items():
        print(f"  files skipped, {reason}: {count:,}")
    if report.get("replaced_places"):
        print(f"  places that are not UTF-8, replaced: {report['replaced_places']:,}")


def histogram(lengths: Sequence[int]) -> list[tuple[str, int]]:
    """How many lengths are in [1], [2, 3], [4, 7], ...: from the first to the last that has any."""
    counts: dict[int, int] = {}
    for length in lengths:
        bits = length.bit_length()
        counts[bits] = counts.get(bits, 0) + 1
    return [
        (f"{1 << bits >> 1} to {(1 << bits) - 1}", counts.get(bits, 0))
        for bits in range(min(counts), max(counts) + 1)
    ]


def _plain(shown: Shown, tokenizer: Tokenizer) -> dict[str, Any]:
    documents = [
        {
            "from": place,
            "ids": ids,
            "learned": [int(value) for value in learned],
            "text": tokenizer.decode(ids, skip_special_tokens=False),
        }
        for place, (ids, learned) in zip(shown.places, _documents(shown.batch), strict=True)
    ]
    return {**_counts(shown), "contents": documents, "lengths": dict(histogram(shown.lengths))}
