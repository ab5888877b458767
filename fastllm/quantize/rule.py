"""Which layers of a model are quantized, to what, and what came of it: `QuantRule`, `QuantReport`.

A layer whose rows do not fit the format that was asked for gets the one that `fit` names, and the
report says so. Embeddings, routers and heads stay as they are unless they are asked for by name.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ops.quant_format import fit, format_of
from ..tables import plain_table

# Last parts of the names of layers that are small and decide much: heads and routers.
DEFAULT_SKIP = (
    "lm_head", "embed_out", "score", "classifier", "router", "gate", "shared_expert_gate",
)  # fmt: skip


class FallbackWarning(UserWarning):
    """Weights did not get the format that was asked for."""


@dataclass(frozen=True, slots=True)
class QuantRule:
    """One format for the layers that are chosen, or a mix of formats.

    format: a name or alias of `fastllm.ops.quant_format`; kept under its full name.
    modules: a regular expression that is searched in the names of layers; None: all of them.
    skip: layers by their name or its last parts ("lm_head", "mlp.gate"), which stay as they are.
    mix: the name of a mix ("q4_k_m"), in which `raised` are the layers of other formats.
    """

    format: str
    modules: str | re.Pattern[str] | None = None
    skip: Sequence[str] = DEFAULT_SKIP
    mix: str | None = None
    raised: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        found = format_of(self.format)
        if found.dense:
            raise ValueError(f"format {found.name!r} is not quantized: nothing would change")
        object.__setattr__(self, "format", found.name)
        if isinstance(self.skip, str):
            object.__setattr__(self, "skip", (self.skip,))
        if isinstance(self.modules, str):
            try:
                object.__setattr__(self, "modules", re.compile(self.modules))
            except re.error as error:
                raise ValueError(f"modules {self.modules!r} is no pattern: {error}") from None

    def chooses(self, name: str) -> bool:
        """Whether the layer of that name is to be quantized."""
        if any(name == part or name.endswith(f".{part}") for part in self.skip):
            return False
        return self.modules is None or re.search(self.modules, name) is not None

    @property
    def label(self) -> str:
        """What people call it: the mix or the format."""
        return self.mix or self.format

    def wanted(self, name: str) -> str:
        """The format of a chosen layer, if its rows fit it."""
        return self.raised.get(name, self.format)

    def format_for(self, name: str, k: int) -> str | None:
        """The format that the layer gets, whose rows have k columns; None: it stays as it is."""
        return fit(self.wanted(name), k) if self.chooses(name) else None


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """What became of one weight."""

    name: str
    shape: tuple[int, ...]
    format: str  # really used
    bits: float  # stored for each value, scales included
    error: float | None  # sum of squared differences, as a share of the sum of squares
    wanted: str  # what the rule asked for

    @property
    def fell(self) -> bool:
        """Whether the wanted format did not fit."""
        return self.format != self.wanted


@dataclass(slots=True)
class QuantReport:
    """What a quantization did; `print(report)` shows it as a table.

    layers: what was quantized. kept: (name, reason) of linear layers that were not. unfit: the
    columns of those of them that no quantized format fits. bytes_before, bytes_after: of the
    model's weights.
    """

    format: str
    layers: list[QuantizedLayer] = field(default_factory=list)
    kept: list[tuple[str, str]] = field(default_factory=list)
    unfit: list[int] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0

    @property
    def error(self) -> float | None:
        """The mean of the layers' errors, each counted by its size; None: not measured."""
        known = [(x.error, math.prod(x.shape)) for x in self.layers if x.error is not None]
        return _mean(known) if known else None

    @property
    def bits(self) -> float:
        """Stored bits for each quantized value."""
        return _mean([(x.bits, math.prod(x.shape)) for x in self.layers])

    def add(
        self, name: str, shape: tuple[int, ...], format: str, wanted: str, nbytes: int,
        error: float | None,
    ) -> None:  # fmt: skip
        """Note what became of one weight of that shape."""
        bits = 8 * nbytes / max(math.prod(shape), 1)
        self.layers.append(QuantizedLayer(name, shape, format, bits, error, wanted))

    def keep(self, name: str, reason: str) -> None:
        """Note a layer that stays as it is because nobody asked for it."""
        self.kept.append((name, reason))

    def cannot(self, name: str, k: int) -> None:
        """Note a layer that stays as it is because its rows of k columns fit no format."""
        self.kept.append((name, f"no quantized format fits rows of {k} columns"))
        self.unfit.append(k)

    def fallbacks(self) -> list[str]:
        """A sentence for each kind of layer that did not get the wanted format."""
        kinds = Counter((x.format, x.wanted, x.shape[-1]) for x in self.layers if x.fell)
        dense = Counter(("as they were", self.format, k) for k in self.unfit)
        count = len(self.layers) + len(self.unfit)
        return [
            f"{some} of {count} weights are {format}, not {wanted}: rows of {k} columns do not fit"
            for (format, wanted, k), some in (kinds + dense).items()
        ]

    def warn(self) -> None:
        """A FallbackWarning if layers did not get the wanted format."""
        if found := self.fallbacks():
            warnings.warn("; ".join(found), FallbackWarning, stacklevel=3)

    def summary(self) -> str:
        """One line."""
        error = "" if self.error is None else f", squared error {self.error:.2e}"
        sizes = f"{_size(self.bytes_before)} -> {_size(self.bytes_after)}"
        return (
            f"{len(self.layers)} weights quantized to {self.format}: {self.bits:.2f} bits each"
            f"{error}; {sizes}"
        )

    def __str__(self) -> str:
        head = ("layer", "shape", "format", "bits", "squared error")
        rows = [
            (
                layer.name,
                " x ".join(map(str, layer.shape)),
                layer.format + (f" (not {layer.wanted})" if layer.fell else ""),
                f"{layer.bits:.2f}",
                "-" if layer.error is None else f"{layer.error:.2e}",
            )
            for layer in self.layers
        ]
        lines = plain_table(head, rows, right=("bits", "squared error"))
        lines += [f"kept: {name} ({reason})" for name, reason in self.kept]
        return "\n".join([*lines, *self.fallbacks(), self.summary()])


def squared_error(weight: Tensor, values: Tensor) -> float:
    """sum (weight - values)^2 / sum weight^2; 0 for a weight of zeros that is kept exactly."""
    difference = torch.zeros((), dtype=torch.float64, device=weight.device)
    total = torch.zeros_like(difference)
    for w, v in zip(weight.split(1024), values.split(1024), strict=True):
        difference += (w.float() - v.float()).square().sum(dtype=torch.float64)
        total += w.float().square().sum(dtype=torch.float64)
    return float(difference / total) if total else float(difference)


def _mean(weighted: Sequence[tuple[float, int]]) -> float:
    return sum(value * size for value, size in weighted) / max(sum(s for _, s in weighted), 1)


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"
