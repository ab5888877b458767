"""`fastllm quantize MODEL --format F --method M --out PATH`: a model in fewer bits."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import console, facts, human_bytes, note
from .parsing import Parser, add_config, command_parser, use_threads
from .reading import add_method, add_text_field, calibration_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from ..models.quantizing.run import Progress, Report
    from ..models.tokenizer import Tokenizer

DESCRIPTION = """
Writes a model with quantized weights. llama.cpp's formats and mixes (q4_0, q4_1, q5_0, q5_1, q8_0,
q4_k_s, q4_k_m, q5_k_s, q5_k_m, q6_k) become a GGUF file, which llama.cpp runs; the others (int4,
int4_asym, each also _g32 and _g64, int8, nf4, nf4_dq, fp8, fp8_block) a Hugging Face directory.

methods:
  rtn      round to nearest; needs no text
  imatrix  squared errors weighted by the size of each input channel, as llama.cpp's imatrix
  awq      channels of large inputs scaled up, which the norm or layer before undoes
  gptq     rounding errors passed on to columns that are not yet rounded

All but rtn read calibration text: text like the model's own, some 50,000 tokens of it. One layer is
in memory at a time. A run that was killed goes on after its last finished layer, when it is given
again: what is finished lies in .NAME.quantizing beside --out until the output is whole.
"""

EXAMPLES = """
fastllm quantize ./my-model --format q4_k_m --out my-model-q4_k_m.gguf
fastllm quantize ./my-model --format q4_k_m --method imatrix --calibration text.txt --out m.gguf
fastllm quantize ./my-model --format int4 --method gptq --calibration text.txt --out ./my-int4
fastllm quantize ./my-model --format int8 --out ./my-int8
"""


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    options = _parser().parse_args(list(argv))
    use_threads(options.threads)
    from ..models.loader import read_tokenizer
    from ..models.names import resolve
    from ..models.quantizing.methods import Settings
    from ..models.quantizing.run import check_target, plan_of, quantize_files
    from ..models.weights import open_weights
    from ..quantize.mixes import resolve_format

    settings = Settings(
        format=resolve_format(options.format),
        method=options.method,
        damping=options.damping,
        act_order=not options.no_act_order,
        min_expert_tokens=options.min_expert_tokens,
    )
    check_target(Path(options.out), settings.format, options.overwrite)
    _check_options(options)
    source = open_weights(resolve(options.model))
    tokenizer = read_tokenizer(source)
    _say_plan(plan_of(source.config, settings).lines(), settings.format)
    rows, importance = _inputs(options, source.config, tokenizer)
    report = quantize_files(
        source, options.out, settings, tokenizer, calibration=rows, importance=importance,
        overwrite=options.overwrite, progress=_progress(),
    )  # fmt: skip
    if options.save_imatrix is not None and rows is not None:
        from ..models.imatrix import save_imatrix

        names = [os.path.basename(name) for name in options.calibration]
        save_imatrix(options.save_imatrix, report.sums, names, *rows.shape)
        note(f"{options.save_imatrix}: the importance matrix")
    _say_report(report)
    return 0


def _parser() -> Parser:
    parser = command_parser("quantize", DESCRIPTION, EXAMPLES)
    parser.add_argument("model", help="a path, a name of `fastllm models`, or a Hugging Face id")
    parser.add_argument("--format", required=True, metavar="F", help="see above")
    parser.add_argument("--out", required=True, metavar="PATH", help="the file or directory")
    add_method(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a model at --out")
    group: Any = parser.add_argument_group("calibration options")
    group.add_argument(
        "--calibration", action="append", default=None, metavar="FILE",
        help="text, .jsonl, .parquet or a folder; may be given again",
    )  # fmt: skip
    add_text_field(group)
    group.add_argument(
        "--samples", type=int, default=128, metavar="N", help="rows of tokens (default: 128)"
    )
    group.add_argument(
        "--length", type=int, default=512, metavar="L", help="tokens of a row (default: 512)"
    )
    group.add_argument(
        "--imatrix", default=None, metavar="FILE",
        help="of method imatrix: an importance matrix in place of calibration text",
    )  # fmt: skip
    group.add_argument(
        "--save-imatrix", default=None, metavar="FILE",
        help="of method imatrix: keep what was measured, as llama.cpp reads it",
    )  # fmt: skip
    group.add_argument(
        "--min-expert-tokens", type=int, default=64, metavar="N",
        help="experts that see fewer are rounded to nearest (default: 64)",
    )  # fmt: skip
    group = parser.add_argument_group("gptq options")
    group.add_argument(
        "--damping", type=float, default=0.01, metavar="X",
        help="share of the mean square that is added to every input's (default: 0.01)",
    )  # fmt: skip
    group.add_argument(
        "--no-act-order", action="store_true", help="columns in order, not by size of their inputs"
    )
    parser.add_argument(
        "--threads", type=int, default=None, metavar="N", help="CPU threads (default: PyTorch's)"
    )
    add_config(parser)
    return parser


def _check_options(options: Any) -> None:
    """Raise ValueError for options that do not go together, before files are read."""
    for name in ("imatrix", "save_imatrix"):
        if getattr(options, name) is not None and options.method != "imatrix":
            raise ValueError(f"--{name.replace('_', '-')} goes with --method imatrix")
    if options.imatrix is not None and (options.calibration or options.save_imatrix):
        raise ValueError("--imatrix takes the place of --calibration: give one of them")
    if options.save_imatrix is not None:
        _check_writable(Path(options.save_imatrix))
    if options.method != "rtn" and options.imatrix is None and not options.calibration:
        raise ValueError(f"--method {options.method} needs --calibration FILE")


def _check_writable(file: Path) -> None:
    """Raise OSError unless a file can be written there, which happens hours later."""
    if file.is_dir():
        raise IsADirectoryError(f"--save-imatrix {file} is a directory")
    try:
        with tempfile.TemporaryFile(dir=file.resolve().parent):
            pass
    except OSError as error:
        raise OSError(f"--save-imatrix {file} cannot be written: {error.strerror}") from error


def _inputs(
    options: Any, config: Any, tokenizer: Tokenizer
) -> tuple[Tensor | None, Mapping[str, Tensor] | None]:
    """Calibration rows, or an importance matrix, or neither."""
    if options.method == "rtn":
        if options.calibration:
            note("note: rtn reads no calibration text")
        return None, None
    if options.imatrix is not None:
        from ..models.imatrix import read_imatrix

        return None, read_imatrix(options.imatrix, config)
    length = min(options.length, config.max_position_embeddings)
    return calibration_tokens(options, tokenizer, length), None


def _say_plan(lines: Sequence[str], format: str) -> None:
    print(f"{format}:")
    for line in lines:
        print(f"  {line}")


def _say_report(report: Report) -> None:
    size = human_bytes(report.nbytes)
    rows: list[tuple[str, object]] = [
        ("bits per quantized weight", f"{report.bits_per_weight:.2f}"),
        ("bits per weight of the file", f"{report.file_bits:.2f}"),
    ]
    if report.errors:
        mean = sum(report.errors.values()) / len(report.errors)
        worst = max(report.errors, key=lambda name: report.errors[name])
        rows.append(("relative error, mean", f"{mean:.2e}"))
        rows.append(("relative error, largest", f"{report.errors[worst]:.2e} ({worst})"))
    print(f"{report.path}: {size}")
    facts(rows)


def _progress() -> Progress:
    """A bar in a terminal, a line for each layer elsewhere."""
    from ..models.quantizing.run import Progress

    class Lines(Progress):
        count = 0

        def begin(self, layers: int) -> None:
            self.count = layers

        def note(self, text: str) -> None:
            note(text)

        def layer(self, index: int, errors: Mapping[str, float], resumed: bool) -> None:
            note(f"layer {index + 1}/{self.count}: {_summary(errors, resumed)}")

    if not console().is_terminal:
        return Lines()
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    bars = Bars(
        TextColumn("quantizing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )

    class Bar(Progress):
        def begin(self, layers: int) -> None:
            bars.start()
            self.task = bars.add_task("", total=layers)

        def note(self, text: str) -> None:
            bars.console.print(text, markup=False)

        def layer(self, index: int, errors: Mapping[str, float], resumed: bool) -> None:
            bars.update(self.task, completed=index + 1, description=_summary(errors, resumed))

        def end(self) -> None:
            bars.stop()

    return Bar()


def _summary(errors: Mapping[str, float], resumed: bool) -> str:
    if not errors:
        return "nothing to quantize"
    mean = sum(errors.values()) / len(errors)
    text = f"relative error {mean:.2e}"
    return f"{text} (finished before)" if resumed else text
