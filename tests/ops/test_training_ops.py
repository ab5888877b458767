"""Gradients of norms, gates and tables; the optimizer's step: what their OpInfos do not say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastllm import _C
from fastllm.ops import adamw_step_, add_rms_norm, embedding, rms_norm, sum_of_squares, swiglu
from fastllm.ops.embedding_backward import embedding_backward
from fastllm.ops.rms_norm_backward import rms_norm_backward
from fastllm.testing.opinfo import generator

BF16, F32 = torch.bfloat16, torch.float32


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=generator(9)).to(BF16))


def in_bf16(t: Tensor) -> bool:
    return torch.equal(t, t.to(BF16).to(t.dtype))


def test_gradients_of_bfloat16_weights_reach_a_float32_gradient_unrounded() -> None:
    norm, after_add, table = parameter(64), parameter(64), parameter(11, 64)
    ids = torch.tensor([3, 3, 7, 3])
    for p in (norm, after_add, table):
        p.grad_dtype = F32
    x = embedding(ids, table, F32)
    y, h = add_rms_norm(rms_norm(x, norm).to(BF16), x, after_add)
    (y.float().square().sum() + (h * h.detach()).sum()).backward()
    for p in (norm, after_add, table):
        assert p.grad is not None and p.grad.dtype == F32 and not in_bf16(p.grad)
    assert table.grad is not None
    used = torch.tensor([3, 7])
    assert (table.grad[used] != 0).all()
    assert table.grad.abs().sum(1).nonzero().flatten().tolist() == used.tolist()


def test_gradients_of_bfloat16_weights_are_bfloat16_otherwise() -> None:
    norm, table = parameter(64), parameter(11, 64)
    rms_norm(embedding(torch.tensor([3, 5]), table, F32), norm).sum().backward()
    assert norm.grad is not None and norm.grad.dtype == BF16
    assert table.grad is not None and table.grad.dtype == BF16


def test_a_frozen_norm_gets_no_gradient_and_its_input_does() -> None:
    weight = parameter(64).requires_grad_(False)
    x = torch.randn(5, 64, generator=generator(), requires_grad=True)
    trained = weight.detach().clone().requires_grad_()
    y, h = add_rms_norm(x.to(BF16), x, weight)
    want_y, want_h = add_rms_norm(x.to(BF16), x, trained)
    ones = (torch.ones_like(y), torch.ones_like(h))
    got = torch.autograd.grad((y, h), x, ones)[0]
    assert torch.equal(got, torch.autograd.grad((want_y, want_h), x, ones)[0])


@pytest.mark.parametrize("used", ["norm", "residual"])
def test_add_rms_norm_takes_the_gradient_of_one_output_alone(used: str) -> None:
    weight = torch.randn(32, generator=generator(1))
    x = torch.randn(4, 32, generator=generator(2), requires_grad=True)
    residual = torch.randn(4, 32, generator=generator(3), requires_grad=True)
    y, h = add_rms_norm(x, residual, weight)
    dx, dresidual = torch.autograd.grad((y if used == "norm" else h).sum(), (x, residual))
    assert torch.equal(dx, dresidual)
    if used == "residual":
        assert torch.equal(dx, torch.ones_like(dx))


def test_a_rows_gradient_does_not_depend_on_other_rows() -> None:
    dy, x = torch.randn(2, 400, 48, generator=generator())
    weight = torch.randn(48, generator=generator(1))
    for isa in _C.isas():
        _C.set_isa(isa)
        whole, _ = rms_norm_backward(dy, x, weight, 1e-5, F32)
        for begin, end in ((0, 1), (17, 300), (399, 400)):
            part, _ = rms_norm_backward(dy[begin:end], x[begin:end], weight, 1e-5, F32)
            assert torch.equal(part, whole[begin:end]), isa


def test_the_gradients_of_gate_and_up_lie_side_by_side() -> None:
    gate, up = torch.randn(2, 5, 24, generator=generator()).to(BF16)
    leaves = [gate.requires_grad_(), up.requires_grad_()]
    dgate, dup = torch.autograd.grad(swiglu(*leaves).sum(), leaves)
    assert dgate.stride() == dup.stride() == (48, 1)
    assert dup.data_ptr() == dgate.data_ptr() + 24 * 2


def test_a_tied_tables_gradient_is_the_sum_of_both_uses() -> None:
    table = nn.Parameter(torch.randn(11, 16, generator=generator(4)))
    ids = torch.tensor([1, 4, 1])
    hidden = embedding(ids, table)
    (hidden @ table.T).square().sum().backward()
    exact = table.detach().double().requires_grad_()
    (exact[ids] @ exact.T).square().sum().backward()
    assert table.grad is not None and exact.grad is not None
    torch.testing.assert_close(table.grad, exact.grad.float())


def test_rows_of_a_repeated_id_are_added_in_their_order() -> None:
    # 2^24 + 1 - 2^24 in float32 is 0 from the left; another order would give 1.
    dy = torch.tensor([[2.0**24], [1.0], [-(2.0**24)]])
    for isa in _C.isas():
        _C.set_isa(isa)
        assert embedding_backward(dy, torch.tensor([2, 2, 2]), 5, F32)[2].item() == 0.0
        swapped = embedding_backward(dy[[0, 2, 1]].contiguous(), torch.tensor([2, 2, 2]), 5, F32)
        assert swapped[2].item() == 1.0


def test_a_sum_of_squares_is_precise_for_many_elements() -> None:
    x = torch.full((3_000_001,), 0.1)
    want = x.double().square().sum()
    assert abs(sum_of_squares(x).double() - want) < 1e-6 * want
    assert sum_of_squares(torch.empty(0)) == 0


def test_bad_arguments_of_a_step_are_named() -> None:
    p, state = torch.ones(3), torch.zeros(3)
    with pytest.raises(ValueError, match=r"grad must be float32 or bfloat16 of shape \(3,\)"):
        adamw_step_(p, None, state, state.clone(), torch.ones(4), lr=0.1, step=1)
    with pytest.raises(ValueError, match="a bfloat16 param needs a float32 master"):
        adamw_step_(p.to(BF16), None, state, state.clone(), p, lr=0.1, step=1)
    with pytest.raises(ValueError, match="step must be at least 1"):
        adamw_step_(p, None, state, state.clone(), p, lr=0.1, step=0)
    with pytest.raises(ValueError, match="exp_avg_sq must be float32"):
        adamw_step_(p, None, state, state.to(BF16), p, lr=0.1, step=1)
