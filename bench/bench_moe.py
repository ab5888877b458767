"""Suite `moe`: mixtures of experts beside the expert loop, grouped products and a dense layer.

`dense` is a gated feed-forward of equal active size (K times the inner width) in torch: what the
layer would cost if choosing among experts were free; the last lines tell our time as a multiple of
it. `grouped_mm` is torch's grouped product with everything around it, sorting too, `compiled` the
same through torch.compile. All run in bfloat16: torch's grouped products
take 2.5 times as long in float32. Weights of decode cases rotate over at least 128 MB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastllm import ops
from fastllm.bench import moe_layers as layers
from fastllm.bench.moe_layers import Inputs, Shape
from fastllm.bench.moe_packed import packed_work
from fastllm.testing.moe_problem import draw_ids
from fastllm.testing.opinfo import generator
from fastllm.testing.suite import OURS, BenchCase, Row, Settings, Work, benchmark_case
from fastllm.testing.timing import rotation

SUITE = "moe"
SECONDS = 420
TITLE = "mixtures of experts beside grouped products and a dense layer of equal active size"

FINE = Shape("fine", 2048, 512, 256, 64, 8)
COARSE = Shape("coarse", 2048, 512, 1024, 8, 2)
DECODE = (1, 8, 64)
COUNTS = (8, 16, 32, 64, 128, 256)  # of experts, at a fixed active size
BALANCED = "balanced"  # ours, beside ours on Zipf loads
NOTES = (
    "peers: bfloat16; grouped_mm: stable argsort, gather, two grouped products, index_add",
    "expert loop: gather, two linear layers, index_add for each expert that has a token",
)


def trained(settings: Settings) -> list[Shape]:
    """Shapes of whole batches."""
    if settings.quick:
        return [FINE, COARSE]
    zipf = [replace(shape, load="zipf") for shape in (FINE, COARSE)]
    return [FINE, COARSE, *zipf, replace(FINE, tokens=4096), replace(COARSE, tokens=4096)]


def cases(settings: Settings) -> Iterator[BenchCase]:
    """Parts, then batches, decode steps, packed experts, and the count of experts."""
    for tokens in (8, 2048) if settings.quick else (1, 64, 8, 2048, 4096):
        shape = replace(FINE, tokens=tokens)
        yield _case(f"router {shape.label}", partial(_router, shape, settings), settings)
        yield _case(f"dispatch {shape.label}", partial(_dispatch, shape, settings), settings)
    for shape in trained(settings):
        for what, make in (("forward", _forward), ("forward+backward", _step)):
            yield _case(f"{what} {shape.label}", partial(make, shape, settings), settings, 4.0)
    yield _case(f"layer {FINE.label}", partial(_layer, FINE, settings), settings, 4.0)
    for shape in (FINE, COARSE):
        for tokens in DECODE[:2] if settings.quick else DECODE:
            few = replace(shape, tokens=tokens)
            yield _case(f"decode {few.label}", partial(_decode, few, settings), settings)
    for format in ("bf16", "q4_0") if settings.quick else ("bf16", "q4_0", "q8_0"):
        for tokens in DECODE[:1] if settings.quick else (*DECODE, 2048):
            few = replace(FINE, tokens=tokens)
            dense = format == "bf16"
            yield _case(
                f"{'packed ' if dense else ''}{format} {few.label}",
                partial(packed_work, few, format, settings),
                settings,
                dtype="bfloat16" if dense else "int8",
            )
    for count in () if settings.quick else COUNTS:
        shape = replace(FINE, name="count", experts=count)
        yield _case(
            f"forward+backward {shape.label}", partial(_count, shape, settings), settings, 4
        )


def _case(
    label: str,
    make: Callable[[], Work],
    settings: Settings,
    seconds: float = 1.0,
    dtype: str = "bfloat16",
) -> BenchCase:
    return BenchCase(
        suite=SUITE,
        label=label,
        dtype=dtype,
        device=settings.device,
        seconds=seconds / 4 if settings.quick else seconds,
        min_rounds=3,
        make=make,
    )


def _router(shape: Shape, settings: Settings) -> Work:
    logits = torch.randn(shape.tokens, shape.experts, generator=generator()).to(settings.device)

    def plain() -> tuple[Tensor, ...]:
        weights, ids = logits.softmax(-1).topk(shape.k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        return weights, ids, torch.bincount(ids.flatten(), minlength=shape.experts)

    gate = partial(ops.moe_gate, logits, shape.k, renormalize=True)
    return Work(functions={OURS: gate, "torch": plain}, nbytes=logits.nbytes)


def _dispatch(shape: Shape, settings: Settings) -> Work:
    ids = draw_ids(generator(), shape.tokens, shape.experts, shape.k, "uniform")
    ids = ids.to(settings.device)

    def plain() -> tuple[Tensor, ...]:
        flat = ids.flatten()
        ends = torch.bincount(flat, minlength=shape.experts).cumsum(0, dtype=torch.int32)
        return flat.argsort(stable=True), ends

    functions = {OURS: partial(ops.moe_dispatch, ids, shape.experts), "torch": plain}
    return Work(functions=functions, nbytes=ids.nbytes)


def _others(settings: Settings) -> dict[str, layers.Function]:
    found: dict[str, layers.Function] = {"grouped_mm": layers.composed}
    if not settings.quick:  # a compilation takes longer than the measurement
        found["compiled"] = layers.compiled()
    return {**found, "expert loop": layers.expert_loop}


def _forward(shape: Shape, settings: Settings) -> Work:
    inputs = layers.draw(shape, settings.device)
    args = (*inputs.leaves, inputs.ids)
    functions = {OURS: layers.forward(layers.ours, *args)}
    for name, peer in _others(settings).items():
        functions[name] = layers.forward(peer, *args)
    functions["dense"] = layers.forward(layers.dense, *layers.dense_inputs(shape, settings.device))
    if shape.load == "zipf":
        functions[BALANCED] = layers.forward(layers.ours, *_balanced(shape, inputs))
    return _work(functions, shape, inputs, 1)


def _step(shape: Shape, settings: Settings) -> Work:
    inputs = layers.draw(shape, settings.device)
    functions = {OURS: layers.step(layers.ours, inputs.leaves, inputs.ids)}
    for name, peer in _others(settings).items():
        functions[name] = layers.step(peer, inputs.leaves, inputs.ids)
    functions["dense"] = layers.step(layers.dense, layers.dense_inputs(shape, settings.device))
    if shape.load == "zipf":
        *leaves, ids = _balanced(shape, inputs)
        functions[BALANCED] = layers.step(layers.ours, leaves, ids)
    return _work(functions, shape, inputs, 3)


def _balanced(shape: Shape, inputs: Inputs) -> list[Tensor]:
    uniform = layers.draw(replace(shape, load="uniform"), str(inputs.x.device))
    return [*inputs.leaves, uniform.ids]


def _count(shape: Shape, settings: Settings) -> Work:
    inputs = layers.draw(shape, settings.device)
    functions = {
        OURS: layers.step(layers.ours, inputs.leaves, inputs.ids),
        "grouped_mm": layers.step(layers.composed, inputs.leaves, inputs.ids),
        "dense": layers.step(layers.dense, layers.dense_inputs(shape, settings.device)),
    }
    return _work(functions, shape, inputs, 3)


def _layer(shape: Shape, settings: Settings) -> Work:
    """Router, choice, experts; forward and backward."""
    inputs = layers.draw(shape, settings.device)
    router = torch.randn(shape.experts, shape.hidden, generator=generator(1)) * shape.hidden**-0.5
    leaves = [inputs.x, router.to(inputs.x), inputs.gate_up, inputs.down]

    def ours(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        logits = ops.linear(x, router, out_dtype=torch.float32)
        gate = ops.moe_gate(logits, shape.k, renormalize=True)
        return ops.moe(x, gate_up, down, gate.topk_ids, gate.topk_weights)

    def other(peer: layers.Function, x: Tensor, router: Tensor, *experts: Tensor) -> Tensor:
        weights, ids = F.linear(x, router).float().softmax(-1).topk(shape.k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        return peer(x, *experts, weights, ids)

    functions = {OURS: layers.step(ours, leaves)}
    for name, peer in _others(settings).items():
        functions[name] = layers.step(partial(other, peer), leaves)
    functions["dense"] = layers.step(layers.dense, layers.dense_inputs(shape, settings.device))
    return _work(functions, shape, inputs, 3)


def _decode(shape: Shape, settings: Settings) -> Work:
    size = shape.experts * shape.expert_bytes
    seeds = iter(range(4096))
    every = rotation(lambda: layers.draw(shape, settings.device, next(seeds)), size)
    active = sum(next(every).active for _ in range(8)) / 8

    def run(function: layers.Function) -> Tensor:
        inputs = next(every)
        with torch.no_grad():
            return function(*inputs.leaves, inputs.ids)

    peers = {"grouped_mm": layers.composed, "expert loop": layers.expert_loop}
    functions = {OURS: partial(run, layers.ours)}
    functions |= {name: partial(run, peer) for name, peer in peers.items()}
    return Work(functions=functions, nbytes=active * shape.expert_bytes, flops=shape.flops)


def _work(
    functions: dict[str, Callable[[], Any]], shape: Shape, inputs: Inputs, products: int
) -> Work:
    return Work(
        functions=functions,
        unit="ms",
        nbytes=products * inputs.active * shape.expert_bytes,
        flops=products * shape.flops,
        notes=NOTES,
    )


def summary(rows: Sequence[Row]) -> list[str]:
    """Our time as a multiple of the dense layer's, and of ours on balanced loads."""
    lines = []
    for row in rows:
        for name in ("dense", BALANCED):
            if name in row.peers:
                lines.append(f"{row.case}: {row.value / row.peers[name]:.2f} x {name}")
    return lines


def plot(rows: Sequence[Row], path: Path) -> bool:
    """Time of a step by the number of experts; False if the rows were not measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [row for row in rows if " count " in row.case]
    if not measured:
        return False
    counts = [int(row.case.partition(" E=")[2].split()[0]) for row in measured]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name in (OURS, "grouped_mm", "dense"):
        times = [row.value if name == OURS else row.peers[name] for row in measured]
        axes.plot(counts, times, marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set(xlabel=f"experts, of which each token takes {FINE.k}", ylabel="ms, forward + backward")
    axes.set_title(f"{FINE.tokens} tokens, d={FINE.hidden}, n={FINE.inner}", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return True


@pytest.mark.parametrize("case", cases(Settings(quick=True)), ids=str)
def test_moe(case: BenchCase, benchmark: Any) -> None:
    benchmark_case(case, benchmark)
