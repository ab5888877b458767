"""The table of `fastllm eval perplexity --formats`: what each format of a model costs and gives."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import human_bytes, note, paced_note, table
from .eval import measured, numbers, read_text
from .parsing import use_threads
from .reading import METHODS, calibration_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine.llm import LLM
    from ..engine.perplexity import Score
    from ..models.quantizing.run import Progress
    from ..models.tokenizer import Tokenizer
    from ..models.weights import WeightSource

DENSE = ("f32", "bf16")
PROMPT, ANSWER = 512, 64  # tokens of the timed prompt and of the timed answer
ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Row:
    """A format: bits_per_weight and nbytes are of all weights, speeds in tokens a second."""

    format: str
    method: str
    bits_per_weight: float
    nbytes: int
    perplexity: float
    bits_per_byte: float
    difference: float
    error: float
    decode: float | None
    prefill: float | None
    activation: str


def compare(options: Any) -> int:
    """Quantize to each format, measure, print."""
    use_threads(options.threads)
    if options.adapter is not None or options.quant is not None:
        raise ValueError("--formats takes a model alone: merge an adapter with `fastllm export`")
    from ..models.loader import is_quantized, read_tokenizer
    from ..models.names import resolve
    from ..models.weights import open_weights

    wanted = wanted_rows(options.formats, options.method)
    source = open_weights(resolve(options.model))
    tokenizer = read_tokenizer(source)
    documents, nbytes = read_text(options, tokenizer)
    calibration = _calibration(options, wanted, source, tokenizer)
    rows: list[Row] = []
    first: Score | None = None
    for format, method in wanted:
        label = _label(format, method)
        with _made(format, method, source, tokenizer, calibration, options) as path:
            llm = _load(path, format, options)
            score = measured(llm.model, documents, nbytes, options, label)
            first = score if first is None else first
            rows.append(_row(format, method, path, llm, score, first, options))
            note(f"{label}: perplexity {score.perplexity:.4f}")
            del llm
    notes = _notes(options, source, is_quantized(source), len(documents), rows)
    prompt = _prompt(_longest(options, source.config.max_position_embeddings))
    _show(options, rows, notes, first, prompt)
    return 0


def wanted_rows(text: str, method: str) -> list[tuple[str, str]]:
    """(format, method) of each entry of a list with commas, "int4" or "int4:gptq"; each once.

    method: of entries that name none; dense formats have "". Raises ValueError naming an entry
    that is none.
    """
    from ..quantize.mixes import resolve_format

    rows = []
    for entry in filter(None, map(str.strip, text.lower().split(","))):
        name, _, own = entry.partition(":")
        if own and own not in METHODS:
            raise ValueError(f"--formats: {entry!r}: methods are {', '.join(METHODS)}")
        if name in DENSE:
            if own:
                raise ValueError(f"--formats: {entry!r}: {name} is not quantized, by no method")
            rows.append((name, ""))
        else:
            rows.append((resolve_format(name), own or method))
    if not rows:
        raise ValueError("--formats is empty: give some, such as f32,q8_0,q4_k_m,int4")
    return list(dict.fromkeys(rows))


def _label(format: str, method: str) -> str:
    return f"{format} ({method})" if method not in ("", "rtn") else format


def _calibration(
    options: Any, wanted: Sequence[tuple[str, str]], source: WeightSource, tokenizer: Tokenizer
) -> Tensor | None:
    methods = [method for _, method in wanted if method not in ("", "rtn")]
    if not methods:
        if options.calibration:
            note("note: rtn reads no calibration text")
        return None
    if not options.calibration:
        raise ValueError(f"--method {methods[0]} needs --calibration FILE")
    length = min(512, source.config.max_position_embeddings)
    return calibration_tokens(options, tokenizer, length)


@contextmanager
def _made(
    format: str, method: str, source: WeightSource, tokenizer: Tokenizer,
    calibration: Tensor | None, options: Any,
) -> Iterator[Path]:  # fmt: skip
    """The model in that format, on disk for a while."""
    from ..models.gguf_export import export_hf, weights_of
    from ..models.quantizing.methods import Settings
    from ..models.quantizing.run import plan_of, quantize_files
    from ..quantize.mixes import MIXES

    with tempfile.TemporaryDirectory(prefix="fastllm-", dir=options.work) as folder:
        path = Path(folder, f"model-{format}" + (".gguf" if format in MIXES else ""))
        if format in DENSE:
            export_hf(weights_of(source), path, format, tokenizer)
        else:
            settings, label = Settings(format=format, method=method), _label(format, method)
            for line in plan_of(source.config, settings).fallen_lines():
                note(f"{label}: {line}")
            quantize_files(
                source, path, settings, tokenizer,
                calibration=None if method == "rtn" else calibration, progress=_progress(label),
            )  # fmt: skip
        yield path


def _progress(label: str) -> Progress:
    """Notes at once, and a line about layers every 10 seconds."""
    from ..models.quantizing.run import Progress

    say = paced_note()

    class Lines(Progress):
        count = 0

        def begin(self, layers: int) -> None:
            self.count = layers

        def note(self, text: str) -> None:
            note(f"{label}: {text}")

        def layer(self, index: int, errors: Mapping[str, float], resumed: bool) -> None:
            say(f"{label}: quantized {index + 1} of {self.count} layers")

    return Lines()


def _load(path: Path, format: str, options: Any) -> LLM:
    from ..engine.llm import LLM
    from ..models.weights import open_weights

    activation = None if format in DENSE else options.activation
    dtype = options.dtype
    if format in DENSE:
        dtype = {"f32": "float32", "bf16": "bfloat16"}[format]
    longest = _longest(options, open_weights(path).config.max_position_embeddings)
    return LLM(
        path, dtype=dtype, device=options.device, activation=activation,
        max_model_len=longest, max_num_seqs=1, kv_cache_dtype=options.kv_cache_dtype,
    )  # fmt: skip


def _longest(options: Any, positions: int) -> int:
    """Positions of a model that is loaded for its row."""
    return options.max_model_len or min(max(options.length, PROMPT + ANSWER), positions)


def _activation(format: str, llm: LLM) -> str:
    """How a format's codes meet inputs: e4m3 has no int8 products."""
    from ..ops.quant_format import QUANT_FORMATS

    kind, own = QUANT_FORMATS.get(format), llm.model.activation
    return own if kind is None or kind.dense else kind.mode(own)


def _row(
    format: str, method: str, path: Path, llm: LLM, score: Score, first: Score, options: Any
) -> Row:
    nbytes, values = weight_bytes(path)
    excess, error = score.excess(first)
    decode, prefill = (None, None) if options.no_speed else speeds(llm)
    return Row(
        format=format,
        method=method,
        bits_per_weight=8 * nbytes / values,
        nbytes=nbytes,
        perplexity=score.perplexity,
        bits_per_byte=score.bits_per_byte,
        difference=score.perplexity - first.perplexity,
        error=0.0 if excess == 0 else first.perplexity * error,
        decode=decode,
        prefill=prefill,
        activation=_activation(format, llm),
    )


def weight_bytes(path: Path) -> tuple[int, int]:
    """(bytes, number) of the weights of a model's files."""
    from ..models.weights import GGUFWeights, open_weights

    source = open_weights(path)
    tensors = source.file.tensors if isinstance(source, GGUFWeights) else source.files.entries
    values = sum(math.prod(shape) for shape in source.config.weight_shapes().values())
    return sum(tensor.nbytes for tensor in tensors.values()), values


def _prompt(positions: int) -> int:
    """Tokens of the timed prompt of a model with so many positions."""
    return min(PROMPT, positions - 1)


def speeds(llm: LLM) -> tuple[float, float]:
    """(decode, prefill) in tokens a second: the best of a few alternating rounds."""
    import torch

    from ..engine.request import SamplingParams
    from ..testing.timing import alternate

    start, vocab = llm.config.bos_token_id or 0, llm.config.vocab_size
    g = torch.Generator().manual_seed(0)
    size = _prompt(llm.max_model_len)

    def params(tokens: int) -> SamplingParams:
        return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False)

    def prompt() -> list[int]:  # another each time: no cache of prefixes answers it
        return torch.randint(0, vocab, (size,), generator=g).tolist()

    samples = alternate(
        {
            "decode": lambda: llm.generate([[start]], params(ANSWER)),
            "prefill": lambda: llm.generate([prompt()], params(1)),
        },
        seconds=0.0,
        min_rounds=ROUNDS,
        device=llm.model.device.type,
    )
    return ANSWER / samples["decode"].best, size / samples["prefill"].best


def _notes(
    options: Any, source: WeightSource, quantized: bool, documents: int, rows: Sequence[Row]
) -> list[str]:
    kinds = {format for name in source.names if (format := source.format(name)).startswith("q")}
    lines = []
    if quantized:
        own = ", ".join(sorted(kinds)) or "a quantized format"
        lines.append(
            f"{options.model} is itself quantized ({own}): f32 is its dequantized values, and "
            "formats whose grid is near that one look better than they are"
        )
    longest = _longest(options, source.config.max_position_embeddings)
    length = min(options.length, longest)
    texts = "1 document" if documents == 1 else f"{documents} documents"
    lines.append(
        f"windows of {length} tokens, stride {options.stride or length}, {texts}; activations "
        + ", ".join(dict.fromkeys(f"{row.format} {row.activation}" for row in rows))
    )
    if not options.no_speed:
        lines.append(
            f"speeds: best of {ROUNDS} rounds, {ANSWER} tokens after one token, and a prompt of "
            f"{_prompt(longest)}"
        )
    return lines


def _show(
    options: Any, rows: Sequence[Row], notes: Sequence[str], first: Score | None, prompt: int
) -> None:
    if options.json:
        assert first is not None, "there is a format"
        kept = {key: numbers(first)[key] for key in ("tokens", "bytes")}
        print(json.dumps({
            "model": options.model, **kept, "rows": [asdict(row) for row in rows],
            "notes": list(notes),
        }))  # fmt: skip
        return
    columns = ["format", "bits/weight", "size", "perplexity", "difference"]
    if not options.no_speed:
        columns += ["decode tok/s", f"prefill({prompt}) tok/s"]
    cells = [_cells(row, first_row=number == 0)[: len(columns)] for number, row in enumerate(rows)]
    if options.markdown:
        for line in markdown(columns, cells):
            print(line)
        print()
    else:
        table(columns, cells, right=columns[1:])
    for line in notes:
        print(f"- {line}" if options.markdown else f"  {line}")


def _cells(row: Row, *, first_row: bool) -> list[str]:
    return [
        _label(row.format, row.method),
        f"{row.bits_per_weight:.2f}",
        human_bytes(row.nbytes),
        f"{row.perplexity:.3f}",
        "" if first_row else f"{row.difference:+.3f} ± {row.error:.3f}",
        "" if row.decode is None else f"{row.decode:.0f}",
        "" if row.prefill is None else f"{row.prefill:.0f}",
    ]


def markdown(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table; the first column to the left, others to the right."""
    rule = ["---", *("---:" for _ in columns[1:])]
    return ["| " + " | ".join(line) + " |" for line in (columns, rule, *cells)]
