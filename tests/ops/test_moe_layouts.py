"""Experts whose weights lie transposed, or gate and up in turns: the bits of rows, in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastllm import _C
from fastllm.ops.expert_layout import join_pairs, laid_out, split_pairs
from fastllm.ops.moe import moe

# tokens, hidden, inner, experts, k: sizes that fit no tile, whole ones, one token, many rows
SHAPES = ((1, 33, 17, 3, 2), (5, 64, 32, 8, 2), (37, 70, 33, 6, 3), (300, 48, 80, 4, 2))
DTYPES = (torch.float32, torch.bfloat16)


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """Float arguments of `moe`, weights in rows and halves, and the ids."""
    tokens, hidden, inner, experts, k = shape
    g = torch.Generator().manual_seed(sum(shape))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g).to(dtype)

    weights, ids = torch.rand(tokens, experts, generator=g).topk(k)
    args = {
        "x": normal(tokens, hidden),
        "gate_up": normal(experts, 2 * inner, hidden) * hidden**-0.5,
        "down": normal(experts, hidden, inner) * inner**-0.5,
        "topk_weights": weights,
        "gate_up_bias": normal(experts, 2 * inner),
        "down_bias": normal(experts, hidden),
    }
    return args, ids.int()


def run(args: dict[str, Tensor], ids: Tensor, **options: Any) -> dict[str, Tensor]:
    """The output and all gradients, by name."""
    leaves = {name: value.detach().requires_grad_() for name, value in args.items()}
    y = moe(topk_ids=ids, activation="swiglu_oai", **leaves, **options)
    factors = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), factors)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def columns(weight: Tensor) -> Tensor:
    return weight.mT.contiguous().mT


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("which", ["gate_up", "down", "both"])
def test_columns_give_the_bits_of_rows(
    shape: tuple[int, ...], dtype: torch.dtype, which: str
) -> None:
    args, ids = drawn(shape, dtype)
    expected = run(args, ids)
    names = ("gate_up", "down") if which == "both" else (which,)
    found = run(args | {name: columns(args[name]) for name in names}, ids)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert all(found[name].mT.is_contiguous() for name in names)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pairs_give_the_bits_of_halves(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    args, ids = drawn(shape, dtype)
    expected = run(args, ids)
    pairs = {
        "gate_up": columns(join_pairs(args["gate_up"].mT).mT),
        "down": columns(args["down"]),
        "gate_up_bias": join_pairs(args["gate_up_bias"]),
    }
    found = run(args | pairs, ids, interleaved=True)
    found["gate_up"] = split_pairs(found["gate_up"].mT).mT
    found["gate_up_bias"] = split_pairs(found["gate_up_bias"])
    # dx sums over gates and ups in the order of the weight: in turns, not one after the other
    room = 1e-5 if dtype == torch.float32 else 2**-8
    dx, dx_expected = found.pop("x"), expected.pop("x")
    assert float((dx - dx_expected).abs().max()) <= room * float(dx_expected.abs().max())
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_other_devices_get_rows_and_halves() -> None:
    halves = drawn(SHAPES[1], torch.float32)[0]["gate_up"]
    pairs = columns(join_pairs(halves.mT).mT)
    copy = laid_out(pairs.to("meta"), interleaved=True)
    assert copy.is_contiguous() and copy.shape == halves.shape
    assert torch.equal(split_pairs(pairs.mT).mT.contiguous(), halves)


def test_pairs_that_lie_in_rows_are_copied() -> None:
    args, ids = drawn(SHAPES[2], torch.float32)
    expected = run(args, ids)["y"]
    pairs = {
        "gate_up": join_pairs(args["gate_up"].mT).mT.contiguous(),
        "gate_up_bias": join_pairs(args["gate_up_bias"]),
    }
    assert torch.equal(run(args | pairs, ids, interleaved=True)["y"], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_neither_on_threads_nor_on_the_level(dtype: torch.dtype) -> None:
    args, ids = drawn(SHAPES[3], dtype)
    args["gate_up"], args["down"] = columns(args["gate_up"]), columns(args["down"])
    rows = args | {name: args[name].contiguous() for name in ("gate_up", "down")}
    before, threads = _C.isa(), torch.get_num_threads()
    try:
        for level in _C.isas():
            _C.set_isa(level)
            expected = run(rows, ids)
            for count in (1, 2):
                torch.set_num_threads(count)
                found = run(args, ids)
                assert all(torch.equal(found[name], value) for name, value in expected.items())
    finally:
        _C.set_isa(before)
        torch.set_num_threads(threads)


def test_traced_layouts_are_those_of_the_kernels() -> None:
    args, ids = drawn(SHAPES[1], torch.float32)
    pairs = args | {"gate_up": columns(args["gate_up"]), "down": columns(args["down"])}
    leaves = {name: value.requires_grad_() for name, value in pairs.items()}

    def loss(leaves: dict[str, Tensor]) -> Tensor:
        y = moe(topk_ids=ids, activation="swiglu_oai", interleaved=True, **leaves)
        return y.square().sum()

    expected = torch.autograd.grad(loss(leaves), list(leaves.values()))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(leaves), list(leaves.values()))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride()
