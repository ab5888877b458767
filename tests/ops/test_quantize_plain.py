"""Searched scales are never worse than the range's: constants, offsets, outliers, one-hot weights.

The bound needs no other library: round to nearest with scales from the smallest and largest value.
K-quants try these scales themselves; groups of one fp16 scale may lose what its rounding costs.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastllm.ops.quant_format import QUANT_FORMATS, QuantFormat
from fastllm.ops.quantize_rules import UNSEEN
from fastllm.quantize.packed import quantize_weight, unpack
from fastllm.testing.opinfo import generator

FORMATS = [f for f, kind in QUANT_FORMATS.items() if kind.scales.startswith(("half", "super"))]
ROWS, COLUMNS = 32, 512
VALUES = {
    "normal": lambda g: torch.randn(32, generator=g),
    "positive": lambda g: torch.full((32,), 0.2 + torch.rand(1, generator=g).item()),
    "negative": lambda g: torch.full((32,), -0.2 - torch.rand(1, generator=g).item()),
    "above": lambda g: 2.0 + 0.02 * torch.randn(32, generator=g),
    "below": lambda g: -2.0 + 0.02 * torch.randn(32, generator=g),
    "nearly one": lambda g: 1.0 + 1e-3 * torch.randn(32, generator=g),
    "far": lambda g: 50.0 + torch.randn(32, generator=g),
    "two": lambda g: torch.randint(0, 2, (32,), generator=g).float(),
    "outlier": lambda g: torch.cat([0.02 * torch.randn(31, generator=g), torch.tensor([5.0])]),
    "single": lambda g: torch.eye(32)[torch.randint(0, 32, (1,), generator=g).item()],
    "zero": lambda g: torch.zeros(32),
    "large": lambda g: 300.0 * torch.randn(32, generator=g),
    "small": lambda g: 1e-3 * torch.randn(32, generator=g),
}


def one_hot(g: torch.Generator, rest: float) -> Tensor:
    w = torch.full((ROWS, COLUMNS), rest)
    w[:, torch.randint(0, 32, (1,), generator=g).item() :: 32] = 1.0
    return w


WEIGHTS = {
    "none": lambda g: None,
    "alike": lambda g: torch.ones(ROWS, COLUMNS),
    "uniform": lambda g: torch.rand(ROWS, COLUMNS, generator=g),
    "steep": lambda g: torch.rand(ROWS, COLUMNS, generator=g) ** 30,
    "one live": lambda g: one_hot(g, 0.0),
    "1e-12": lambda g: one_hot(g, 1e-12),
    "1e-8": lambda g: one_hot(g, 1e-8),
    "1e-6": lambda g: one_hot(g, 1e-6),
    "1e-4": lambda g: one_hot(g, 1e-4),
    "massive": lambda g: torch.ones(ROWS, COLUMNS).index_fill(1, torch.tensor([7]), 1e8),
    "half": lambda g: (torch.rand(ROWS, COLUMNS, generator=g) < 0.5).float(),
}


def drawn(g: torch.Generator) -> Tensor:
    """A row of each kind of blocks of 32 columns, and rows of blocks of drawn kinds."""
    names = list(VALUES)
    rows = [torch.cat([VALUES[name](g) for _ in range(COLUMNS // 32)]) for name in names]
    while len(rows) < ROWS:
        kinds = torch.randint(0, len(names), (COLUMNS // 32,), generator=g).tolist()
        rows.append(torch.cat([VALUES[names[kind]](g) for kind in kinds]))
    return torch.stack(rows)


def half(x: Tensor) -> Tensor:
    return x.half().float()


def nearest(x: Tensor, d: Tensor, low: int, high: int) -> Tensor:
    return torch.where(d != 0, x * (1 / d), 0.0).round().clamp(low, high)


def plain(w: Tensor, format: str) -> Tensor:
    """The values that scales from the range of every group, or sub-block, give."""
    kind = QUANT_FORMATS[format]
    x = w.unflatten(1, (-1, kind.group))
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    peak, levels = torch.maximum(-low, high), (1 << kind.bits) - 1
    if kind.scales == "half":
        top = kind.offset - 1 if kind.offset else 127
        d = half(peak / top)
        return (d * nearest(x, d, -top, top)).flatten(1)
    if kind.scales == "half_min":
        d, m = half((high - low) / levels), half(low)
        return (d * nearest(x - m, d, 0, levels) + m).flatten(1)
    low = low.clamp(max=0.0)
    if kind.scales == "half_zero":
        d = half((high.clamp(min=0.0) - low) / levels)
        z = nearest(-low, d, 0, levels)
        return (d * ((nearest(x, d, -levels, levels) + z).clamp(0, levels) - z)).flatten(1)
    subs = 256 // kind.group
    x, low, high, peak = (t.unflatten(1, (-1, subs)) for t in (x, low, high, peak))
    if kind.scales == "super":
        s = peak / torch.where(high > -low, -32, 32)  # which becomes code -32
        d = half(s.abs().amax(2, keepdim=True) / 127)
        step = d * nearest(s, d, -128, 127)
        return (step * nearest(x, step, -32, 31)).flatten(1)
    s = (high - low) / levels
    d, dmin = half(s.amax(2, keepdim=True) / 63), half(-low.amin(2, keepdim=True) / 63)
    step, m = d * nearest(s, d, 0, 63), dmin * nearest(-low, dmin, 0, 63)
    return (step * nearest(x + m, step, 0, levels) - m).flatten(1)


def sums(kind: QuantFormat, terms: Tensor) -> Tensor:
    """Over groups, or super-blocks."""
    return terms.unflatten(1, (-1, 256 if kind.scales.startswith("super") else kind.group)).sum(-1)


def of_columns(kind: QuantFormat, groups: Tensor) -> Tensor:
    return groups.repeat_interleave(kind.group, 1)


SEARCHES = [
    (format, weight)
    for format in FORMATS
    for weight in WEIGHTS
    if weight != "none" or format not in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
]


@pytest.mark.parametrize(("format", "weight"), SEARCHES)
@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.full) for i in (1, 2, 3))])
def test_no_group_is_worse_than_with_scales_of_its_range(
    format: str, weight: str, seed: int
) -> None:
    kind, g = QUANT_FORMATS[format], generator(seed)
    w, importance = drawn(g), WEIGHTS[weight](g)
    values = unpack(quantize_weight(w, format, importance))
    counts = torch.ones_like(w) if importance is None else importance / importance.max()
    unseen = counts.unflatten(1, (-1, kind.group)).sum(-1) <= UNSEEN
    counts = torch.where(of_columns(kind, unseen), UNSEEN, counts).double()
    ours = sums(kind, counts * (values - w).square())
    bound = sums(kind, counts * (plain(w, format) - w).square())
    peak = of_columns(kind, w.abs().unflatten(1, (-1, kind.group)).amax(-1))
    subnormal = 2.0**-24 * (1 << kind.bits)
    halves = sums(kind, counts * (2.0**-10 * peak + subnormal).square())
    slack = 1e-5 * bound + 1e-6 * halves if kind.scales.startswith("super") else halves
    worst = ((ours - bound) / halves.clamp(min=1e-30)).max().item()
    assert (ours <= bound + slack).all(), f"{worst} of what halves may lose"


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [1.0, -1.0, 0.05, -3e-3, 6e4, -6e4])
def test_constants_survive(format: str, value: float) -> None:
    w = torch.zeros(3, 512)
    w[0], w[1, 32:64], w[2] = value, value, value * (1.0 + 1e-3 * torch.randn(512))
    for importance in (None, torch.ones(512)):
        values = unpack(quantize_weight(w, format, importance))
        assert (values - w).abs().max().item() <= 1e-2 * abs(value)
