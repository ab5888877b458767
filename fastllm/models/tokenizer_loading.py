"""The tokenizer that a name means: a directory's, a GGUF file's, or a model's."""

from __future__ import annotations

import os

from fastllm.models.gguf import GGUFFile
from fastllm.models.names import resolve
from fastllm.models.tokenizer import Tokenizer


def load_tokenizer(name: str | os.PathLike[str]) -> Tokenizer:
    """Read the tokenizer of a directory with tokenizer.json, of a GGUF file, or of a model's name.

    Raises ModelFileError, or ModelNotFoundError saying what was tried.
    """
    path = resolve(name)
    if path.is_dir():
        return Tokenizer.from_hf(path)
    return Tokenizer.from_gguf(GGUFFile.open(path).metadata, file=path)
