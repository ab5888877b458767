"""The experts of a layer, one by one, each with the inputs that its router sent it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllm.models.expert_files import members
from fastllm.models.quantizing.block import finite
from fastllm.models.quantizing.methods import (
    Awq,
    Gptq,
    Method,
    round_with,
    weighted,
    weighted_error,
)
from fastllm.ops.swiglu import swiglu
from fastllm.quantize import awq
from fastllm.quantize.moments import Moments
from fastllm.quantize.packed import PackedWeight
from fastllm.quantize.pieces import values_of

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


def quantize_experts(method: Method, states: Tensor | None) -> None:
    """Add the experts of the method's block to its result, where the plan quantizes them."""
    if method.format(GATE_UP) is None and method.format(DOWN) is None:
        return
    _Experts(method, states).run()


class _Experts:
    """At most one expert's matrices are in float32 at a time."""

    def __init__(self, method: Method, states: Tensor | None) -> None:
        self.method, self.block = method, method.block
        self.count = self.block.shapes[GATE_UP][0]
        self.inputs = None if states is None else self.block.expert_inputs(states)
        self.errors: dict[str, list[float]] = {GATE_UP: [], DOWN: []}
        self.sums: dict[str, list[Tensor]] = {GATE_UP: [], DOWN: []}
        self.counts: list[int] = []
        self.few = 0

    def run(self) -> None:
        result = self.method.result
        names = [name for name in (GATE_UP, DOWN) if self.method.format(name) is not None]
        result.experts |= {name: [] for name in names}
        for expert in range(self.count):
            self._one(expert)
        self.block.source.release(self.block.prefix + GATE_UP)
        self.block.source.release(self.block.prefix + DOWN)
        for name in names:
            result.errors[name] = sum(self.errors[name]) / max(len(self.errors[name]), 1)
            if self.sums[name]:
                result.sums[name] = torch.stack(self.sums[name]), torch.tensor(self.counts).float()
        if self.few:
            result.notes.append(
                f"layer {self.block.index}: {self.few} of {self.count} experts get fewer than "
                f"{self.method.settings.min_expert_tokens} calibration tokens and are rounded to "
                "nearest"
            )

    def _one(self, expert: int) -> None:
        gate_up, down = (self._matrix(name, expert) for name in (GATE_UP, DOWN))
        if self.inputs is None:
            self._keep(GATE_UP, expert, gate_up, None)
            self._keep(DOWN, expert, down, None)
            return
        x, ids = self.inputs
        x = x[(ids == expert).any(1)]
        self.counts.append(len(x))
        if len(x) < self.method.settings.min_expert_tokens:
            self.few += 1
            self._measured(expert, gate_up, down, x, Method)
        else:
            self._measured(expert, gate_up, down, x, type(self.method))

    def _measured(
        self, expert: int, gate_up: Tensor, down: Tensor, x: Tensor, kind: type[Method]
    ) -> None:
        own = self._moments(GATE_UP, x, kind)
        if issubclass(kind, Awq):
            inner = self._moments(DOWN, _inner(x, gate_up), kind)
            format = self.method.format(DOWN)
            if format is not None and self.method.format(GATE_UP) is not None:
                scales = awq.search_scales([down], [format], inner)
                rows = torch.cat([torch.ones_like(scales), scales])  # of up alone
                gate_up, down = gate_up / rows.unsqueeze(1), down * scales
                inner.squares = inner.squares / scales.square()
            self._keep(GATE_UP, expert, gate_up, own, kind)
            self._keep(DOWN, expert, down, inner, kind)
            return
        values = self._keep(GATE_UP, expert, gate_up, own, kind)
        seen = values if issubclass(kind, Gptq) else gate_up
        self._keep(DOWN, expert, down, self._moments(DOWN, _inner(x, seen), kind), kind)

    def _moments(self, name: str, x: Tensor, kind: type[Method]) -> Moments:
        moments = Moments(x.shape[-1], gram=issubclass(kind, Gptq | Awq))
        moments.add(x)
        if self.method.settings.method == "imatrix":
            self.sums[name].append(moments.squares)
        return moments

    def _keep(
        self, name: str, expert: int, weight: Tensor, moments: Moments | None,
        kind: type[Method] = Method,
    ) -> Tensor:  # fmt: skip
        """Quantize one expert's part of a tensor; the values that it then has."""
        format = self.method.format(name)
        if format is None:
            return weight
        parts = weight.chunk(len(members(self.block.prefix + name, expert)))
        importance = self._importance(name, expert, moments, kind)
        packs: list[PackedWeight] = []
        if issubclass(kind, Gptq):
            assert isinstance(self.method, Gptq) and moments is not None, "calibrated"
            known = moments.importance
            rounding = self.method.rounding(moments)
            packs = [round_with(rounding, part, format, known) for part in parts]
        else:
            packs = [weighted(part, format, importance) for part in parts]
        self.method.result.experts[name].append(packs)
        self.errors[name] += [
            weighted_error(part, packed, importance)
            for part, packed in zip(parts, packs, strict=True)
        ]
        values = torch.cat([values_of(packed) for packed in packs])
        if self.inputs is not None and isinstance(self.method, Gptq | Awq):
            self.block.get(name)[expert].copy_(values)
        return values

    def _importance(
        self, name: str, expert: int, moments: Moments | None, kind: type[Method]
    ) -> Tensor | None:
        if moments is not None and kind is not Method and moments.count:
            return moments.importance
        given = self.method.importance.get(self.block.prefix + name)
        return None if given is None else given[expert]

    def _matrix(self, name: str, expert: int) -> Tensor:
        full = self.block.prefix + name
        values = self.block.source.get_expert(full, expert).to_float32()
        return finite(values, f"{full}[{expert}]")


def _inner(x: Tensor, gate_up: Tensor) -> Tensor:
    """What an expert's down projection gets, [tokens, inner] in the dtype of x."""
    gate, up = (x @ gate_up.to(x.dtype).t()).chunk(2, 1)
    return swiglu(gate.contiguous(), up.contiguous())
