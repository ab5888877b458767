"""`fastllm eval ACTION`: how well a model, or its formats, predict text; what it can answer."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .console import facts, progress_bar
from .groups import run_group
from .parsing import Parser, add_config, add_model_options, command_parser
from .reading import add_method, add_text_field, texts

if TYPE_CHECKING:
    from ..engine.perplexity import Score
    from ..models.tokenizer import Tokenizer

DESCRIPTION = """
Measures how good a model is.
"""

EXAMPLES = """
fastllm eval perplexity smollm2 --text book.txt
fastllm eval accuracy smollm2 arithmetic:2
fastllm eval choice smollm2 exam.jsonl
"""

PERPLEXITY = """
Predicts every token of a text from those before it, and prints what that cost: nats a token, their
exponential (the perplexity), and bits a byte, which models with other tokenizers share. Every
token but a document's first is predicted once; windows of --length tokens move on by --stride.

With --formats the model is quantized to each format in turn, as `fastllm quantize` would, and one
table shows bits, size, perplexity and speed; f32 and bf16 are the values themselves. Differences
are to the first row, with their standard error over the same tokens. Activations are what an
inference load uses on this device unless --activation says otherwise. What a row costs on disk is
freed before the next one.
"""

PERPLEXITY_EXAMPLES = """
fastllm eval perplexity smollm2 --text book.txt --limit 20000
fastllm eval perplexity ./my-model --text held-out.txt --length 1024 --stride 512 --json
fastllm eval perplexity ./my-model --text held-out.txt --formats f32,bf16,q8_0,q4_k_m,int4,nf4
fastllm eval perplexity ./my-model --text held-out.txt --formats f32,int4,int4:awq,int4:gptq
    --calibration train.txt --markdown
"""


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    actions = {
        "perplexity": (perplexity, "how well a model predicts text; a table of formats"),
        "accuracy": (_accuracy, "how many problems it solves; pass@k"),
        "choice": (_choice, "which of several answers it finds likeliest"),
    }
    return run_group("eval", DESCRIPTION, EXAMPLES, actions, argv)


def _accuracy(argv: Sequence[str]) -> int:
    from .eval_accuracy import run

    return run(argv)


def _choice(argv: Sequence[str]) -> int:
    from .eval_choice import run

    return run(argv)


def perplexity(argv: Sequence[str]) -> int:
    """`fastllm eval perplexity`."""
    options = _parser().parse_args(list(argv))
    if options.formats is not None:
        from .eval_formats import compare

        return compare(options)
    for name in ("calibration", "markdown"):
        if getattr(options, name):
            raise ValueError(f"--{name} goes with --formats")
    from .answering import load

    llm = load(options)
    documents, nbytes = read_text(options, llm.tokenizer)
    start = time.perf_counter()
    score = measured(llm.model, documents, nbytes, options)
    seconds = time.perf_counter() - start
    length = window_length(options, llm.model)
    row = {"model": options.model, **numbers(score), "activation": llm.model.activation,
           "length": length, "stride": options.stride or length,
           "tokens_per_second": score.tokens / seconds}  # fmt: skip
    if options.json:
        print(json.dumps(row))
        return 0
    facts([
        ("tokens predicted", f"{score.tokens:,} in {seconds:.1f} s"),
        ("nats a token", f"{score.mean:.4f}"),
        ("perplexity", f"{score.perplexity:.4f}"),
        ("bits a byte", f"{score.bits_per_byte:.4f}"),
    ])  # fmt: skip
    return 0


def _parser() -> Parser:
    parser = command_parser("eval perplexity", PERPLEXITY, PERPLEXITY_EXAMPLES)
    parser.add_argument("model", help="a path, a name of `fastllm models`, or a Hugging Face id")
    parser.add_argument(
        "--text", action="append", required=True, metavar="FILE",
        help="text, .jsonl, .parquet, a folder or hf:ORG/NAME; may be given again",
    )  # fmt: skip
    add_text_field(parser)
    parser.add_argument(
        "--length", type=int, default=512, metavar="N",
        help="tokens that a window sees (default: 512)",
    )  # fmt: skip
    parser.add_argument(
        "--stride", type=int, default=None, metavar="N",
        help="how far windows move on; less gives more context (default: the length)",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=int, default=None, metavar="N", help="stop after so many tokens"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    _add_format_options(parser)
    add_model_options(parser)
    add_config(parser)
    return parser


def _add_format_options(parser: Parser) -> None:
    group: Any = parser.add_argument_group("table of formats")
    group.add_argument(
        "--formats", default=None, metavar="F,F,...",
        help="f32, bf16 and the formats of `fastllm quantize --help`, with commas between; "
        "FORMAT:METHOD: by that method",
    )  # fmt: skip
    add_method(group)
    group.add_argument(
        "--calibration", action="append", default=None, metavar="FILE",
        help="text for every method but rtn, other than --text; may be given again",
    )  # fmt: skip
    group.add_argument(
        "--samples", type=int, default=128, metavar="N",
        help="rows of 512 tokens of it (default: 128)",
    )  # fmt: skip
    group.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    group.add_argument("--no-speed", action="store_true", help="measure no speeds")
    group.add_argument(
        "--work", default=None, metavar="DIR",
        help="where quantized models lie for a while (default: the system's folder for such)",
    )  # fmt: skip


def read_text(options: Any, tokenizer: Tokenizer) -> tuple[list[list[int]], int]:
    """Token ids of the documents that the options name, and their bytes."""
    from ..engine.perplexity import text_ids

    with texts(options.text, options) as documents:
        return text_ids(documents, tokenizer, options.limit)


def window_length(options: Any, model: Any) -> int:
    """--length, at most what the model has positions for."""
    return min(int(options.length), int(model.max_positions))


def measured(
    model: Any, documents: Sequence[Sequence[int]], nbytes: int, options: Any, label: str = ""
) -> Score:
    """The score of a model, with progress on stderr."""
    from ..engine.perplexity import score

    length = window_length(options, model)
    total = sum(len(ids) - 1 for ids in documents)
    with progress_bar(total, label or "predicting") as progress:
        return score(
            model, documents, nbytes, length=length, stride=options.stride, progress=progress
        )


def numbers(score: Score) -> dict[str, float]:
    """A score as JSON has it."""
    return {
        "tokens": score.tokens,
        "bytes": score.nbytes,
        "nats_per_token": score.mean,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
    }
