"""Problems for the mixture-of-experts ops, and a plain loop over experts that solves them.

The loop shares nothing with the ops: no sorting, no slots, one expert after the other, gradients by
autograd. In float64 it is what is right; with `exact=False` it is the peer of the bound: float32
sums, rounded to the layer's dtype where the definition rounds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .opinfo import generator

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swiglu_oai")
LOADS = ("uniform", "zipf", "one", "repeated", "half", "holes")
BIASES = ("", "gate_up", "down", "both")
RowMap = Callable[[Tensor], Tensor]
MOST_WEIGHTS = 400_000  # of a drawn layer, so that hundreds of them are tested in seconds
LEAVES = ("x", "gate_up", "down", "topk_weights", "gate_up_bias", "down_bias", "base")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The arguments of `moe`, by its names."""

    x: Tensor
    gate_up: Tensor
    down: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    base: Tensor | None = None
    activation: str = "silu"
    first_expert: int | None = None
    out_dtype: torch.dtype | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """For `moe(**arguments)`."""
        return dict(self.__dict__)

    def leaves(self, names: Sequence[str] = LEAVES) -> tuple[Layer, list[Tensor]]:
        """The layer with fresh leaves of autograd in place of the named tensors, and those."""
        given = [name for name in names if getattr(self, name) is not None]
        fresh = {name: getattr(self, name).detach().requires_grad_() for name in given}
        return replace(self, **fresh), list(fresh.values())

    def double(self) -> Layer:
        """The same values in float64."""
        wide = {n: v.double() for n in LEAVES if (v := getattr(self, n)) is not None}
        return replace(self, **wide, out_dtype=torch.float64)

    def tokens(self, rows: Any) -> Layer:
        """The layer for some of its tokens."""
        names = [
            n for n in ("x", "topk_ids", "topk_weights", "base") if getattr(self, n) is not None
        ]
        return replace(self, **{name: getattr(self, name)[rows] for name in names})


@dataclass(frozen=True, kw_only=True)
class MoeProblem:
    """What a layer is drawn from.

    load: how tokens spread over experts: "uniform", "zipf", "one" (all take the same k), "repeated"
        (every slot is the same expert), "half" (the first half has nothing to do), "holes" (a third
        of the slots is -1).
    held: (first, count) of the slice of experts that is here; None: all.
    biases: which of "gate_up", "down", "both" are there.
    base: "", "float32" or "same" (as x).
    strided: tensors are parts of larger ones.
    """

    tokens: int
    hidden: int
    inner: int
    experts: int
    k: int
    dtype: torch.dtype = torch.float32
    load: str = "uniform"
    activation: str = "silu"
    biases: str = ""
    base: str = ""
    held: tuple[int, int] | None = None
    out_dtype: torch.dtype | None = None
    strided: bool = False

    @property
    def label(self) -> str:
        """Of a test case."""
        words = [
            f"{_short(self.dtype)} T{self.tokens} H{self.hidden} I{self.inner}",
            f"E{self.experts} k{self.k} {self.load} {self.activation}",
            f"bias-{self.biases}" if self.biases else "",
            f"base-{self.base}" if self.base else "",
            f"held{self.held[0]}+{self.held[1]}" if self.held else "",
            f"to-{_short(self.out_dtype)}" if self.out_dtype else "",
            "strided" if self.strided else "",
        ]
        return " ".join(word for word in words if word)

    def layer(self, draw: int = 0) -> Layer:
        """Draw `draw`: the same for the same number; other draws have the same shapes and loads."""
        g = generator(random.Random(f"{self.label} {draw}").getrandbits(40))
        first, count = self.held or (0, self.experts)
        both = 2 * self.inner
        sharp = 1.0 if self.activation == "swiglu_oai" else 1.5
        weights = torch.rand(self._shape(self.tokens, self.k), generator=g) + 0.1
        parts: dict[str, Tensor | None] = {
            "x": self._random(g, 1.0, self.tokens, self.hidden),
            "gate_up": self._random(g, sharp * self.hidden**-0.5, count, both, self.hidden),
            "down": self._random(g, self.inner**-0.5, count, self.hidden, self.inner),
            "topk_weights": self._part(weights / max(1, self.k), self.tokens, self.k),
            "gate_up_bias": self._gate_up_bias(g, count)
            if self.biases in ("gate_up", "both")
            else None,
            "down_bias": self._random(g, 0.5, count, self.hidden)
            if self.biases in ("down", "both")
            else None,
            "base": self._random(g, 1.0, self.tokens, self.hidden) if self.base else None,
        }
        if self.base == "float32" and parts["base"] is not None:
            parts["base"] = parts["base"].float()
        return Layer(
            **parts,  # type: ignore[arg-type]
            topk_ids=draw_ids(g, self.tokens, self.experts, self.k, self.load),
            activation=self.activation,
            first_expert=first if self.held else None,
            out_dtype=self.out_dtype,
        )

    def _gate_up_bias(self, g: torch.Generator, count: int) -> Tensor:
        """Small, but in three channels of ten far beyond the limits of "swiglu_oai".

        Between them nothing comes near a limit, where one rounding decides whether there is a
        gradient.
        """
        shape = (count, 2 * self.inner)
        bias = torch.randn(shape, generator=g) * 0.2
        if self.activation == "swiglu_oai":
            far = torch.rand(shape, generator=g)
            bias += 20.0 * ((far < 0.15).float() - ((far > 0.85) & (bias > 0)).float())
        return bias.to(self.dtype)

    def _shape(self, *shape: int) -> tuple[int, ...]:
        return (*shape[:-1], shape[-1] + 7) if self.strided else shape

    def _random(self, g: torch.Generator, scale: float, *shape: int) -> Tensor:
        values = torch.randn(self._shape(*shape), generator=g).mul_(scale).to(self.dtype)
        return self._part(values, *shape)

    def _part(self, values: Tensor, *shape: int) -> Tensor:
        return values[..., 5 : 5 + shape[-1]] if self.strided else values


def draw_ids(g: torch.Generator, tokens: int, experts: int, k: int, load: str) -> Tensor:
    """Expert ids int32 `[tokens, k]`, different ones for a token but for "repeated" and -1."""
    scores = torch.rand(tokens, experts, generator=g)
    if load == "zipf":  # the Gumbel trick: k draws without replacement
        rank = torch.randperm(experts, generator=g) + 1.0
        scores = -torch.log(-torch.log(scores.clamp(1e-7, 1 - 1e-7))) - 1.2 * rank.log()
    elif load == "one":
        scores = scores[:1].expand(tokens, experts)
    elif load == "half" and experts - experts // 2 >= k:
        scores[:, : experts // 2] = -1.0
    ids = scores.topk(k, dim=1).indices.int() if tokens else torch.empty(0, k, dtype=torch.int32)
    if load == "repeated":
        ids = ids[:1, :1].expand(tokens, k).contiguous()
    if load == "holes":
        ids[torch.rand(tokens, k, generator=g) < 0.3] = -1
    return ids.contiguous()


def activate(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The gated activation, by its published formula, in the dtype of its inputs."""
    if activation == "swiglu_oai":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    if activation == "silu":
        return gate * torch.sigmoid(gate) * up
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


def _as_is(rows: Tensor) -> Tensor:
    return rows


def expert_loop(
    layer: Layer, *, exact: bool, into_up: RowMap = _as_is, into_down: RowMap = _as_is
) -> Tensor:
    """y of a layer, one expert after the other: float64, or the layer's dtype with float32 sums.

    `into_up` and `into_down` are what happens to rows before the two products: quantization.
    """
    dtype, wide = layer.x.dtype, torch.float64 if exact else torch.float32

    def rounded(t: Tensor) -> Tensor:
        return t if exact else t.to(dtype).to(wide)

    tokens, k = layer.topk_ids.shape
    x, slots = layer.x.to(wide), layer.topk_ids.flatten().long()
    gate_up, down = layer.gate_up.to(wide).unbind(), layer.down.to(wide).unbind()
    up_bias = None if layer.gate_up_bias is None else layer.gate_up_bias.to(wide).unbind()
    down_bias = None if layer.down_bias is None else layer.down_bias.to(wide).unbind()
    places, outs = [slots[:0]], [x.new_zeros(0, layer.down.shape[1])]
    for e in range(len(gate_up)):
        at = (slots == (layer.first_expert or 0) + e).nonzero().squeeze(1)
        if not len(at):
            continue
        pre = into_up(x[at // k]) @ gate_up[e].T
        pre = rounded(pre if up_bias is None else pre + up_bias[e])
        gate, up = pre.chunk(2, dim=1)
        a = rounded(activate(gate, up, layer.activation))
        out = into_down(a) @ down[e].T
        places.append(at)
        outs.append(out if down_bias is None else out + down_bias[e])
    o = x.new_zeros(tokens * k, layer.down.shape[1])
    o = o.index_copy(0, torch.cat(places), torch.cat(outs))
    y = (o.view(tokens, k, o.shape[1]) * layer.topk_weights.to(wide).unsqueeze(2)).sum(1)
    if layer.base is not None:
        y = y + layer.base.to(wide)
    return y if exact else y.to(layer.out_dtype or dtype)


def covering(count: int, seed: int, **axes: Sequence[Any]) -> list[dict[str, Any]]:
    """`count` rows in which every value of every axis stands equally often, in random company."""
    rng = random.Random(seed)
    columns: dict[str, list[Any]] = {}
    for name, values in axes.items():
        column: list[Any] = []
        while len(column) < count:
            column += rng.sample(list(values), len(values))
        columns[name] = column[:count]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


AXES: dict[str, Sequence[Any]] = {
    "tokens": (0, 1, 2, 3, 7, 16, 33, 64, 97, 129, 257),
    "hidden": (1, 8, 17, 32, 40, 63, 64, 96, 130),
    "inner": (1, 4, 15, 16, 24, 33, 48, 64, 100),
    "experts": (1, 2, 3, 4, 6, 8, 16, 31, 60, 64, 128, 257, 512),
    "k": (1, 2, 3, 4, 6, 8, 10, 16),
    "dtype": (torch.float32, torch.bfloat16),
    "load": LOADS,
    "activation": ACTIVATIONS,
    "biases": BIASES,
    "base": ("", "", "float32", "same"),
    "held": ("all", "all", "first half", "middle", "last"),
    "out_dtype": (None, None, torch.float32, torch.bfloat16),
    "strided": (False, False, False, True),
}


def problems(count: int, seed: int, **axes: Sequence[Any]) -> list[MoeProblem]:
    """Problems that cover `AXES` (some replaced), made possible and kept small."""
    return [_possible(**row) for row in covering(count, seed, **{**AXES, **axes})]


def _possible(
    *, experts: int, k: int, hidden: int, inner: int, held: str, **rest: Any
) -> MoeProblem:
    step = 32 if hidden % 32 == 0 and inner % 32 == 0 else 1
    while experts * hidden * inner * 3 > MOST_WEIGHTS and max(hidden, inner) > step:
        hidden = max(step, hidden // 2 // step * step)
        inner = max(step, inner // 2 // step * step)
    half = max(1, experts // 2)
    slices = {"first half": (0, half), "middle": (experts // 4, half), "last": (experts - 1, 1)}
    return MoeProblem(
        experts=experts,
        k=min(k, experts),
        hidden=hidden,
        inner=inner,
        held=slices.get(held),
        **rest,
    )


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
