"""quant_moe: packed experts against a float64 loop over the values that their blocks hold.

The peer of the bound is the op's definition: products of unscaled codes err more than those of
dequantized weights, most of all where a block's codes are far from zero (q4_1).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllm import _C
from fastllm.ops import moe, quant_moe
from fastllm.ops import packed_layout as layout
from fastllm.ops.quant_format import QUANT_FORMATS
from fastllm.ops.quant_products import quantize_activation_fp8_ref, quantize_activation_ref
from fastllm.ops.registry import OPS
from fastllm.quantize.gguf_blocks import quantize
from fastllm.quantize.packed_experts import PackedExperts, pack_experts
from fastllm.testing.check import Judge
from fastllm.testing.infos.quant_moe import random_experts
from fastllm.testing.moe_problem import Layer, MoeProblem, covering, expert_loop, problems
from fastllm.testing.opinfo import generator
from fastllm.testing.packed_weights import weight64, whole

ISAS = _C.isas()
MODES = ("int8", "bf16", "fp32")
WIDTHS: dict[str, Any] = {"hidden": (32, 64, 96, 160), "inner": (32, 64, 96), "strided": (False,)}
# Of formats with blocks of 64 columns and more, whose experts are larger.
FEW_EXPERTS: dict[str, Any] = {"experts": (1, 2, 3, 4, 6, 8), "tokens": (0, 1, 2, 3, 7, 16, 33, 64)}


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A problem with its experts packed in two formats."""

    problem: MoeProblem
    formats: tuple[str, str]
    mode: str

    @property
    def label(self) -> str:
        """Of a test case."""
        return f"{'+'.join(self.formats)}/{self.mode} {self.problem.label}"

    def draw(self, number: int = 0) -> tuple[Layer, tuple[PackedExperts, PackedExperts]]:
        """The layer, and its experts' weights packed."""
        layer = self.problem.layer(number)
        return layer, (pack(self.formats[0], layer.gate_up), pack(self.formats[1], layer.down))


def pack(format: str, weight: Tensor) -> PackedExperts:
    """The experts in that format; of formats whose scales are searched for long, random ones."""
    if format in (*layout.DENSE, "q4_0", "q4_1", "q8_0"):
        rows = weight if format in layout.DENSE else quantize(format, weight.float())
        return pack_experts(format, rows)
    count, n, k = weight.shape
    data, scales = random_experts(generator(n + k), format, count, n, k, 16)
    return PackedExperts(data, scales, format, n, k)


def values(packed: PackedExperts, mode: str) -> Tensor:
    """float64 `[E, n, k]`: what the blocks mean in a mode, nothing rounded."""
    every = [
        weight64(packed.data[e], packed.scales[e], packed.format, packed.n, packed.k, mode)
        for e in range(packed.experts)
    ]
    return torch.stack(every)


def made(count: int, seed: int) -> list[Packed]:
    """Problems of every pair of formats and mode; a dense format decides the dtype of x."""
    names = layout.FORMATS
    pairs = [(a, b) for a in names for b in names if {a, b} != {"bf16", "f32"}]
    rows = covering(count, seed, formats=pairs, mode=MODES)
    dense = problems(count, seed + 1, strided=[False])
    short = problems(count, seed + 2, **WIDTHS)
    few = problems(count, seed + 3, **WIDTHS, **FEW_EXPERTS)
    found = []
    for i, row in enumerate(rows):
        formats, mode = row["formats"], row["mode"]
        both = all(format in layout.DENSE for format in formats)
        long_blocks = max(QUANT_FORMATS[format].multiple for format in formats) > 32
        problem = dense[i] if both else few[i] if long_blocks else short[i]
        if long_blocks:
            hidden, inner = whole(formats[0], problem.hidden), whole(formats[1], problem.inner)
            problem = replace(problem, hidden=hidden, inner=inner)
        dtypes = {layout.DENSE[format] for format in formats if format in layout.DENSE}
        dtype = next(iter(dtypes), None)
        if mode != "int8":
            dtype = dtype or (torch.bfloat16 if mode == "bf16" else torch.float32)
            mode = "bf16" if dtype == torch.bfloat16 else "fp32"
        problem = replace(problem, dtype=dtype or problem.dtype)
        found.append(Packed(problem=problem, formats=formats, mode=mode))
    return found


def cases(quick: int, full: int, seed: int) -> list[Any]:
    return [
        pytest.param(p, id=f"{i} {p.label}", marks=[pytest.mark.full] if i >= quick else [])
        for i, p in enumerate([*made(quick, seed), *made(full, seed + 10)])
    ]


def run(layer: Layer, packs: tuple[PackedExperts, PackedExperts], mode: str) -> Tensor:
    rest = {n: v for n, v in layer.arguments.items() if n not in ("gate_up", "down")}
    up, down = packs
    return quant_moe(gate_up=up.parts, down=down.parts, inner=down.k, mode=mode, **rest)


def quantized(rows: Tensor) -> Tensor:
    """Rows as the int8 products see them, in their dtype; the gradient passes straight through."""
    q, step = quantize_activation_ref(rows.detach().float())
    seen = (q.to(rows.dtype) * step.to(rows.dtype).unsqueeze(-1)).flatten(1)
    return rows + (seen - rows.detach()) if rows.requires_grad else seen


def quantized_fp8(rows: Tensor) -> Tensor:
    """`quantized` of fp8 products."""
    q, step = quantize_activation_fp8_ref(rows.detach().float())
    seen = q.to(rows.dtype) * _steps(step, rows)
    return rows + (seen - rows.detach()) if rows.requires_grad else seen


def _steps(step: Tensor, rows: Tensor) -> Tensor:
    return step.to(rows.dtype).repeat_interleave(128, 1)[:, : rows.shape[1]]


def doubt_fp8(rows: Tensor) -> Tensor:
    """The distance of the e4m3 values between which float32 cannot tell, else 0."""
    _, step = quantize_activation_fp8_ref(rows.float())
    scaled = rows / _steps(step, rows).clamp_min(1e-30)
    error = 1e-4 * (scaled.abs() + 1)
    ends = [(scaled + e).clamp(-448, 448).float().to(torch.float8_e4m3fn) for e in (error, -error)]
    return (ends[0].double() - ends[1].double()) * _steps(step, rows)


def doubt(rows: Tensor) -> Tensor:
    """A step where float32 cannot tell to which of two integers a value is rounded, else 0."""
    _, step = quantize_activation_ref(rows.float())
    scaled = rows.unflatten(-1, (-1, layout.BLOCK)) / step.double().clamp_min(1e-30).unsqueeze(-1)
    near = ((scaled.frac().abs() - 0.5).abs() < 1e-3) * step.double().unsqueeze(-1)
    return near.flatten(1)


def maps(packed: Packed) -> dict[str, Any]:
    """What the int8 mode does to rows before the products of quantized weights."""
    kinds = {"int8": quantized, "fp8": quantized_fp8}
    return {
        name: kinds[QUANT_FORMATS[format].mode("int8")]
        for name, format in zip(("into_up", "into_down"), packed.formats, strict=True)
        if packed.mode == "int8" and format in layout.QUANTIZED
    }


def exact_layer(layer: Layer, packs: tuple[PackedExperts, PackedExperts], mode: str) -> Layer:
    up, down = (values(pack, mode) for pack in packs)
    return replace(layer.double(), gate_up=up, down=down)


@contextmanager
def definitions() -> Iterator[None]:
    """Inside, the ops of packed experts are served by their definitions."""
    ops = [OPS[name] for name in ("quant_moe", "quant_moe_backward", "moe_dispatch")]
    kept = [op.tables for op in ops]
    try:
        for op in ops:
            op.tables = {"cpu": [], "cuda": []}
            op._rows.clear()
        yield
    finally:
        for op, tables in zip(ops, kept, strict=True):
            op.tables = tables
            op._rows.clear()


def judge(packed: Packed) -> Judge:
    def draw(number: int) -> tuple[list[Tensor], list[Tensor]]:
        layer, packs = packed.draw(number)
        exact = expert_loop(exact_layer(layer, packs, packed.mode), exact=True, **maps(packed))
        with definitions():
            return [exact], [run(layer, packs, packed.mode)]

    return Judge(draw)


def slack(packed: Packed, layer: Layer, packs: tuple[PackedExperts, PackedExperts]) -> Tensor:
    """What roundings of activations to int8 that float32 leaves open can change, float64 [T, H].

    In bfloat16 such roundings are common enough that the peer's error has them too.
    """
    exact = exact_layer(layer, packs, packed.mode)
    if "into_down" not in maps(packed) or layer.x.dtype == torch.bfloat16:
        return torch.zeros_like(exact.x)
    bounds = replace(
        exact, down=exact.down.abs(), topk_weights=exact.topk_weights.abs(), down_bias=None,
        base=None,
    )  # fmt: skip
    open_steps = doubt_fp8 if maps(packed)["into_down"] is quantized_fp8 else doubt
    how = {**maps(packed), "into_down": open_steps}
    return expert_loop(bounds, exact=True, **how)


@pytest.mark.parametrize("packed", cases(30, 480, seed=21))
def test_forward_is_within_the_bound_on_every_isa_and_thread_count(packed: Packed) -> None:
    (layer, packs), bound = packed.draw(), judge(packed)
    open_roundings, exact = slack(packed, layer, packs), bound._exact[0]
    for isa in ISAS:
        _C.set_isa(isa)
        torch.set_num_threads(1)
        y = run(layer, packs, packed.mode)
        assert y.dtype == (layer.out_dtype or layer.x.dtype) and y.is_contiguous()
        error = y.double() - exact
        excess = error - error.clamp(-open_roundings, open_roundings)
        bound.check([(exact + excess).to(y.dtype)], isa)
        torch.set_num_threads(2)
        assert torch.equal(run(layer, packs, packed.mode), y), f"{isa}: threads change bits"


NAMES = ("x", "topk_weights", "base")


@pytest.mark.parametrize("packed", cases(14, 200, seed=51))
def test_gradients_are_within_the_bound_on_every_isa_and_thread_count(packed: Packed) -> None:
    """Of x, weights and base: rounded weights as a stored copy's would be, int8 passed through."""

    def gradients(layer: Layer, run: Any, number: int) -> list[Tensor]:
        layer, leaves = layer.leaves(NAMES)
        y = run(layer)
        dy = torch.randn(y.shape, generator=generator(number)).bfloat16().to(y.dtype)
        return list(torch.autograd.grad(y, leaves, dy, materialize_grads=True))

    def draw(number: int) -> tuple[list[Tensor], list[Tensor]]:
        layer, packs = packed.draw(number)
        up = {n: m for n, m in maps(packed).items() if n == "into_up"}
        exact = gradients(
            exact_layer(layer, packs, packed.mode),
            lambda a: expert_loop(a, exact=True, **up),
            number,
        )
        with definitions():
            return exact, gradients(layer, lambda a: run(a, packs, packed.mode), number)

    # The gradients of a few gate weights are few numbers, each a sum of many.
    bound, (layer, packs) = Judge(draw, draws=24), packed.draw()
    for isa in ISAS:
        _C.set_isa(isa)
        torch.set_num_threads(1)
        alone = gradients(layer, lambda a: run(a, packs, packed.mode), 0)
        bound.check(alone, f"{isa}: x, weights, base")
        torch.set_num_threads(2)
        again = gradients(layer, lambda a: run(a, packs, packed.mode), 0)
        assert all(torch.equal(a, b) for a, b in zip(alone, again, strict=True)), isa


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_packs_give_the_bits_of_plain_weights(dtype: torch.dtype) -> None:
    format = "f32" if dtype == torch.float32 else "bf16"
    for problem in problems(6, seed=5, dtype=[dtype], strided=[False]):
        layer = problem.layer()
        packs = pack(format, layer.gate_up), pack(format, layer.down)
        for isa in ISAS:
            _C.set_isa(isa)
            got = run(layer, packs, "bf16" if format == "bf16" else "fp32")
            assert torch.equal(got, moe(**layer.arguments)), f"{isa}: {problem.label}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("format", layout.QUANTIZED)
def test_a_token_has_the_same_bits_alone_and_in_any_batch(format: str, mode: str) -> None:
    dtype = torch.float32 if mode == "fp32" else torch.bfloat16
    hidden, inner = whole(format, 96), 64
    problem = MoeProblem(
        tokens=90, hidden=hidden, inner=inner, experts=12, k=3, dtype=dtype, load="zipf",
        biases="both",
    )  # fmt: skip
    layer, packs = Packed(problem=problem, formats=(format, "q8_0"), mode=mode).draw()
    for isa in ISAS:
        _C.set_isa(isa)
        every = run(layer, packs, mode)
        for rows in ([0], [50, 3], list(range(8)), list(range(30, 53)), list(range(89, -1, -1))):
            part = run(layer.tokens(rows), packs, mode)
            assert torch.equal(part, every[rows]), f"{isa}: rows {rows}"


def test_a_nan_and_an_infinity_stay_in_their_tokens() -> None:
    problem = MoeProblem(tokens=20, hidden=64, inner=32, experts=4, k=2)
    layer, packs = Packed(problem=problem, formats=("q4_1", "q8_0"), mode="int8").draw()
    x = layer.x.clone()
    x[3, 7], x[11, 40] = float("nan"), float("inf")
    for isa in ISAS:
        _C.set_isa(isa)
        clean, got = run(layer, packs, "int8"), run(replace(layer, x=x), packs, "int8")
        assert not got[[3, 11]].isfinite().any(), isa
        others = [t for t in range(20) if t not in (3, 11)]
        assert torch.equal(got[others], clean[others]), isa


def test_weights_ask_for_no_gradient_and_little_is_kept() -> None:
    problem = MoeProblem(tokens=50, hidden=64, inner=32, experts=8, k=3, dtype=torch.bfloat16)
    layer, packs = Packed(problem=problem, formats=("q4_0", "q4_0"), mode="bf16").draw()
    layer, _ = layer.leaves(["x", "topk_weights"])
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        run(layer, packs, "bf16")
    of_packs = {t.data_ptr() for p in packs for t in (p.data, p.scales)}
    kept_bytes = sum(size for at, size in kept.items() if at not in of_packs)
    assert kept_bytes == 50 * 3 * (2 * 32 * 2 + 4 + 4) + 4 * 9  # x itself is not needed


def test_bad_arguments_are_named() -> None:
    problem = MoeProblem(tokens=5, hidden=64, inner=32, experts=4, k=2)
    layer, (up, down) = Packed(problem=problem, formats=("q4_1", "q8_0"), mode="int8").draw()
    short = pack("q8_0", layer.down[:3])
    good = {
        "x": layer.x, "gate_up": up.parts, "down": down.parts, "inner": 32,
        "topk_ids": layer.topk_ids, "topk_weights": layer.topk_weights,
    }  # fmt: skip
    quant_moe(**good)
    nan = layer.topk_weights.clone()
    nan[2, 1] = float("nan")
    for changed, name in [
        ({"gate_up": (up.data, up.scales, "q5_x")}, "format"),
        ({"gate_up": (up.data, up.scales, "q8_0")}, "gate_up"),
        ({"gate_up": (up.data, up.scales.float(), "q4_1")}, "gate_up"),
        ({"gate_up": (up.data[:3], up.scales, "q4_1")}, "gate_up"),
        ({"down": short.parts}, "down"),
        ({"down": up.parts}, "down"),
        ({"inner": 64}, "gate_up"),
        ({"inner": -1}, "gate_up"),
        ({"mode": "int4"}, "mode"),
        ({"mode": "bf16"}, "x"),
        ({"x": layer.x[:, :32]}, "gate_up"),
        ({"x": layer.x.double()}, "x"),
        ({"topk_ids": layer.topk_ids + 3}, "topk_ids"),
        ({"topk_weights": nan}, "topk_weights"),
        ({"topk_weights": nan[:4]}, "topk_weights"),
        ({"activation": "tanh"}, "activation"),
        ({"out_dtype": torch.float16}, "out_dtype"),
    ]:
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            quant_moe(**{**good, **changed})


def test_a_slice_without_experts_gives_zeros_and_no_gradient() -> None:
    gate_up, down = (
        pack_experts("f32", torch.zeros(0, *size), "cpu") for size in ((10, 8), (8, 5))
    )
    x = torch.randn(3, 8, generator=generator()).requires_grad_()
    ids, weights = torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, 2)
    y = quant_moe(x, gate_up.parts, down.parts, 5, ids, weights, mode="fp32", first_expert=4)
    y.sum().backward()
    assert not y.any() and x.grad is not None and not x.grad.any()
