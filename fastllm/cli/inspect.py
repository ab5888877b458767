"""`fastllm inspect MODEL`: metadata, tensors, formats and memory of a model file, unloaded."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelFileError
from .console import facts, heading, human_bytes, table
from .parsing import command_parser

if TYPE_CHECKING:
    from ..models.config import ModelConfig

DESCRIPTION = """
Shows what a GGUF file or a Hugging Face directory holds: metadata, the shapes and formats of its
tensors, bits per weight, and how much memory the model and its cache take. The weights are mapped
and not read, so this is quick for a file of any size; a file that fastllm cannot run is shown too,
with the reason.
"""

EXAMPLES = """
fastllm inspect smollm2
fastllm inspect model.gguf --tensors
fastllm inspect ./Qwen3-0.6B
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor as the file describes it."""

    name: str
    shape: tuple[int, ...]
    format: str
    nbytes: int

    @property
    def values(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = command_parser("inspect", DESCRIPTION, EXAMPLES)
    parser.add_argument("model", help="a path, a name of `fastllm models`, or a Hugging Face id")
    parser.add_argument(
        "--tensors", action="store_true", help="list every tensor, not one line per kind"
    )
    options = parser.parse_args(list(argv))
    from ..models.names import resolve

    path = resolve(options.model)
    metadata, entries, config, problem = _read(path)
    heading(str(path))
    facts([(shorten(key), shorten(value)) for key, value in metadata.items()])
    heading("Tensors")
    _show_tensors(entries, every=options.tensors)
    heading("Formats")
    _show_formats(entries)
    heading("Memory")
    _show_memory(entries, config)
    if problem:
        print(f"\nfastllm cannot run this model: {shorten(problem, 1000)}")
    return 0


def _read(path: Path) -> tuple[dict[str, Any], list[Entry], ModelConfig | None, str]:
    from ..models.config import ModelConfig
    from ..models.fields import read_json_object
    from ..models.gguf import GGUFFile
    from ..models.quantized_files import QuantizedFiles, open_directory
    from ..models.safetensors_files import SafetensorsFiles

    if path.is_dir():
        problem = ""
        try:
            files: SafetensorsFiles | QuantizedFiles = open_directory(path)
        except ModelFileError as error:  # shown as it is stored
            files, problem = SafetensorsFiles.open(path), str(error)
        entries = [Entry(n, e.shape, e.dtype.lower(), e.nbytes) for n, e in files.entries.items()]
        metadata = read_json_object(path / "config.json")
    else:
        gguf = GGUFFile.open(path)
        tensors = gguf.tensors.values()
        entries = [Entry(t.name, t.shape, t.type_name.lower(), t.nbytes) for t in tensors]
        metadata = {"gguf version": gguf.version, **gguf.metadata}
    try:
        if path.is_dir():
            return metadata, entries, ModelConfig.from_directory(path), problem
        config = ModelConfig.from_gguf(gguf.metadata, gguf.tensors, path)
    except ModelFileError as error:
        return metadata, entries, None, str(error)
    return metadata, entries, config, ""


def shorten(value: Any, width: int = 80) -> str:
    """A metadata value on one line, with nothing in it that a terminal would obey."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) > 8:
            first = islice(value, 4)  # decodes no more than these of a vocabulary
            return f"{len(value)} values: {', '.join(shorten(v, 20) for v in first)}, ..."
        return ", ".join(shorten(v, 20) for v in value)
    text = " ".join(str(value).split()) if isinstance(value, str) else str(value)
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: width + 1])
    return text if len(text) <= width else text[: width - 3] + "..."


def _show_tensors(entries: Iterable[Entry], *, every: bool) -> None:
    kinds: Counter[tuple[str, str, str]] = Counter()
    nbytes: Counter[tuple[str, str, str]] = Counter()
    for entry in entries:
        name = entry.name if every else re.sub(r"(?<=\.)\d+(?=\.)", "*", entry.name)
        kind = (shorten(name), " x ".join(map(str, entry.shape)), entry.format)
        kinds[kind] += 1
        nbytes[kind] += entry.nbytes
    rows = [[*kind, count, human_bytes(nbytes[kind])] for kind, count in kinds.items()]
    table(["name", "shape", "format", "count", "bytes"], rows, right=["count", "bytes"])


def _show_formats(entries: Sequence[Entry]) -> None:
    rows = []
    for name in dict.fromkeys(entry.format for entry in entries):
        rows.append((name, [entry for entry in entries if entry.format == name]))
    rows.append(("all", list(entries)))
    table(
        ["format", "tensors", "values", "bytes", "bits per value"],
        [
            [
                name,
                len(group),
                f"{sum(e.values for e in group):,}",
                human_bytes(sum(e.nbytes for e in group)),
                f"{8 * sum(e.nbytes for e in group) / max(1, sum(e.values for e in group)):.2f}",
            ]
            for name, group in rows
        ],
        right=["tensors", "values", "bytes", "bits per value"],
    )


def _show_memory(entries: Sequence[Entry], config: ModelConfig | None) -> None:
    pairs: list[tuple[str, object]] = [("weights", human_bytes(sum(e.nbytes for e in entries)))]
    if config is not None and config.experts is not None:
        experts = config.experts
        chosen = f"{experts.per_token} of {experts.num_experts} a token"
        if experts.shared:
            chosen += f", {experts.shared} shared"
        pairs.append(("experts", f"{chosen}, {experts.moe_intermediate_size} columns each"))
    if config is not None:
        per_token = config.num_hidden_layers * config.cache_values
        length = config.max_position_embeddings
        pairs += [
            ("cache per token", f"{human_bytes(2 * per_token)} in bfloat16"),
            ("cache of a full context", f"{human_bytes(2 * per_token * length)} ({length} tokens)"),
        ]
    facts(pairs)
