"""Packed experts of every format and mode: the bits of quant_matmul, activation, quant_matmul."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastllm import _C
from fastllm.ops import moe_dispatch, quant_matmul, quant_moe, swiglu
from fastllm.ops import packed_layout as layout
from fastllm.ops.quant_format import QUANT_FORMATS
from fastllm.ops.quant_moe import _quant_moe
from fastllm.testing.infos.quant_moe import random_experts
from fastllm.testing.opinfo import generator
from fastllm.testing.packed_weights import whole

ISAS = _C.isas()
Packs = tuple[Tensor, Tensor, str]
EXPERTS = 3


def experts(format: str, n: int, k: int) -> Packs:
    rows = layout.ROWS_PER_GROUP["cpu"]
    return *random_experts(generator(n + k), format, EXPERTS, n, k, rows), format


def product(x: Tensor, packs: Packs, e: int, n: int, mode: str, out: torch.dtype) -> Tensor:
    data, scales, format = packs
    mode = QUANT_FORMATS[format].mode(mode)
    return quant_matmul(x, data[e], scales[e], format, n, None, mode, out)


def layer(tokens: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, ids (one expert a token, the first one busy) and weights of 1."""
    g = generator(tokens)
    x = torch.randn(tokens, hidden, generator=g).to(dtype)
    ids = torch.randint(0, EXPERTS, (tokens, 1), generator=g).int()
    ids[: tokens // 2] = 0
    return x, ids, torch.ones(tokens, 1)


def check(gate_up: Packs, down: Packs, inner: int, hidden: int, mode: str, tokens: int) -> None:
    dtype = torch.float32 if mode == "fp32" else torch.bfloat16
    x, ids, weights = layer(tokens, hidden, dtype)
    offsets, slots = moe_dispatch(ids, EXPERTS)
    y, pre = _quant_moe(
        x, *gate_up, *down, inner, weights, offsets, slots, None, None, None,
        "silu", mode, True, torch.float32,
    )  # fmt: skip
    alone = quant_moe(x[-1:], gate_up, down, inner, ids[-1:], weights[-1:], mode=mode)
    assert torch.equal(alone, y[-1:].to(dtype))
    for e in range(EXPERTS):
        at = slots[offsets[e] : offsets[e + 1]].long()
        if not len(at):
            continue
        want = product(x[at], gate_up, e, 2 * inner, mode, dtype)
        assert torch.equal(pre[offsets[e] : offsets[e + 1]], want), f"expert {e}: before"
        a = swiglu(*want.split(inner, 1))
        want = product(a, down, e, hidden, mode, torch.float32)
        assert torch.equal(y[at], want), f"expert {e}: after"


@pytest.mark.parametrize("mode", ("int8", "bf16", "fp32"))
@pytest.mark.parametrize("format", layout.QUANTIZED)
def test_experts_have_the_bits_of_single_products(format: str, mode: str) -> None:
    hidden, inner = whole(format, 288), whole(format, 96)
    gate_up, down = experts(format, 2 * inner, hidden), experts(format, hidden, inner)
    for isa in ISAS:
        _C.set_isa(isa)
        for threads, tokens in ((1, 1), (2, 9), (2, 45)):
            torch.set_num_threads(threads)
            check(gate_up, down, inner, hidden, mode, tokens)


def test_up_rows_may_begin_inside_a_panel() -> None:
    """With dense second weights an expert's width need not fill panels."""
    for first, second, mode in (("q5_k", "bf16", "bf16"), ("nf4", "f32", "fp32")):
        hidden, inner = whole(first, 64), 41
        gate_up, down = experts(first, 2 * inner, hidden), experts(second, hidden, inner)
        for isa in ISAS:
            _C.set_isa(isa)
            for tokens in (2, 40):
                check(gate_up, down, inner, hidden, mode, tokens)
