"""Mixtures of packed experts under the interpreter, against a float64 loop over experts.

Runs as interpreter_cases.py does. Layers, dispatch and judge are those of moe_cases.py.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from interpreter_cases import BF16, F32, NAMES, Case, main, pack, quantized_activation, randn, same
from moe_cases import dispatched, judged, run
from torch import Tensor

from fastllm.testing.moe_problem import ACTIVATIONS, Layer, MoeProblem, expert_loop


def pack_experts(format: str, experts: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(data, scales, values float64) of random packed experts."""
    if format in ("bf16", "f32"):
        values = randn(experts, n, k, dtype=BF16 if format == "bf16" else F32, seed=7) * k**-0.5
        shape = (experts, n, k // 2, 1, 2) if format == "bf16" else (experts, n, k, 1)
        return values.view(shape), torch.empty(experts, 0), values.double()
    parts = [pack(format, n, k + 64 * e) for e in range(experts)]
    blocks = k // 32
    stacked = [torch.stack([p[i][:, :blocks] for p in parts]).contiguous() for i in (0, 1)]
    values = torch.stack([p[2][:, :k] for p in parts])
    return stacked[0], (stacked[1] * 0.25).contiguous(), values * 0.25


def quant_layer(problem: MoeProblem, formats: tuple[str, str]) -> tuple[Layer, list[Any]]:
    """(layer whose weights are the packed ones' values in float64, packed arguments)."""
    held = problem.held[1] if problem.held else problem.experts
    first = pack_experts(formats[0], held, 2 * problem.inner, problem.hidden)
    second = pack_experts(formats[1], held, problem.hidden, problem.inner)
    layer = replace(problem.layer(), gate_up=first[2], down=second[2])
    if problem.activation == "swiglu_oai":  # at its limits one rounding decides on a gradient
        layer = replace(layer, x=layer.x * 0.125)
    packed = [*first[:2], formats[0], *second[:2], formats[1]]
    return layer, packed


def run_quant(layer: Layer, packed: list[Any], mode: str) -> tuple[Tensor, Tensor]:
    from fastllm.kernels.quant_moe import quant_moe

    return quant_moe(
        layer.x, *packed, layer.down.shape[2], layer.topk_weights, *dispatched(layer),
        layer.gate_up_bias, layer.down_bias, layer.base, layer.activation, mode, True,
        layer.out_dtype,
    )  # fmt: skip


def as_int8(rows: Tensor) -> Tensor:
    """Rows as their int8 blocks represent them, in their dtype."""
    return quantized_activation(rows.float()).to(rows.dtype) if len(rows) else rows


def quant_case(problem: MoeProblem, formats: tuple[str, str], mode: str) -> float:
    """y, and the gradients of x and of the routing weights (the weights rounded to x's dtype)."""
    from fastllm.kernels.quant_moe_backward import quant_moe_backward

    layer, packed = quant_layer(problem, formats)
    y, pre = run_quant(layer, packed, mode)
    maps: dict[str, Callable[[Tensor], Tensor]] = {}
    if mode == "int8":
        quantized = [f in ("q4_0", "q4_1", "q8_0") for f in formats]
        names = [n for n, q in zip(("into_up", "into_down"), quantized, strict=True) if q]
        maps = dict.fromkeys(names, as_int8)
    exact = expert_loop(layer.double(), exact=True, **maps)
    worst = judged(y, exact, expert_loop(layer, exact=False, **maps))
    if mode == "int8":
        return worst
    dy = randn(problem.tokens, problem.hidden, dtype=problem.dtype, seed=9)
    offsets, slots = dispatched(layer)
    pre[int(offsets[-1]) :] = math.nan
    found = quant_moe_backward(
        dy, *packed, layer.topk_weights, offsets, slots, pre, layer.down_bias, layer.activation,
        [True, True],
    )  # fmt: skip
    stored = replace(
        layer, gate_up=layer.gate_up.to(layer.x.dtype), down=layer.down.to(layer.x.dtype)
    )
    names = ("x", "topk_weights")
    grads = []
    for exactly in (True, False):
        leaf, leaves = (stored.double() if exactly else stored).leaves(names)
        out = expert_loop(leaf, exact=exactly)
        grads.append(torch.autograd.grad(out, leaves, dy.to(out.dtype)))
    return max(worst, *map(judged, found, *grads))


def quant_rows(format: str, mode: str, tokens: int) -> float:
    """Packed experts: a few tokens and many give the same bits."""
    problem = MoeProblem(
        tokens=tokens, hidden=64, inner=32, experts=2, k=2, dtype=F32 if mode == "fp32" else BF16
    )
    layer, packed = quant_layer(problem, (format, format))
    whole, _ = run_quant(layer, packed, mode)
    return max(
        same(run_quant(layer.tokens(rows), packed, mode)[0], whole[rows])
        for rows in (slice(0, 1), slice(5, 16))
    )


def dense_packs(dtype: torch.dtype) -> float:
    """Packed bf16 and f32 experts give the bits of plain ones."""
    problem = MoeProblem(tokens=9, hidden=64, inner=32, experts=3, k=2, dtype=dtype)
    layer, packed = quant_layer(problem, (NAMES[dtype],) * 2)
    plain = replace(layer, gate_up=layer.gate_up.to(dtype), down=layer.down.to(dtype))
    mode = "bf16" if dtype == BF16 else "fp32"
    return max(map(same, run_quant(layer, packed, mode), run(plain)))


def quick_cases() -> dict[str, Case]:
    """Cases of the normal run."""
    cases: dict[str, Case] = {}
    packed = MoeProblem(tokens=9, hidden=64, inner=32, experts=3, k=2, dtype=BF16)
    for formats, mode in (
        (("q4_1", "q8_0"), "int8"),
        (("q4_0", "q4_1"), "bf16"),
        (("q8_0", "bf16"), "bf16"),
        (("q4_1", "q4_0"), "fp32"),
    ):
        p = replace(packed, dtype=F32, biases="both", base="float32") if mode == "fp32" else packed
        cases[f"quant_moe {'+'.join(formats)} {mode}"] = lambda a=(p, formats, mode): quant_case(*a)
    cases["quant_moe q4_1 int8 same bits"] = lambda: quant_rows("q4_1", "int8", 20)
    cases["quant_moe dense"] = lambda: dense_packs(BF16)
    return cases


def full_cases() -> dict[str, Case]:
    """Every pair of formats, every activation."""
    cases: dict[str, Case] = {}
    formats = ("q4_0", "q4_1", "q8_0")
    pairs = product(formats, (*formats, "bf16"), ("int8", "bf16"))
    for i, (first, second, mode) in enumerate(pairs):
        activation = ACTIVATIONS[i // 2 % len(ACTIVATIONS)]
        p = MoeProblem(
            tokens=20, hidden=96, inner=64, experts=3, k=2, dtype=BF16, activation=activation,
            load="zipf",
        )  # fmt: skip
        name = f"quant_moe {first}+{second} {mode} {activation}"
        cases[name] = lambda a=(p, (first, second), mode): quant_case(*a)
    for format, mode in product(formats, ("int8", "bf16", "fp32")):
        cases[f"quant_moe {format} {mode} same bits"] = lambda a=(format, mode, 70): quant_rows(*a)
    cases["quant_moe dense f32"] = lambda: dense_packs(F32)
    return cases


if __name__ == "__main__":
    sys.exit(main(quick_cases, full_cases))
