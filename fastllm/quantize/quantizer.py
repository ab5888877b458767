"""`Quantizer`: rounds the weights that a rule chooses, one at a time, and keeps a report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..ops import packed_layout as layout
from ..ops.pages import Arena
from ..ops.registry import FLOATS
from . import packed as packing
from .packed import PackedWeight, unpack
from .packed_experts import PackedExperts, empty_experts, pack_expert_, set_expert_
from .rule import QuantReport, QuantRule, squared_error

# Scales of fp16 reach 65,504, and none is above the largest magnitude of what it scales.
ALWAYS_FITS = 65504.0 / 2


class Quantizer:
    """Round to nearest by `rule`, for models that are loaded or changed layer by layer.

    measure: compare what was stored with what was given: about as long again. `leave`: names of
    layers that cannot be quantized, whatever the rule says; the report has them already.
    """

    def __init__(self, rule: QuantRule, *, measure: bool = True) -> None:
        self.rule = rule
        self.measure = measure
        self.report = QuantReport(rule.label)
        self.leave: set[str] = set()

    def format_for(self, name: str, shape: tuple[int, ...]) -> str | None:
        """The quantized format of a layer's weight [n, k]; None, and a note, if it stays dense."""
        if name in self.leave:
            return None
        if not self.rule.chooses(name):
            self.report.keep(name, "not chosen")
            return None
        if 0 in shape:
            self.report.keep(name, "its weight is empty")
            return None
        format = self.rule.format_for(name, shape[-1])
        if format is None or format in layout.DENSE:
            self.report.cannot(name, shape[-1])
            return None
        return format

    def check(self, name: str, weight: Tensor, format: str) -> None:
        """Raise ValueError naming the layer if `pack` would; nothing is kept, nothing reported."""
        usual = weight.dtype in FLOATS and weight.device.type in layout.ROWS_PER_GROUP
        if usual and weight.numel():
            least, most = (float(bound) for bound in weight.aminmax())
            usual = -ALWAYS_FITS <= least <= most <= ALWAYS_FITS  # false of NaN
        if not usual:  # it may fit all the same, as large values in formats with float32 scales do
            with naming(name):
                packing.quantize_weight(weight, format, None, weight.device)

    def pack(
        self, name: str, weight: Tensor, format: str, device: torch.device | str
    ) -> PackedWeight:
        """Quantize a layer's weight [n, k], float32, bfloat16 or float16.

        Raises ValueError naming the layer if it holds NaN or infinity.
        """
        with naming(name):
            packed = packing.quantize_weight(weight, format, None, device)
        error = squared_error(weight, unpack(packed).to(weight.device)) if self.measure else None
        shape, wanted = tuple(weight.shape), self.rule.wanted(name)
        self.report.add(name, shape, packed.format, wanted, packed.nbytes, error)
        return packed

    def pack_experts(
        self, name: str, shape: tuple[int, int, int], expert: Callable[[int], Tensor],
        device: torch.device | str, dense: str, arena: Arena | None = None,
    ) -> PackedExperts:  # fmt: skip
        """Quantize the experts `[E, n, k]` of a layer one by one.

        Args:
            name: of the tensor.
            shape: E, n and k.
            expert: gives the weight of one expert [n, k].
            device: where they go.
            dense: "bf16" or "f32", for rows that no quantized format takes.
            arena: where memory of the CPU comes from.
        """
        count, n, k = shape
        format = self.format_for(name, shape) or dense
        packed = empty_experts(format, count, n, k, device, arena)
        errors = []
        for e in range(count):
            weight = expert(e)
            if format == dense:
                pack_expert_(packed, e, weight)
                continue
            with naming(f"{name}, expert {e}"):
                one = packing.quantize_weight(weight, format, None, device)
            set_expert_(packed, e, one)
            if self.measure:
                errors.append(squared_error(weight, unpack(one).to(weight.device)))
        if format != dense:
            mean = sum(errors) / len(errors) if errors else None
            self.report.add(name, shape, format, self.rule.wanted(name), packed.nbytes, mean)
        return packed


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Let a ValueError say which weight it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
