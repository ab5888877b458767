"""How the matrices of one decoder layer get their codes: rtn, imatrix, gptq or awq.

GPTQ goes stage by stage: what follows sees inputs that come from matrices already quantized. AWQ
looks at all inputs of attention, then of the MLP, first, because it scales a matrix by what the
next one's inputs are like.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastllm.models.quantizing.block import Block
from fastllm.models.quantizing.stages import Stage, stages
from fastllm.nn.linear import Linear
from fastllm.quantize import awq
from fastllm.quantize.clip import clipped
from fastllm.quantize.gptq import Rounding
from fastllm.quantize.mixes import Plan
from fastllm.quantize.moments import Moments, output_error
from fastllm.quantize.packed import PackedWeight
from fastllm.quantize.pieces import in_pieces, unpacked_pieces

METHODS = ("rtn", "gptq", "awq", "imatrix")
CALIBRATED = ("gptq", "awq", "imatrix")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is asked for.

    format: a name of `fastllm.quantize.mixes`. method: of METHODS. damping, act_order: GPTQ's.
    min_expert_tokens: an expert that fewer calibration tokens come to is rounded to nearest.
    """

    format: str
    method: str = "rtn"
    damping: float = 0.01
    act_order: bool = True
    min_expert_tokens: int = 64

    def __post_init__(self) -> None:
        """Raises ValueError naming the field."""
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r:.80}")
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must be above 0 and at most 1, got {self.damping}")
        if self.min_expert_tokens < 1:
            raise ValueError(f"min_expert_tokens must be positive, got {self.min_expert_tokens}")


@dataclass(slots=True)
class Result:
    """What became of a layer; names are within it, weights without ".weight".

    packs: of linear layers. experts: "mlp.experts.gate_up_proj" and "down_proj": for each expert
    its matrices (gate and up, or down alone). dense: other tensors that changed, with their
    suffix. errors: relative squared error of each matrix's outputs (of the matrix itself where
    inputs were not measured). sums: (sum of x^2 [K] or [E, K], tokens [1] or [E]) of inputs.
    """

    packs: dict[str, PackedWeight] = field(default_factory=dict)
    experts: dict[str, list[list[PackedWeight]]] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    sums: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Method:
    """Quantizes the linear layers of a block, experts aside. Subclasses say how.

    importance: mean x^2 of inputs from elsewhere, by full weight name.
    """

    def __init__(
        self, block: Block, plan: Plan, settings: Settings,
        importance: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.block, self.plan, self.settings = block, plan, settings
        self.importance = importance or {}
        self.result = Result()

    def format(self, name: str) -> str | None:
        """What the plan gives a linear layer or experts' tensor of the block."""
        full = self.block.prefix + name
        return self.plan.formats.get(f"{full}.weight", self.plan.formats.get(full))

    def chosen(self, stage: Stage) -> list[str]:
        """The linear layers of a stage that are quantized."""
        return [name for name in stage.linears if self.format(name) is not None]

    def run(self, states: Tensor | None) -> None:
        """Quantize every stage; states: the residual stream before the layer."""
        for group in stages(self.block.source.config, self.block.index):
            self.stages(group, states)

    def stages(self, group: list[Stage], states: Tensor | None) -> None:
        """Quantize the stages of attention or of the MLP, to nearest."""
        for stage in group:
            for name in self.chosen(stage):
                weight = self.block.matrix(name)
                known = self.importance.get(f"{self.block.prefix}{name}.weight")
                self.keep(name, weight, weighted(weight, self.given(name), known), known)

    def given(self, name: str) -> str:
        """`format` of a layer that has one."""
        format = self.format(name)
        assert format is not None, "asked of chosen layers"
        return format

    def keep(
        self, name: str, weight: Tensor, packed: PackedWeight, importance: Tensor | None
    ) -> None:
        """Note a result, its error weighted by importance."""
        self.result.packs[name] = packed
        self.result.errors[name] = weighted_error(weight, packed, importance)

    def replace(self, name: str, packed: PackedWeight) -> None:
        """Let the layer compute with what a weight has become, packed as it will be served."""
        layer = self.block.layer.get_submodule(name)
        assert isinstance(layer, Linear), "stages name linear layers"
        layer.weight, layer.packed = None, packed


class Importance(Method):
    """Round to nearest where squared errors are weighted with the mean square of the inputs."""

    def stages(self, group: list[Stage], states: Tensor | None) -> None:
        if states is None:
            super().stages(group, states)
            return
        used = [stage for stage in group if self.chosen(stage)]
        moments = self.block.moments(used, states, gram=False) if used else []
        for stage, seen in zip(used, moments, strict=True):
            for name in self.chosen(stage):
                weight, known = self.block.matrix(name), seen.importance
                self.keep(name, weight, weighted(weight, self.given(name), known), known)
                squares = seen.squares.clone()  # files hold no tensor twice
                self.result.sums[name] = squares, torch.tensor([float(seen.count)])


class Gptq(Method):
    """Errors are passed on to columns not yet rounded."""

    def stages(self, group: list[Stage], states: Tensor | None) -> None:
        assert states is not None, "calibrated"
        for stage in group:
            if not self.chosen(stage):
                continue
            (moments,) = self.block.moments([stage], states, gram=True)
            names = self.chosen(stage)
            rounding = self.rounding(moments)
            for name in names:
                weight = self.block.matrix(name)
                packed = round_with(rounding, weight, self.given(name), moments.importance)
                self.replace(name, packed)
                self.result.packs[name] = packed
                error, total = rounding.output_error(weight, packed)
                self.result.errors[name] = error / max(total, 1e-30)

    def rounding(self, moments: Moments) -> Rounding:
        """The factored gram matrix of an input, which it takes from `moments`."""
        gram, moments.gram = moments.gram, None
        assert gram is not None, "measured with gram"
        settings = self.settings
        return Rounding(gram, damping=settings.damping, act_order=settings.act_order)


class Awq(Method):
    """Channels of large inputs are scaled up, which their makers undo."""

    def __init__(
        self, block: Block, plan: Plan, settings: Settings,
        importance: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(block, plan, settings, importance)
        self._columns: dict[str, Tensor] = {}
        self._rows: dict[str, Tensor] = {}

    def stages(self, group: list[Stage], states: Tensor | None) -> None:
        assert states is not None, "calibrated"
        used = [stage for stage in group if self.chosen(stage)]
        moments = self.block.moments(used, states, gram=True) if used else []
        for stage, seen in zip(used, moments, strict=True):
            self._search(stage, seen)
        for stage, seen in zip(used, moments, strict=True):
            for name in self.chosen(stage):
                self._round(name, seen)
            seen.gram = None

    def _search(self, stage: Stage, seen: Moments) -> None:
        """Find the scales of a stage's input, and give them to what makes it."""
        names = self.chosen(stage)
        if len(names) != len(stage.linears) or (stage.norm is None and stage.rows is None):
            return  # a layer that stays as it is reads the input too, or nothing can undo scales
        shared = None
        if stage.repeats > 1:
            shared = stage.repeats, self.block.source.config.head_dim
        scales = awq.search_scales(
            [self.block.matrix(name) for name in names], [self.given(name) for name in names],
            seen, shared=shared,
        )  # fmt: skip
        if stage.norm is not None:
            full = f"{self.block.prefix}{stage.norm}.weight"
            norm, scales = awq.fold_into_norm(self.block.source.get(full).data, scales)
            self.result.dense[f"{stage.norm}.weight"] = norm
            self.block.set(f"{stage.norm}.weight", norm.float())
        elif stage.rows is not None:
            rows = scales if shared is None else awq.of_rows(scales, *shared)
            self._scale_rows(stage.rows, rows)
        self._columns |= dict.fromkeys(names, scales)

    def _scale_rows(self, name: str, scales: Tensor) -> None:
        self._rows[name] = scales
        bias = f"{name}.bias"
        if bias in self.block.shapes:
            scaled = self.block.source.get(self.block.prefix + bias).to_float32() / scales
            self.result.dense[bias] = scaled
            self.block.set(bias, scaled)

    def _round(self, name: str, seen: Moments) -> None:
        weight, columns = self.block.matrix(name), self._columns.get(name)
        if name in self._rows:
            weight = weight / self._rows[name].unsqueeze(1)
        importance = seen.importance
        if columns is not None:
            weight, importance = weight * columns, importance / columns.square()
        format = self.given(name)
        packed = weighted(weight, format, importance)
        self.result.packs[name] = packed
        assert seen.gram is not None, "measured with gram"
        undo = 1.0 if columns is None else 1 / columns
        error = total = 0.0
        for rows, values in unpacked_pieces(packed):
            own = weight[rows]
            error += output_error((values - own) * undo, seen.gram)
            total += output_error(own * undo, seen.gram)
        self.result.errors[name] = error / max(total, 1e-30)
        self.replace(name, packed)


def round_with(rounding: Rounding, weight: Tensor, format: str, importance: Tensor) -> PackedWeight:
    """GPTQ's choice of codes, with the scales of a weighted clip search."""
    return rounding.round(weight, weighted(weight, format, importance))


def weighted(weight: Tensor, format: str, importance: Tensor | None) -> PackedWeight:
    """To nearest, with scales (of nf4: clipped outliers) that importance chooses, if given."""
    cut = weight if importance is None else clipped(weight, format, importance)
    return in_pieces(cut, format, importance)


def weighted_error(weight: Tensor, packed: PackedWeight, importance: Tensor | None) -> float:
    """Squared error of a packed weight as a share of its squares, columns weighted."""
    weights = torch.ones(()) if importance is None else importance
    error = total = 0.0
    for rows, values in unpacked_pieces(packed):
        own = weight[rows]
        error += float(((values - own).square() * weights).sum())
        total += float((own.square() * weights).sum())
    return error / max(total, 1e-30)


METHOD_CLASSES: Mapping[str, type[Method]] = {
    "rtn": Method, "imatrix": Importance, "gptq": Gptq, "awq": Awq,
}  # fmt: skip
