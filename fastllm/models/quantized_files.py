"""Hugging Face directories whose matrices are quantized: their weights under plain names.

`entries` and `get` are those of `SafetensorsFiles`, except that the tensors of a quantized matrix
count as one weight, `<module>.weight`, of the matrix's own shape. What is quantized is told by the
tensors that are there, so modules that the configuration leaves out come out as they are stored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from fastllm.errors import ModelFileError
from fastllm.models.fields import MAX_CONFIG_BYTES, Fields, read_json_object
from fastllm.models.quantized_layouts import EXPANDED, Layout, layout_of
from fastllm.models.safetensors_files import SafetensorsEntry, SafetensorsFiles
from fastllm.models.stored_tensor import StoredTensor

# of activations and of caches, which are quantized here as the model runs
_NOT_WEIGHTS = (
    ".input_scale", ".input_zero_point", ".output_scale", ".activation_scale", ".q_scale",
    ".k_scale", ".v_scale", ".input_global_scale",
)  # fmt: skip


class QuantizedFiles:
    """The weights of one directory: `entries` by plain name; `get` reads one."""

    def __init__(self, files: SafetensorsFiles, layout: Layout) -> None:
        self.files = files
        self.layout = layout
        self.entries: dict[str, SafetensorsEntry] = {}
        self._parts: dict[str, dict[str, str]] = {}  # of plain names: part -> name in the files
        modules = self._modules()
        taken = {name for parts in modules.values() for name in parts.values()}
        for module, parts in modules.items():
            name = f"{module}.weight"
            self._parts[name] = parts
            self.entries[name] = self._describe(module, parts)
        for name, entry in files.entries.items():
            if name not in taken and not name.endswith(_NOT_WEIGHTS):
                self.entries[name] = entry

    def drop_empty_biases(self, known: Collection[str]) -> None:
        """Forget biases of quantized modules that a model has not, if all of them are zero.

        Some versions of AutoGPTQ wrote such a bias for every module.
        """
        for name in [name for name in self.entries if name.endswith(".bias")]:
            module = name.removesuffix(".bias")
            if name not in known and f"{module}.weight" in self._parts:
                if not bool(self.files.get(name).data.any()):
                    del self.entries[name]

    def _modules(self) -> dict[str, dict[str, str]]:
        """The tensors of each quantized module, by part."""
        found: dict[str, dict[str, str]] = {}
        longest_first = sorted(self.layout.parts, key=len, reverse=True)
        for name in self.files.entries:
            for part in longest_first:
                if name.endswith("." + part):
                    found.setdefault(name[: -len(part) - 1], {})[part] = name
                    break
        keys = self.layout.keys
        return {m: parts for m, parts in found.items() if any(key in parts for key in keys)}

    def _describe(self, module: str, parts: Mapping[str, str]) -> SafetensorsEntry:
        entries = {part: self.files.entries[name] for part, name in parts.items()}
        first = next(iter(entries.values()))
        try:
            shape, format = self.layout.describe(
                module, entries, lambda part: self._tensor(parts[part])
            )
        except ModelFileError:
            raise
        except ValueError as error:
            raise ModelFileError(first.file, f"{module}.weight", str(error)) from None
        return SafetensorsEntry(first.file, format, shape, sum(e.nbytes for e in entries.values()))

    def _tensor(self, name: str) -> Tensor:
        return self.files.tensor(name)

    def get(self, name: str) -> StoredTensor:
        """One weight: a matrix in its quantized form, or a view of the mapped file."""
        parts = self._parts.get(name)
        if parts is None:
            return self.files.get(name)
        entry, module = self.entries[name], name.removesuffix(".weight")
        try:
            stored = self.layout.load(module, {p: self._tensor(own) for p, own in parts.items()})
        except ModelFileError:
            raise
        except (ValueError, KeyError) as error:
            text = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
            raise ModelFileError(entry.file, name, f"({self.layout.name}) {text}") from None
        if stored.shape != entry.shape:
            raise ModelFileError(
                entry.file, name, f"holds {list(stored.shape)}, {list(entry.shape)} was announced"
            )
        return stored

    @property
    def expanded(self) -> list[str]:
        """Matrices that come out as numbers, because no format of ours holds their codes."""
        return [name for name in self._parts if self.entries[name].dtype == EXPANDED]

    def release(self) -> None:
        """As `SafetensorsFiles.release`."""
        self.files.release()


def open_directory(directory: Path) -> SafetensorsFiles | QuantizedFiles:
    """The weights of a directory, quantized as its config.json says.

    Raises:
        ModelFileError: naming file, tensor or key, and the remedy.
    """
    files = SafetensorsFiles.open(directory)
    file = directory / "config.json"
    config = Fields(read_json_object(file, MAX_CONFIG_BYTES), file)
    quantization = config.section("quantization_config")
    return files if quantization is None else QuantizedFiles(files, layout_of(quantization))
