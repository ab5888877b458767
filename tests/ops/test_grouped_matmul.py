"""Grouped products and gradients of experts: bits, dtypes of gradients, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastllm import _C
from fastllm.ops import grouped_matmul, grouped_weight_grad, linear
from fastllm.ops.moe_backward import moe_backward
from fastllm.testing.infos.grouped_matmul import offsets_of
from fastllm.testing.infos.moe_backward import backward_args, random_ids, sorted_by_expert
from fastllm.testing.opinfo import generator

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_bits_that_linear_gives_it(dtype: torch.dtype) -> None:
    rows, n, k = (1, 0, 30, 5), 50, 600
    x = torch.randn(sum(rows), k, generator=generator()).to(dtype)
    weight = torch.randn(len(rows), n, k, generator=generator(1)).to(dtype)
    bias = torch.randn(len(rows), n, generator=generator(2))
    offsets = offsets_of(rows)
    ends = offsets.tolist()
    for isa in _C.isas():
        _C.set_isa(isa)
        y = grouped_matmul(x, weight, offsets, bias, torch.float32)
        for e in range(len(rows)):
            part = slice(ends[e], ends[e + 1])
            assert torch.equal(y[part], linear(x[part], weight[e], bias[e], torch.float32))


def test_weights_get_gradients_in_the_dtype_that_their_owner_wants() -> None:
    x = torch.randn(40, 24, generator=generator()).bfloat16()
    offsets = offsets_of((11, 0, 29))
    weight = torch.randn(3, 16, 24, generator=generator(1)).bfloat16().requires_grad_()
    dy = torch.randn(40, 16, generator=generator(2)).bfloat16()
    weight.grad_dtype = torch.float32
    grouped_matmul(x, weight, offsets).backward(dy)
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    assert torch.equal(weight.grad, grouped_weight_grad(dy, x, offsets, torch.float32))
    assert not weight.grad[1].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_that_are_written_past_the_caches_have_the_bits_of_small_ones(
    dtype: torch.dtype,
) -> None:
    # 34 MB in bfloat16, where one expert's 8 (fp32: 17) go through the caches; 520 rows are summed
    # in two blocks.
    rows, n, k = (40, 0, 520, 3), 2048, 2048
    offsets = offsets_of(rows)
    dy = torch.randn(sum(rows), n, generator=generator()).bfloat16()
    x = torch.randn(sum(rows), k, generator=generator(1)).bfloat16()
    dy[3, 7], x[50, 9], x[-1, -1] = float("nan"), float("inf"), 1e-39
    for isa in _C.isas():
        _C.set_isa(isa)
        every = grouped_weight_grad(dy, x, offsets, dtype)
        for e, end in enumerate(offsets.tolist()[1:]):
            part = slice(end - rows[e], end)
            alone = grouped_weight_grad(dy[part], x[part], offsets_of((rows[e],)), dtype)[0]
            bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
            assert torch.equal(every[e].view(bits), alone.view(bits)), (isa, e)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("load", ["spread", "one expert"])
def test_gradients_of_experts_have_the_same_bits_on_any_threads_and_in_any_run(
    dtype: torch.dtype, load: str
) -> None:
    # More rows than a task has on either side: 1,400 on one expert, or 1,400 on six.
    ids = torch.full((700, 2), 3).int() if load == "one expert" else None
    args = backward_args(generator(), (700, 72, 40, 6, 2), dtype, "silu", True, ids)
    torch.set_num_threads(1)
    alone = moe_backward(*args)
    for threads in (2, 1, 3, 2):
        torch.set_num_threads(threads)
        for a, b in zip(alone, moe_backward(*args), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tokens_gradients_do_not_depend_on_other_tokens(dtype: torch.dtype) -> None:
    shape = (300, 64, 48, 5, 3)
    ids = random_ids(generator(7), 300, 5, 3)
    args: list[Any] = list(backward_args(generator(), shape, dtype, "gelu", True, ids))
    dx, _, _, dweights, *_ = moe_backward(*args)
    kept = torch.tensor([0, 17, 18, 150, 299])
    offsets, slots = sorted_by_expert(ids[kept], 5)
    # `pre` of a slot: sorted rows of the whole batch, by slot, then in the order of the few.
    by_slot = torch.empty_like(args[7])
    by_slot[args[6].long()] = args[7]
    few_slots = kept[slots.long() // 3] * 3 + slots.long() % 3
    few = [args[0][kept], args[1][kept], *args[2:4], args[4][kept], offsets, slots]
    few += [by_slot[few_slots], *args[8:]]
    dx_few, _, _, dweights_few, *_ = moe_backward(*few)
    assert torch.equal(dx_few, dx[kept])
    assert torch.equal(dweights_few, dweights[kept])


def _arguments() -> dict[str, Tensor]:
    return {
        "x": torch.zeros(6, 8),
        "weight": torch.zeros(2, 4, 8),
        "offsets": torch.tensor([0, 2, 6], dtype=torch.int32),
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x", torch.zeros(6, 8, dtype=torch.float64)),
        ("x", torch.zeros(6, 2, 4)),
        ("weight", torch.zeros(2, 4, 7)),
        ("weight", torch.zeros(2, 4, 8).bfloat16()),
        ("weight", torch.zeros(4, 8)),
        ("offsets", torch.tensor([0, 2, 6])),
        ("offsets", torch.tensor([0, 6], dtype=torch.int32)),
        ("offsets", torch.tensor([0, 4, 3], dtype=torch.int32)),
        ("offsets", torch.tensor([-1, 4, 6], dtype=torch.int32)),
        ("offsets", torch.tensor([0, 4, 7], dtype=torch.int32)),
        ("bias", torch.zeros(2, 5)),
        ("out_dtype", torch.float16),
    ],
)
def test_bad_arguments_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        grouped_matmul(**{**_arguments(), name: value})


def test_bad_arguments_of_the_weights_gradient_are_named() -> None:
    x, offsets = torch.zeros(6, 8), offsets_of((2, 4))
    bad: list[tuple[tuple[Any, ...], str]] = [
        ((torch.zeros(5, 4), x, offsets), "dy"),
        ((torch.zeros(6, 4).bfloat16(), x, offsets), "dy"),
        ((torch.zeros(6, 4), x.long(), offsets), "x"),
        ((torch.zeros(6, 4), x, offsets_of((2, 5))), "offsets"),
        ((torch.zeros(6, 4), x, offsets, torch.int8), "out_dtype"),
    ]
    for arguments, name in bad:
        with pytest.raises(ValueError, match=rf"^{name}\b"):
            grouped_weight_grad(*arguments)


def test_a_bias_of_any_layout_is_read() -> None:
    arguments = _arguments()
    bias = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).T
    wanted = grouped_matmul(**arguments, bias=bias.contiguous())
    assert torch.equal(grouped_matmul(**arguments, bias=bias), wanted)
