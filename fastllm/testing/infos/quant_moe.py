"""Cases of quant_moe: every format and mode, and formats that differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...ops import packed_layout as layout
from ...ops.moe import moe_ref
from ...ops.quant_format import QUANT_FORMATS
from ...ops.quant_moe import VARIANTS, quant_moe_ref, variant_name
from ..moe_problem import MoeProblem
from ..opinfo import Args, Case, OpInfo, generator
from ..packed_weights import FIRST_FORMATS, random_packed, weight64, whole
from .moe import active, arguments, exact
from .quant_matmul import quantized_rows

SHAPES: tuple[dict[str, Any], ...] = (
    {"tokens": 1, "hidden": 64, "inner": 32, "experts": 4, "k": 2, "biases": "both"},
    {"tokens": 7, "hidden": 96, "inner": 64, "experts": 3, "k": 2, "base": "float32"},
    {"tokens": 50, "hidden": 32, "inner": 96, "experts": 5, "k": 3, "load": "zipf"},
)
DENSE_SHAPES: tuple[dict[str, Any], ...] = (
    {"tokens": 0, "hidden": 16, "inner": 8, "experts": 4, "k": 2},
    {"tokens": 3, "hidden": 33, "inner": 17, "experts": 4, "k": 2, "biases": "both"},
    {"tokens": 70, "hidden": 70, "inner": 40, "experts": 4, "k": 2, "activation": "gelu"},
)
MIXED = (("q4_0", "q8_0"), ("q4_1", "q4_0"), ("q8_0", "q4_1"))
BENCH_SHAPES: tuple[dict[str, Any], ...] = tuple(
    {"tokens": tokens, "hidden": 512, "inner": 256, "experts": 64, "k": 8}
    for tokens in (1, 8, 64, 2048)
)


def random_experts(
    g: torch.Generator, format: str, experts: int, n: int, k: int, rows: int
) -> tuple[Tensor, Tensor]:
    """(data, scales) of random experts whose products are of about unit size."""
    size = k**-0.5
    if format in layout.QUANTIZED:
        one = random_packed(generator(), format, 8, k, rows)
        size /= max(weight64(*one, format, 8, k).square().mean().sqrt().item(), 1e-6)
    packs = [random_packed(g, format, n, k, rows, size) for _ in range(experts)]
    data = torch.stack([pack[0] for pack in packs])
    if format in layout.DENSE:
        data = (data.float() * size).to(data.dtype)
    return data, torch.stack([pack[1] for pack in packs])


def _args(problem: MoeProblem, formats: tuple[str, str], mode: str, keep: bool) -> Any:
    def make(g: torch.Generator) -> Args:
        x, gate_up, _, weights, offsets, slots, *rest = arguments(problem, g, keep=keep)
        biases, activation, kept, out_dtype = rest[:3], *rest[3:]
        e, both, k = gate_up.shape
        rows = layout.ROWS_PER_GROUP["cpu"]
        first = random_experts(g, formats[0], e, both, k, rows)
        second = random_experts(g, formats[1], e, k, both // 2, rows)
        return (
            x, *first, formats[0], *second, formats[1], both // 2, weights, offsets, slots,
            *biases, activation, mode, kept, out_dtype,
        )  # fmt: skip

    return make


def _case(
    shape: dict[str, Any], dtype: torch.dtype, formats: tuple[str, str], mode: str, **more: Any
) -> Case:
    sizes = {
        "hidden": whole(formats[0], shape["hidden"]),
        "inner": whole(formats[1], shape["inner"]),
    }
    problem = MoeProblem(**{**shape, **sizes}, dtype=dtype)
    label = f"{variant_name(*formats, mode)}-{problem.label}".replace(" ", "-")
    return Case(label=label, make=_args(problem, formats, mode, keep=True), **more)


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    own = "bf16" if dtype == torch.bfloat16 else "fp32"
    dense = "bf16" if dtype == torch.bfloat16 else "f32"
    for mode in ("int8", own):
        for format in layout.QUANTIZED:
            for i, shape in enumerate(SHAPES):
                # With int8 activations the function is a staircase: it has no exact gradient.
                full = i == 0 if format in FIRST_FORMATS else i != 1
                yield _case(shape, dtype, (format, format), mode, full=full, gradients=False)
        for i, formats in enumerate(MIXED):
            yield _case(SHAPES[i], dtype, formats, mode, gradients=False)
        yield _case(SHAPES[1], dtype, ("q4_0", dense), mode, gradients=False)
    for shape in DENSE_SHAPES:
        yield _case(shape, dtype, (dense, dense), own, gradients=shape["tokens"] > 0)


def dense_args(args: Args, dtype: torch.dtype) -> Args:
    """The arguments of `moe` with the packed weights' values."""
    x, d1, s1, f1, d2, s2, f2, inner, weights, offsets, slots, *rest = args
    biases, activation, mode, keep, out_dtype = rest[:3], *rest[3:7]
    pairs = ((d1, s1, f1, 2 * inner, x.shape[1]), (d2, s2, f2, x.shape[1], inner))
    values = [
        torch.stack([weight64(d, s, f, n, k, mode) for d, s in zip(data, scales, strict=True)]).to(
            dtype
        )
        for data, scales, f, n, k in pairs
    ]
    return x, *values, weights, offsets, slots, *biases, activation, keep, out_dtype


def _exact(*args: Any) -> tuple[Tensor, Tensor]:
    x, *rest = dense_args(args, torch.float64)
    # The quantizer of x belongs to the definition; that of the activations to the error.
    return exact(quantized_rows(x, args[3], QUANT_FORMATS[args[3]].mode(args[15])), *rest)


def _peer(*args: Any) -> tuple[Tensor, Tensor]:
    x, weights, base = args[0], args[8], args[13]
    leaves = (x, weights) if base is None else (x, weights, base)
    plain: list[Any] = [a.detach() if isinstance(a, Tensor) else a for a in args]
    y, pre = quant_moe_ref(*plain)
    if not any(leaf.requires_grad for leaf in leaves):
        return y, pre
    slope, _ = moe_ref(*dense_args(args, x.dtype))
    return y + (slope - slope.detach()).to(y.dtype), pre


def _bytes(*args: Any) -> int:
    packs = sum(args[i].nbytes for i in (1, 2, 4, 5))
    return 2 * args[0].nbytes + packs * active(args[9]) // max(1, args[1].shape[0])


def _flops(*args: Any) -> int:
    return 6 * int(args[9][-1]) * args[0].shape[1] * args[7]


INFOS = [
    OpInfo(
        name="quant_moe",
        cases=_cases,
        exact=_exact,
        peer=_peer,
        grad_args=(0, 8, 13),
        bench_cases=lambda dtype: (
            _case(shape, dtype, (format, format), "int8")
            for format in ("q4_0", "q8_0")
            for shape in BENCH_SHAPES
        ),
        bytes_moved=_bytes,
        flops=_flops,
        variants=tuple(v for v in VARIANTS if "+" not in v),
    ),
]
