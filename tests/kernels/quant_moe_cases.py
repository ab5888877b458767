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
from interpreter_cases import BF16, F32, NAMES, Case, main, randn, same
from moe_cases import dispatched, judged, run
from quant_cases import FORMATS, pack
from torch import Tensor

from fastllm.ops.quant_format import QUANT_FORMATS
from fastllm.ops.quant_products import quantize_activation_fp8_ref, quantize_activation_ref
from fastllm.testing.moe_problem import ACTIVATIONS, Layer, MoeProblem, expert_loop
from fastllm.testing.packed_weights import weight64


def pack_experts(
    format: str, experts: int, n: int, k: int, mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(data, scales, what a product of that mode multiplies, float64) of random packed experts."""
    if format in ("bf16", "f32"):
        values = randn(experts, n, k, dtype=BF16 if format == "bf16" else F32, seed=7) * k**-0.5
        shape = (experts, n, k // 2, 1, 2) if format == "bf16" else (experts, n, k, 1)
        return values.view(shape), torch.empty(experts, 0), values.double()
    kind = QUANT_FORMATS[format]
    top = {"unsigned": 1 << kind.bits, "int8": 128, "nf4": 1, "e4m3": 448}[kind.codes]
    size = 40 * k**-0.5 / top  # of scales of 0.05: values as a model's, k^-0.5
    parts = [pack(format, n, k, seed=e + 1, size=size) for e in range(experts)]
    values = [weight64(*part, format, n, k, own_mode(format, mode)) for part in parts]
    data, scales = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
    return data, scales, torch.stack(values)


def own_mode(format: str, mode: str) -> str:
    return QUANT_FORMATS[format].mode(mode)


def quant_layer(
    problem: MoeProblem, formats: tuple[str, str], mode: str
) -> tuple[Layer, list[Any]]:
    """(layer whose weights are the packed ones' values in float64, packed arguments)."""
    held = problem.held[1] if problem.held else problem.experts
    first = pack_experts(formats[0], held, 2 * problem.inner, problem.hidden, mode)
    second = pack_experts(formats[1], held, problem.hidden, problem.inner, mode)
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
    if not len(rows):
        return rows
    q, dx = quantize_activation_ref(rows)
    return (q.double() * dx.double()[..., None]).flatten(1).to(rows.dtype)


def as_e4m3(rows: Tensor) -> Tensor:
    """Rows as their e4m3 blocks represent them, in their dtype."""
    if not len(rows):
        return rows
    q, dx = quantize_activation_fp8_ref(rows)
    scale = dx.double().repeat_interleave(128, 1)[:, : rows.shape[1]]
    return (q.double() * scale).to(rows.dtype)


def quant_case(problem: MoeProblem, formats: tuple[str, str], mode: str) -> float:
    """y, and the gradients of x and of the routing weights; their peer has a copy in x's dtype."""
    from fastllm.kernels.quant_moe_backward import quant_moe_backward

    layer, packed = quant_layer(problem, formats, mode)
    y, pre = run_quant(layer, packed, mode)
    maps: dict[str, Callable[[Tensor], Tensor]] = {}
    if mode == "int8":
        for name, format in zip(("into_up", "into_down"), formats, strict=True):
            if format in FORMATS:
                maps[name] = as_e4m3 if own_mode(format, mode) == "fp8" else as_int8
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
    # Right are the gradients of the packed values, as y is theirs: the forward never rounds a
    # weight. Were the rounded copy right, its roundings in pre would count as the kernel's errors
    # and be none of the peer's.
    for judge, exactly in ((layer.double(), True), (stored, False)):
        leaf, leaves = judge.leaves(names)
        out = expert_loop(leaf, exact=exactly)
        grads.append(torch.autograd.grad(out, leaves, dy.to(out.dtype)))
    return max(worst, *map(judged, found, *grads))


def quant_rows(format: str, mode: str, tokens: int) -> float:
    """Packed experts: a few tokens and many give the same bits."""
    p = problem(format, format, tokens=tokens, experts=2, dtype=F32 if mode == "fp32" else BF16)
    layer, packed = quant_layer(p, (format, format), mode)
    whole, _ = run_quant(layer, packed, mode)
    return max(
        same(run_quant(layer.tokens(rows), packed, mode)[0], whole[rows])
        for rows in (slice(0, 1), slice(5, 16))
    )


def dense_packs(dtype: torch.dtype) -> float:
    """Packed bf16 and f32 experts give the bits of plain ones."""
    p = problem("q8_0", "q8_0", dtype=dtype)
    mode = "bf16" if dtype == BF16 else "fp32"
    layer, packed = quant_layer(p, (NAMES[dtype],) * 2, mode)
    plain = replace(layer, gate_up=layer.gate_up.to(dtype), down=layer.down.to(dtype))
    return max(map(same, run_quant(layer, packed, mode), run(plain)))


def problem(first: str, second: str, **options: Any) -> MoeProblem:
    """A layer whose sizes the formats divide."""
    hidden, inner = (QUANT_FORMATS[format].multiple for format in (first, second))
    sizes = {"hidden": max(64, hidden), "inner": max(32, inner), "tokens": 9, "experts": 3, "k": 2}
    return MoeProblem(**(sizes | {"dtype": BF16} | options))


def quick_cases() -> dict[str, Case]:
    """Every kind of codes and of scales once, each mode."""
    cases: dict[str, Case] = {}
    for formats, mode in (
        (("q4_1", "q8_0"), "int8"),
        (("q5_0", "q4_k"), "bf16"),
        (("int8", "bf16"), "bf16"),
        (("q6_k", "q4_1"), "int8"),
        (("fp8_block", "nf4_dq"), "int8"),
        (("int4_asym_g64", "fp8"), "fp32"),
    ):
        options: dict[str, Any] = {"activation": "gelu"}
        if mode == "fp32":
            options = {"dtype": F32, "biases": "both", "base": "float32"}
        p = problem(*formats, **options)
        cases[f"quant_moe {'+'.join(formats)} {mode}"] = lambda a=(p, formats, mode): quant_case(*a)
    cases["quant_moe q4_1 int8 same bits"] = lambda: quant_rows("q4_1", "int8", 20)
    cases["quant_moe dense"] = lambda: dense_packs(BF16)
    return cases


def full_cases() -> dict[str, Case]:
    """Every format in every mode beside another, every activation."""
    cases: dict[str, Case] = {}
    for i, (format, mode) in enumerate(product(FORMATS, ("int8", "bf16", "fp32"))):
        formats = (format, (*FORMATS, "f32" if mode == "fp32" else "bf16")[(7 * i + 3) % 20])
        activation = ACTIVATIONS[i % len(ACTIVATIONS)]
        p = problem(
            *formats, tokens=20, activation=activation, load="zipf",
            dtype=F32 if mode == "fp32" else BF16,
        )  # fmt: skip
        name = f"quant_moe {'+'.join(formats)} {mode} {activation}"
        cases[name] = lambda a=(p, formats, mode): quant_case(*a)
        cases[f"quant_moe {format} {mode} same bits"] = lambda a=(format, mode, 70): quant_rows(*a)
    cases["quant_moe dense f32"] = lambda: dense_packs(F32)
    return cases


if __name__ == "__main__":
    sys.exit(main(quick_cases, full_cases))
