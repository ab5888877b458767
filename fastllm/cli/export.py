"""`fastllm export MODEL --out PATH`: a GGUF file or a Hugging Face directory, adapters merged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .console import human_bytes, note
from .parsing import command_parser

DESCRIPTION = """
Writes a model for other programs: a GGUF file, which llama.cpp runs, or a Hugging Face directory,
which transformers loads. The tokenizer and its chat template go with it. With --adapter a LoRA
adapter is merged into the weights first. Matrices that are in the wanted type already are copied
as they are; vectors of a GGUF file are F32.
"""

EXAMPLES = """
fastllm export ./my-model --type q8_0 --out my-model-q8_0.gguf
fastllm export smollm2 --adapter ./my-adapter --type q4_0 --out tuned.gguf
fastllm export smollm2 --adapter ./my-adapter --format hf --out ./tuned
"""

_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1")


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = command_parser("export", DESCRIPTION, EXAMPLES)
    parser.add_argument("model", help="a path, a name of `fastllm models`, or a Hugging Face id")
    parser.add_argument("--out", required=True, metavar="PATH", help="the file or directory")
    parser.add_argument(
        "--format", choices=["gguf", "hf"], default="gguf", help="what to write (default: gguf)"
    )
    parser.add_argument(
        "--type", choices=list(_TYPES), default=None, help="of matrices (default: bf16)"
    )
    parser.add_argument(
        "--adapter", metavar="DIR", default=None, help="merge the LoRA adapter of a directory"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model at --out")
    options = parser.parse_args(list(argv))
    from ..models.adapters import read_adapter
    from ..models.gguf_export import export_gguf, export_hf, weights_of
    from ..models.loader import read_tokenizer
    from ..models.names import resolve
    from ..models.weights import open_weights

    source = open_weights(resolve(options.model))
    adapter = None if options.adapter is None else read_adapter(options.adapter)
    write = export_gguf if options.format == "gguf" else export_hf
    write(
        weights_of(source, adapter),
        options.out,
        options.type or "bf16",
        read_tokenizer(source),
        overwrite=options.overwrite,
    )
    note(f"{options.out}: {human_bytes(_size(Path(options.out)))}")
    return 0


def _size(path: Path) -> int:
    files = [path] if path.is_file() else path.iterdir()
    return sum(file.stat().st_size for file in files)
