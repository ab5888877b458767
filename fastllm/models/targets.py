"""Where a model may be written: never over what was not one, nor over the model that is read."""

from __future__ import annotations

import os
from fnmatch import fnmatch
from pathlib import Path

# What fastllm and transformers write for a model, and nothing that a user would.
_MODEL_FILES = (
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "chat_template.json", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip


def resolved(path: str | os.PathLike[str]) -> Path:
    """Where a model is really written: what a symbolic link leads to is replaced, not the link."""
    target = Path(path)
    return target.resolve() if target.is_symlink() else target


def check_replaceable(target: Path) -> None:
    """Raise FileExistsError unless a directory is a model's and may be deleted for a new one.

    An empty one may, too.
    """
    entries = sorted(target.iterdir())
    if entries and not (target / "config.json").is_file():
        raise FileExistsError(
            f"{target} is not replaced: it is no model's directory (it has no config.json)"
        )
    others = [entry.name for entry in entries if not _is_model_file(entry)]
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        raise FileExistsError(
            f"{target} is not replaced: it holds what is no model's file: "
            f"{', '.join(others[:5])}{more}"
        )


def check_apart(target: Path, source: Path) -> None:
    """Raise ValueError if writing at `target` would change the model that is read at `source`.

    A GGUF file may lie in the directory of its source.
    """
    place, model = target.resolve(), source.resolve()
    is_gguf = place.suffix.lower() == ".gguf" and not place.is_dir()
    inside = model in place.parents and not is_gguf
    if place == model or inside or place in model.parents:
        raise ValueError(
            f"{target} is not written: the model that is read lies there ({source}); "
            "give another place"
        )


def _is_model_file(entry: Path) -> bool:
    return entry.is_file() and any(fnmatch(entry.name, pattern) for pattern in _MODEL_FILES)
