"""quant_matmul and its gradients over formats x modes x rows x odd sizes x options x backends.

The full run holds 2,000 problems and more; each is judged against float64 on the reference, on
every native ISA level whose row serves it, and through the public op.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllm import _C
from fastllm.ops import packed_layout as layout
from fastllm.ops import quant_matmul, quant_matmul_input_grad
from fastllm.ops.quant_matmul import GATED, quant_matmul_ref
from fastllm.ops.quant_matmul_input_grad import quant_matmul_input_grad_ref
from fastllm.ops.registry import OPS, Op
from fastllm.testing.check import Judge
from fastllm.testing.infos.quant_matmul import exact_product, peer_product, random_packed
from fastllm.testing.opinfo import generator
from fastllm.testing.packed_weights import weight64
from fastllm.testing.quant_problem import Product, gradient_rows, products

OF_OP = (
    "x",
    "data",
    "scales",
    "format",
    "n",
    "bias",
    "activation",
    "out_dtype",
    "residual",
    "gated",
)


def cases(make: Callable[..., list[Product]], quick: int, full: int, seed: int) -> list[Any]:
    found = [*make(quick, seed, layout.FORMATS), *make(full, seed + 1, layout.FORMATS)]
    return [
        pytest.param(p, id=f"{i} {p.label}", marks=[pytest.mark.full] if i >= quick else [])
        for i, p in enumerate(found)
    ]


def native_row(op: Op, args: tuple[Any, ...], variant: str) -> Callable[..., Any] | None:
    """The native function that serves the arguments, if there is one."""
    for row in op.tables["cpu"]:
        if variant in row.variants and (row.when is None or row.when(*args)):
            return row.fn
    return None


def draws_of(p: Product) -> int:
    """How many draws tell the peer's error: the largest of few errors says little of it, and a
    gated activation multiplies errors by numbers that are large now and then."""
    return 64 if math.prod(p.rows) * p.n < 256 or p.option in GATED else 16


def check_all_levels(judge: Judge, native: Callable[[], Tensor]) -> None:
    """Judge a native function at every ISA level; threads change no bit."""
    for isa in _C.isas():
        _C.set_isa(isa)
        torch.set_num_threads(1)
        alone = native()
        judge.check([alone], f"native {isa}")
        torch.set_num_threads(2)
        assert torch.equal(native(), alone), f"{isa}: the thread count changes bits"


@pytest.mark.parametrize("p", cases(products, 60, 1400, seed=111))
def test_products_are_within_the_bound(p: Product) -> None:
    def draw(number: int) -> tuple[list[Tensor], list[Tensor]]:
        args = p.make(generator(number))
        return [exact_product(*args)], [peer_product(*args)]

    args, judge = p.make(generator()), Judge(draw, draws=draws_of(p))
    # As a GPU and files hold it; drawn here, since a mean's last bit depends on torch's threads.
    one = p.make(generator(), rows_per_group=1)
    variant = p.format if p.format in layout.DENSE else f"{p.format}/{p.mode}"
    native = native_row(OPS["quant_matmul"], args, variant)
    if native is not None:
        check_all_levels(judge, lambda: native(*args))
    y = quant_matmul(**dict(zip(OF_OP, args, strict=True)))
    judge.check([y], "the op")
    want = torch.float32 if p.option == "residual" else p.out_dtype or p.dtype
    assert y.dtype == want and y.is_contiguous()
    assert y.shape == (*p.rows, p.n // 2 if args[9] else p.n)
    if p.format in layout.QUANTIZED:  # torch's own products depend on a weight's strides
        assert torch.equal(quant_matmul_ref(*one), quant_matmul_ref(*args))


@pytest.mark.parametrize("p", cases(products, 15, 450, seed=201))
def test_gradients_of_products_are_within_the_bound(p: Product) -> None:
    """Of x, bias and residual: the weight rounded as a copy of it, quantizers passed through."""
    leaves = (0, 5, 8)

    def gradients(args: tuple[Any, ...], fn: Callable[..., Tensor], wide: bool) -> list[Tensor]:
        new = list(args)
        for i in leaves:
            if new[i] is not None:
                new[i] = (new[i].double() if wide else new[i]).detach().requires_grad_()
        y = fn(*new)
        dy = torch.randn(y.shape, generator=generator(1)).bfloat16().to(y.dtype)
        given = [new[i] for i in leaves if new[i] is not None]
        return list(torch.autograd.grad(y, given, dy))

    def run(*args: Any) -> Tensor:
        return quant_matmul(**dict(zip(OF_OP, args, strict=True)))

    def draw(number: int) -> tuple[list[Tensor], list[Tensor]]:
        args = p.make(generator(number))
        return gradients(args, exact_product, True), gradients(args, peer_product, False)

    args = p.make(generator())
    judge = Judge(draw, draws=draws_of(p))
    for isa in _C.isas():
        _C.set_isa(isa)
        got = gradients(args, run, False)
        judge.check(got, f"{isa}: x, bias, residual")
        assert [g.dtype for g in got] == [args[i].dtype for i in leaves if args[i] is not None]


@pytest.mark.parametrize("p", cases(gradient_rows, 12, 400, seed=301))
def test_input_gradients_are_within_the_bound(p: Product) -> None:
    def arguments(number: int) -> tuple[Any, ...]:
        g = generator(number)
        _, data, scales, *_ = p.make(g)
        dy = torch.randn(*p.rows, p.n + 3, generator=g).to(p.dtype)[..., 2 : 2 + p.n]
        return dy, data, scales, p.format, p.out_dtype

    def draw(number: int) -> tuple[list[Tensor], list[Tensor]]:
        args = arguments(number)
        exact = args[0].double() @ weight64(args[1], args[2], p.format, p.n, p.k)
        return [exact], [quant_matmul_input_grad_ref(*args)]

    args, judge = arguments(0), Judge(draw, draws=draws_of(p))
    native = native_row(OPS["quant_matmul_input_grad"], args, p.format)
    if native is not None:
        check_all_levels(judge, lambda: native(*args))
    dx = quant_matmul_input_grad(*args)
    judge.check([dx], "the op")
    assert dx.shape == (*p.rows, p.k) and dx.dtype == (p.out_dtype or p.dtype)


def test_the_full_run_holds_two_thousand_problems_of_every_format_and_mode() -> None:
    forward = [c.values[0] for c in cases(products, 60, 1400, seed=111)]
    others = len(cases(products, 15, 450, seed=201)) + len(cases(gradient_rows, 12, 400, seed=301))
    assert len(forward) + others >= 2000
    pairs = {(p.format, p.mode) for p in forward[:60]}
    assert len(pairs) == 19 * 3 + 2, "quick problems cover every format and mode"
    assert {p.option for p in forward[:60]} == {"", "residual", "silu", "gelu_tanh"}


@pytest.mark.parametrize("fmt", ["q4_1", "q6_k", "int4_g128"])
@pytest.mark.parametrize("gated", [None, "silu"])
def test_groups_and_remainders_of_many_rows_have_the_bits_of_few_rows(
    fmt: str, gated: str | None
) -> None:
    """Groups of 6, 7 or 12 rows meet unpacked strips, a long K in stretches; few rows do not."""
    n, k = 32, 7168
    data, scales = random_packed(generator(5), fmt, n, k, 16)
    x = torch.randn(97, k, generator=generator(6)).bfloat16()
    for isa in _C.isas():
        _C.set_isa(isa)
        for mode in ("int8", "bf16"):

            def product(rows: Tensor, mode: str = mode) -> Tensor:
                return quant_matmul(rows, data, scales, fmt, n, activation=mode, gated=gated)

            few = torch.cat([product(x[i : i + 2]) for i in range(0, 97, 2)])
            for rows in (9, 11, 15, 47, 49, 95, 97):
                assert torch.equal(product(x[:rows]), few[:rows]), (isa, mode, rows)
