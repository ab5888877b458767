"""Mixtures of experts under the interpreter: sorting, grouped products, layer, gradients.

Runs as interpreter_cases.py does; quant_moe_cases.py has packed experts. Layers are judged by the
problems and the float64 loop over experts of the ops' own tests (fastllm.testing.moe_problem). Rows
that nothing may read are NaN in what the kernels get.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from interpreter_cases import (
    BF16,
    F32,
    NAMES,
    Case,
    excess,
    main,
    randn,
    same,
)
from torch import Tensor

from fastllm.testing.moe_problem import (
    LOADS,
    Layer,
    MoeProblem,
    draw_ids,
    expert_loop,
    problems,
)

LEAVES = ("x", "gate_up", "down", "topk_weights", "gate_up_bias", "down_bias")
Dispatch = tuple[Tensor, Tensor]
DRAWS = 8  # of a problem, at most, to know its peer's errors


def judged(y: Tensor, ref: Tensor, peer: Tensor) -> float:
    """The error of y in units of its bound: that of all cases, or twice the peer's error."""
    return excess(y, ref) / max(1.0, 2.0 * excess(peer.to(y.dtype), ref))


# --- sorting ------------------------------------------------------------------------------------


def sorted_slots(ids: Tensor, n_experts: int, first: int) -> Dispatch:
    """(offsets, slots) by Python's stable sort."""
    flat = [(e - first, s) for s, e in enumerate(ids.flatten().tolist()) if e >= 0]
    here = sorted(((e, s) for e, s in flat if 0 <= e < n_experts), key=lambda pair: pair[0])
    offsets = [sum(e < bound for e, _ in here) for bound in range(n_experts + 1)]
    slots = [s for _, s in here] + [-1] * (ids.numel() - len(here))
    return torch.tensor(offsets, dtype=torch.int32), torch.tensor(slots, dtype=torch.int32)


def dispatch_case(
    tokens: int, experts: int, k: int, load: str, held: tuple[int, int], few: bool
) -> float:
    from fastllm.kernels import moe_dispatch, moe_tuning

    ids = draw_ids(torch.Generator().manual_seed(tokens), tokens, experts, k, load)
    limit, moe_tuning.FEW_SLOTS = moe_tuning.FEW_SLOTS, 1 << 30 if few else 0
    block, moe_tuning.SLOTS_BLOCK = moe_tuning.SLOTS_BLOCK, 64
    try:
        found = moe_dispatch.moe_dispatch(ids, held[1], held[0])
    finally:
        moe_tuning.FEW_SLOTS, moe_tuning.SLOTS_BLOCK = limit, block
    return max(map(same, found, sorted_slots(ids, held[1], held[0])))


# --- grouped products ---------------------------------------------------------------------------


def starts(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts], dtype=torch.int32).cumsum(0).int()


def grouped_case(
    dtype: torch.dtype, sizes: tuple[int, int], counts: list[int], tail: int, **options: bool
) -> float:
    """y and the gradients of a grouped product; rows past the last expert's give 0."""
    from fastllm.kernels.grouped_matmul import grouped_matmul
    from fastllm.kernels.grouped_weight_grad import grouped_bias_grad, grouped_weight_grad

    (n, k), experts, rows = sizes, len(counts), sum(counts)
    offsets = starts(counts)
    x, weight = randn(rows + tail, k, dtype=dtype), randn(experts, n, k, dtype=dtype, seed=1)
    dy, bias = randn(rows + tail, n, dtype=dtype, seed=2), randn(experts, n, dtype=dtype, seed=3)
    expert = torch.repeat_interleave(torch.arange(experts), torch.tensor(counts))
    y, dx = (torch.zeros(rows + tail, size, dtype=torch.float64) for size in (n, k))
    y[:rows] = torch.einsum("mk,mnk->mn", x[:rows].double(), weight.double()[expert])
    y[:rows] += bias.double()[expert]
    dx[:rows] = torch.einsum("mn,mnk->mk", dy[:rows].double(), weight.double()[expert])
    dweight = torch.zeros(experts, n, k, dtype=torch.float64)
    dbias = torch.zeros(experts, n, dtype=torch.float64)
    for e in range(experts):
        dweight[e] = dy[:rows][expert == e].double().T @ x[:rows][expert == e].double()
        dbias[e] = dy[:rows][expert == e].double().sum(0)
    x[rows:], dy[rows:] = math.nan, math.nan
    return max(
        excess(grouped_matmul(x, weight, offsets, bias, **options), y, dtype),
        excess(grouped_matmul(dy, weight, offsets, None, True, F32, **options), dx, F32),
        excess(grouped_weight_grad(dy, x, offsets), dweight, dtype),
        excess(grouped_bias_grad(dy, offsets, F32), dbias, F32),
    )


def hostile_offsets() -> float:
    """Offsets outside of the rows, or running backwards, read and write nothing outside."""
    from fastllm.kernels.grouped_matmul import grouped_matmul
    from fastllm.kernels.grouped_weight_grad import grouped_weight_grad

    x, weight, huge = randn(20, 16), randn(3, 8, 16, seed=1), 2**31 - 1
    for offsets in ((-7, 8, 20, huge), (-huge, 8, 8, 20), (huge, -huge, 30, 5), (0, 20, 0, 20)):
        bad = torch.tensor(offsets, dtype=torch.int32)
        y, dweight = grouped_matmul(x, weight, bad), grouped_weight_grad(x[:, :8], x, bad)
        assert y.shape == (20, 8) and dweight.shape == (3, 8, 16)
    cut = torch.tensor((0, 8, 20, 20), dtype=torch.int32)
    bad = torch.tensor((-7, 8, 20, huge), dtype=torch.int32)
    return same(grouped_matmul(x, weight, bad), grouped_matmul(x, weight, cut))


# --- the layer ----------------------------------------------------------------------------------


def dispatched(layer: Layer) -> Dispatch:
    return sorted_slots(layer.topk_ids, layer.gate_up.shape[0], layer.first_expert or 0)


def run(layer: Layer, **options: Any) -> tuple[Tensor, Tensor]:
    """(y, pre) of the kernels."""
    from fastllm.kernels.moe import moe

    return moe(
        layer.x, layer.gate_up, layer.down, layer.topk_weights, *dispatched(layer),
        layer.gate_up_bias, layer.down_bias, layer.base, layer.activation, True, layer.out_dtype,
        **options,
    )  # fmt: skip


def run_backward(layer: Layer, pre: Tensor, dy: Tensor, **options: Any) -> list[Tensor]:
    """Gradients in the order of LEAVES; rows of pre that no expert has are NaN."""
    from fastllm.kernels.moe_backward import moe_backward

    offsets, slots = dispatched(layer)
    pre[int(offsets[-1]) :] = math.nan
    found = moe_backward(
        dy, layer.x, layer.gate_up, layer.down, layer.topk_weights, offsets, slots, pre,
        layer.gate_up_bias, layer.down_bias, layer.activation, [True] * 6, layer.gate_up.dtype,
        F32, **options,
    )  # fmt: skip
    return list(found)


def by_loop(layer: Layer, dy: Tensor, exact: bool) -> list[Tensor]:
    """y and the gradients of LEAVES by the loop and autograd."""
    leaf, leaves = (layer.double() if exact else layer).leaves(LEAVES)
    y = expert_loop(leaf, exact=exact)
    grads = torch.autograd.grad(
        y, leaves, dy.to(y.dtype), allow_unused=True, materialize_grads=True
    )
    found = dict(zip((n for n in LEAVES if getattr(layer, n) is not None), grads, strict=True))
    return [y.detach(), *(found.get(name, torch.empty(0)) for name in LEAVES)]


def layer_case(problem: MoeProblem, **options: Any) -> float:
    """y and all gradients of a layer."""
    layer = problem.layer()
    dy = randn(problem.tokens, problem.hidden, dtype=problem.dtype, seed=9)
    y, pre = run(layer, **options)
    assert y.dtype == (layer.out_dtype or problem.dtype)
    found = [y, *run_backward(layer, pre, dy, **options)]
    allowed: list[float] = [1.0] * len(found)
    present = [True, *(getattr(layer, name) is not None for name in LEAVES)]
    exact = by_loop(layer, dy, True)
    worst = math.inf
    for draw in range(DRAWS):  # the peer's largest error of few outputs varies a lot
        other = problem.layer(draw)
        refs = exact if draw == 0 else by_loop(other, dy, True)
        peers = by_loop(other, dy, False)
        for i, there in enumerate(present):
            if there:
                error = 2.0 * excess(peers[i].to(found[i].dtype), refs[i])
                allowed[i] = max(allowed[i], error)
        worst = max(
            excess(got, ref) / most
            for got, ref, most, there in zip(found, exact, allowed, present, strict=True)
            if there
        )
        if worst <= 1.0:
            break
    return worst


def same_bits(problem: MoeProblem) -> float:
    """A token alone, few and many: the same bits, through other tiles."""
    layer = problem.layer()
    whole, _ = run(layer)
    parts = slice(0, 1), slice(3, 8), slice(7, problem.tokens)
    return max(same(run(layer.tokens(rows))[0], whole[rows]) for rows in parts)


def descriptor_bits(problem: MoeProblem) -> float:
    """Weights through descriptors and through pointers: the same bits everywhere."""
    layer = problem.layer()
    dy = randn(problem.tokens, problem.hidden, dtype=problem.dtype, seed=9)
    results = []
    for descriptor in (False, True):
        y, pre = run(layer, descriptor=descriptor)
        results.append([y, *run_backward(layer, pre, dy, descriptor=descriptor)])
    return max(map(same, *results))


def nothing_to_do(tokens: int, experts: int) -> float:
    """Without tokens, or with experts that are all elsewhere: base alone, and zero gradients."""
    problem = MoeProblem(
        tokens=tokens, hidden=16, inner=8, experts=3, k=2, biases="both", base="float32"
    )
    layer = problem.layer()
    names = ("gate_up", "down", "gate_up_bias", "down_bias")
    held = {name: getattr(layer, name)[:experts] for name in names}
    layer = replace(layer, **held, topk_ids=layer.topk_ids + 4, first_expert=0)
    y, pre = run(layer)
    grads = run_backward(layer, pre, layer.x)
    shapes = [g.shape == getattr(layer, n).shape for g, n in zip(grads, LEAVES, strict=True)]
    return same(y, layer.base) if all(shapes) and not any(g.any() for g in grads) else math.inf


def unwanted() -> float:
    """Gradients that nobody asked for are empty; without pre the forward keeps nothing."""
    from fastllm.kernels.moe import moe
    from fastllm.kernels.moe_backward import moe_backward

    layer = MoeProblem(tokens=5, hidden=16, inner=8, experts=3, k=2).layer()
    where = dispatched(layer)
    weights = layer.gate_up, layer.down, layer.topk_weights
    y, pre = run(layer)
    alone, nothing = moe(layer.x, *weights, *where, None, None, None, "silu", False)
    assert nothing.shape == (0, 16)
    everything = run_backward(layer, pre, y)
    for i in range(6):
        wanted = [j == i for j in range(6)]
        found = moe_backward(
            y, layer.x, *weights, *where, pre, None, None, "silu", wanted, F32, F32
        )
        assert [g.numel() > 0 for g in found] == wanted
        assert torch.equal(found[i], everything[i])
    return same(alone, y)


# --- the ops' own cases -------------------------------------------------------------------------

OPS = ("moe_dispatch", "grouped_matmul", "grouped_weight_grad", "moe", "moe_backward")
CPU_ONLY = "in-turns"  # GPUs get halves
LARGE = ("T700", "T3001", "T5000", "625+", "-1100x")  # minutes under the interpreter


def op_case(name: str, label: str, dtype: torch.dtype) -> float:
    """A case of an op's OpInfo through its Triton row, by the bound of all its rows."""
    from fastllm.ops.registry import OPS
    from fastllm.testing.check import case_arguments, case_judge
    from fastllm.testing.opinfo import all_infos, outputs

    info = all_infos()[name]
    case = next(case for case in info.cases(dtype) if case.label == label)
    row = next(row for row in OPS[name].tables["cuda"] if row.name == "triton")
    got = outputs(row.fn(*case_arguments(info, case)))
    case_judge(OPS[name], info, case).check(got, f"triton {label}")
    return 0.0


def op_cases() -> dict[str, Case]:
    from fastllm.testing.opinfo import all_infos

    infos, cases = all_infos(), {}
    for name in OPS:
        for dtype in infos[name].dtypes:
            for case in infos[name].cases(dtype):
                if not any(size in case.label for size in (*LARGE, CPU_ONLY)):
                    key = f"{name} case {NAMES.get(dtype, 'i32')} {case.label}"
                    cases[key] = lambda a=(name, case.label, dtype): op_case(*a)
    return cases


# --- the tables ---------------------------------------------------------------------------------


def layer_name(problem: MoeProblem) -> str:
    return f"moe {problem.label}"[:90]


def quick_cases() -> dict[str, Case]:
    """Cases of the normal run."""
    cases: dict[str, Case] = {}
    for few in (True, False):
        kind = "few" if few else "many"
        args = (70, 11, 3, "holes", (2, 7), few)
        cases[f"moe_dispatch {kind}"] = lambda a=args: dispatch_case(*a)
    cases["moe_dispatch empty"] = lambda: dispatch_case(0, 4, 2, "uniform", (0, 4), True)
    for dtype, descriptor in ((F32, False), (BF16, True)):
        args = (dtype, (40, 72), [3, 0, 17, 1], 5)
        cases[f"grouped_matmul {NAMES[dtype]}"] = lambda a=args, d=descriptor: grouped_case(
            *a, descriptor=d
        )
    cases["grouped_matmul no rows"] = lambda: grouped_case(BF16, (16, 16), [0, 0], 3)
    cases["grouped_matmul hostile offsets"] = hostile_offsets
    every = {"biases": "both", "base": "float32"}
    for problem in (
        MoeProblem(tokens=9, hidden=40, inner=24, experts=4, k=2),
        MoeProblem(tokens=33, hidden=72, inner=40, experts=4, k=2, dtype=BF16, load="zipf"),
        MoeProblem(tokens=7, hidden=33, inner=15, experts=6, k=3, strided=True, **every),
        MoeProblem(tokens=7, hidden=32, inner=16, experts=6, k=3, dtype=BF16, held=(2, 2), **every),
        MoeProblem(tokens=5, hidden=16, inner=16, experts=3, k=2, activation="gelu", load="holes"),
        MoeProblem(tokens=5, hidden=16, inner=8, experts=3, k=2, activation="gelu_tanh"),
        MoeProblem(tokens=9, hidden=16, inner=16, experts=3, k=2, activation="swiglu_oai", **every),
    ):
        cases[layer_name(problem)] = lambda p=problem: layer_case(p)
    bits = MoeProblem(tokens=36, hidden=72, inner=40, experts=2, k=2, dtype=BF16)
    cases["moe bf16 same bits"] = lambda: same_bits(bits)
    cases["moe descriptors"] = lambda: descriptor_bits(replace(bits, tokens=7, biases="both"))
    cases["moe without tokens"] = lambda: nothing_to_do(0, 3)
    cases["moe without experts"] = lambda: nothing_to_do(5, 0)
    cases["moe experts elsewhere"] = lambda: nothing_to_do(5, 3)
    cases["moe unwanted"] = unwanted
    return cases


def full_cases() -> dict[str, Case]:
    """Further loads, shapes, formats."""
    cases: dict[str, Case] = {}
    for k, experts, load, few in product((1, 8), (8, 60), LOADS, (True, False)):
        args = (130 // k, experts, k, load, (0, experts), few)
        name = f"moe_dispatch k{k} E{experts} {load} {'few' if few else 'many'}"
        cases[name] = lambda a=args: dispatch_case(*a)
    args = (16, 512, 8, "zipf", (0, 512), False)
    cases["moe_dispatch E512 zipf many"] = lambda a=args: dispatch_case(*a)
    for dtype, counts, descriptor in product(
        (F32, BF16), ([70, 3], [1] * 9, [0, 0, 200]), (False, True)
    ):
        args = (dtype, (136, 72), counts, 2)
        name = f"grouped_matmul {NAMES[dtype]} {len(counts)}:{counts[-1]} descriptor={descriptor}"
        cases[name] = lambda a=args, d=descriptor: grouped_case(*a, descriptor=d)
    for problem in problems(48, 5, experts=(1, 2, 3, 8, 16), tokens=(1, 2, 7, 33, 65)):
        cases[layer_name(problem)] = lambda p=problem: layer_case(p)
    bits = MoeProblem(tokens=70, hidden=136, inner=72, experts=2, k=2, dtype=F32, biases="both")
    for dtype in (F32, BF16):
        cases[f"moe {NAMES[dtype]} same bits"] = lambda d=dtype: same_bits(replace(bits, dtype=d))
    return cases | op_cases()


if __name__ == "__main__":
    sys.exit(main(quick_cases, full_cases))
