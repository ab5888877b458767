"""`fastllm verify MODEL`: transformers beside itself on our kernels: is it the same, and faster?"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .parsing import Parser, command_parser, use_threads

DESCRIPTION = """
Loads a model into transformers and runs it unpatched and patched (fastllm.patch) side by side, on
random ids with padding and on text: logits, loss, the gradient of every parameter, greedy tokens.
Prints errors beside the bound (twice the unpatched model's own rounding error, measured against its
float32 copy where memory allows), what was replaced, and the speed-up.

The exit status is 0 if everything is equal within its bound, 1 if something is not, 2 if it could
not be run. GGUF files are dequantized first. Needs transformers: pip install
'fastllm-engine[bench]'.
"""

EXAMPLES = """
fastllm verify smollm2
fastllm verify ./my-model --dtype float32 --ops attention,norm
fastllm verify ./my-model --tokens 0 --no-speed --json
"""


def run(argv: Sequence[str]) -> int:
    """Run the command; 1 if the patched model is not the unpatched one."""
    options = _parser().parse_args(list(argv))
    shape = _shape(options.shape)
    use_threads(options.threads)
    from ..integrations.transformers.patching import OPS
    from ..integrations.transformers.verifying import verify
    from ..models.names import resolve

    ops = OPS if options.ops is None else tuple(options.ops.split(","))
    unknown = sorted(set(ops) - set(OPS))
    if unknown:
        raise ValueError(f"--ops: {', '.join(unknown)} unknown; there are {', '.join(OPS)}")
    if options.tokens < 0:
        raise ValueError(f"--tokens: at least 0, got {options.tokens}")
    texts = None if options.text is None else _paragraphs(Path(options.text))
    with tempfile.TemporaryDirectory() as scratch:
        folder = _folder(resolve(options.model), Path(scratch))
        model, tokenizer = _load(folder, options.dtype, options.device)
    if texts is not None and tokenizer is None:
        raise ValueError(f"--text: {options.model} has no tokenizer")
    found = verify(
        model,
        texts=texts,
        tokenizer=tokenizer,
        ops=ops,
        gradients=options.gradients,
        tokens=options.tokens,
        speed=options.speed,
        shape=shape,
    )
    if options.json:
        print(json.dumps({"path": options.model, **found.as_dict()}))
    else:
        print(found.report if options.report else "", found, sep="\n" if options.report else "")
    return found.exit_code


def _parser() -> Parser:
    parser = command_parser("verify", DESCRIPTION, EXAMPLES)
    parser.add_argument("model", help="a path, a name of `fastllm models`, or a Hugging Face id")
    parser.add_argument("--ops", default=None, metavar="A,B", help="replace only these parts")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], default=None,
        help="of the parameters (default: as the files have them)",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--text", default=None, metavar="FILE", help="real inputs: paragraphs")
    parser.add_argument(
        "--shape", default="2x128", metavar="ROWSxLENGTH",
        help="of the random batch, which is also timed (default: 2x128)",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=int, default=32, metavar="N", help="greedy tokens a row (default: 32)"
    )
    parser.add_argument(
        "--no-gradients", dest="gradients", action="store_false", help="forward and decode alone"
    )
    parser.add_argument("--no-speed", dest="speed", action="store_false", help="measure no time")
    parser.add_argument("--report", action="store_true", help="also list every layer")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--threads", type=int, default=None, metavar="N", help="CPU threads (default: PyTorch's)"
    )
    return parser


def _shape(text: str) -> tuple[int, int]:
    rows, _, length = text.partition("x")
    if not (rows.isdigit() and length.isdigit() and int(rows) >= 1 and int(length) >= 4):
        raise ValueError(f"--shape: ROWSxLENGTH is needed, such as 2x128, not {text!r}")
    return int(rows), int(length)


def _paragraphs(path: Path) -> list[str]:
    """The first four paragraphs of a text file."""
    pieces = [piece.strip() for piece in path.read_text(encoding="utf-8").split("\n\n")]
    found = [piece for piece in pieces if piece][:4]
    if not found:
        raise ValueError(f"--text: {path} has no text")
    return found


def _folder(path: Path, scratch: Path) -> Path:
    """The Hugging Face directory of a model; of a GGUF file one is written to `scratch`."""
    if path.is_dir():
        return path
    from ..models.gguf import GGUFFile
    from ..models.gguf_export import export_hf, weights_of
    from ..models.loader import read_tokenizer
    from ..models.weights import GGUFWeights

    source = GGUFWeights(GGUFFile.open(path))
    has_tokenizer = "tokenizer.ggml.model" in source.file.metadata
    folder = scratch / "model"
    tokenizer = read_tokenizer(source) if has_tokenizer else None
    export_hf(weights_of(source, None), folder, "bf16", tokenizer)
    return folder


def _load(folder: Path, dtype: str | None, device: str) -> tuple[Any, Any]:
    """The model in transformers, and its tokenizer or None; code of a checkpoint never runs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype or "auto", trust_remote_code=False, local_files_only=True
    )
    has_tokenizer = any((folder / name).exists() for name in ("tokenizer.json", "vocab.json"))
    tokenizer = None
    if has_tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return model.to(device), tokenizer
