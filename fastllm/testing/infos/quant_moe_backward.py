"""Cases of quant_moe_backward: every packed format of both weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...ops import packed_layout as layout
from ...ops.gated_activation import ACTIVATIONS
from ...ops.quant_moe_backward import variant_name
from ..opinfo import Args, Case, OpInfo
from ..packed_weights import FIRST_FORMATS, random_packed, weight64, whole
from .moe_backward import exact_gradients, random_ids, sorted_by_expert

# (tokens, hidden, inner, experts, k)
SHAPES = ((0, 32, 32, 4, 2), (3, 64, 32, 3, 2), (29, 96, 64, 5, 3))
PAIRS = tuple(
    (format, "q8_0" if format in ("q4_0", "q4_1") else format) for format in layout.FORMATS
)
ODD_SHAPES = ((7, 33, 17, 3, 2), (5, 20, 40, 4, 1))  # of dense formats: no blocks of 32


def random_experts(
    g: torch.Generator, format: str, experts: int, n: int, k: int
) -> tuple[Tensor, Tensor]:
    """(data, scales) of packed experts, all of one format."""
    per_group = layout.ROWS_PER_GROUP["cpu"]
    packed = [random_packed(g, format, n, k, per_group) for _ in range(experts)]
    return torch.stack([p[0] for p in packed]), torch.stack([p[1] for p in packed])


def _args(
    g: torch.Generator,
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    formats: tuple[str, str],
    activation: str,
    wanted: tuple[bool, bool] = (True, True),
) -> Args:
    t, hidden, inner, experts, k = shape
    hidden, inner = whole(formats[0], hidden), whole(formats[1], inner)
    offsets, slots = sorted_by_expert(random_ids(g, t, experts + 1, k), experts)
    gate_up = random_experts(g, formats[0], experts, 2 * inner, hidden)
    down = random_experts(g, formats[1], experts, hidden, inner)
    return (
        torch.randn(t, hidden, generator=g).to(dtype),
        *gate_up,
        formats[0],
        *down,
        formats[1],
        torch.rand(t, k, generator=g),
        offsets,
        slots,
        torch.randn(t * k, 2 * inner, generator=g).to(dtype),
        torch.randn(experts, hidden, generator=g) if activation == "swiglu_oai" else None,
        activation,
        list(wanted),
    )


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    i = 0
    for format, other in PAIRS:
        for shape in SHAPES + (ODD_SHAPES if format in layout.DENSE else ()):
            activation = ACTIVATIONS[i % 4]
            i += 1

            def make(
                g: torch.Generator,
                shape: tuple[int, int, int, int, int] = shape,
                formats: tuple[str, str] = (format, other),
                activation: str = activation,
            ) -> Args:
                return _args(g, shape, dtype, formats, activation)

            label = f"{format}-{activation}-" + "x".join(map(str, shape))
            full = format not in FIRST_FORMATS and shape != SHAPES[1]
            yield Case(label=label, make=make, full=full)

    def router_alone(g: torch.Generator) -> Args:
        return _args(g, (9, 64, 32, 4, 2), dtype, ("q4_1", "q4_0"), "silu", (False, True))

    yield Case(label="router-alone", make=router_alone)


def _weights(
    data: Tensor, scales: Tensor, format: str, n: int, k: int, dtype: torch.dtype
) -> Tensor:
    parts = [weight64(data[e], scales[e], format, n, k).to(dtype) for e in range(data.shape[0])]
    return torch.stack(parts)


def _exact(
    dy: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor,
    gate_up_format: str,
    down: Tensor,
    down_scales: Tensor,
    down_format: str,
    topk_weights: Tensor,
    offsets: Tensor,
    slots: Tensor,
    pre: Tensor,
    down_bias: Tensor | None,
    activation: str,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    hidden, inner = dy.shape[1], pre.shape[1] // 2
    w1 = _weights(gate_up, gate_up_scales, gate_up_format, 2 * inner, hidden, torch.float64)
    w2 = _weights(down, down_scales, down_format, hidden, inner, torch.float64)
    flags = [wanted[0], False, False, wanted[1], False, False]
    x = torch.zeros_like(dy)
    found: Any = exact_gradients(
        dy, x, w1, w2, topk_weights, offsets, slots, pre, None, down_bias, activation, flags
    )
    return found[0], found[3]


INFOS = [
    OpInfo(
        name="quant_moe_backward",
        cases=_cases,
        exact=_exact,
        flops=lambda dy, *args: 6 * args[6].numel() * dy.shape[1] * (args[9].shape[1] // 2),
        variants=tuple(variant_name(*pair) for pair in PAIRS),
    ),
]
