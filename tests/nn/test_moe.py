"""The mixture of experts as a module: against float64, packed, sliced, watched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastllm.nn.moe import Experts, MoE
from fastllm.nn.routing import Routing
from fastllm.ops.moe_gate import Gate

HIDDEN, INNER, COUNT, TOKENS = 32, 24, 6, 17


def layer(dtype: torch.dtype = torch.float32, seed: int = 0, **options: object) -> MoE:
    routing = Routing(per_token=2, renormalize=True)
    moe = MoE(HIDDEN, INNER, COUNT, routing, activation=mode(dtype), **options)
    g = torch.Generator().manual_seed(seed)
    for name, p in list(moe.named_parameters()):
        value = torch.randn(p.shape, generator=g) * p.shape[-1] ** -0.5
        owner, _, attribute = name.rpartition(".")
        setattr(moe.get_submodule(owner), attribute, torch.nn.Parameter(value.to(dtype)))
    if moe.gate.e_score_correction_bias is not None:
        moe.gate.e_score_correction_bias = torch.randn(COUNT, generator=g)
    return moe


def mode(dtype: torch.dtype) -> str:
    return "bf16" if dtype == torch.bfloat16 else "fp32"


def tokens(count: int = TOKENS, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, HIDDEN, generator=g).to(dtype)


def plain(moe: MoE, x: Tensor) -> Tensor:
    """The layer with softmax routing, expert by expert, in the dtype of x."""
    weights = {name: p.to(x.dtype) for name, p in moe.state_dict(keep_vars=True).items()}
    scores = (x @ weights["gate.weight"].T).softmax(-1)
    chosen = scores.topk(2, -1)
    gate = torch.zeros_like(scores).scatter(1, chosen.indices, chosen.values)
    gate = gate / gate.sum(-1, keepdim=True)
    y = torch.zeros_like(x)
    for e in range(COUNT):
        a, b = (x @ weights["experts.gate_up_proj"][e].T).chunk(2, -1)
        y = y + gate[:, e, None] * ((F.silu(a) * b) @ weights["experts.down_proj"][e].T)
    if "shared_experts.gate_proj.weight" in weights:
        a = x @ weights["shared_experts.gate_proj.weight"].T
        b = x @ weights["shared_experts.up_proj.weight"].T
        y = y + (F.silu(a) * b) @ weights["shared_experts.down_proj.weight"].T
    return y


@pytest.mark.parametrize("shared_inner", [0, 40])
def test_values_and_gradients_are_those_of_a_float64_loop(shared_inner: int) -> None:
    moe, x = layer(shared_inner=shared_inner), tokens().requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    y, exact = moe(x), plain(moe, exact_x)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    dy = tokens(seed=2)
    leaves = [x, *moe.parameters()]
    found = torch.autograd.grad(y, leaves, dy)
    wanted = torch.autograd.grad(exact, [exact_x, *moe.parameters()], dy.double())
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_caches_give_the_bits_of_parameters_and_follow_them(dtype: torch.dtype) -> None:
    moe, x = layer(dtype, shared_inner=40), tokens(dtype=dtype)
    with torch.no_grad():
        before = moe(x)
        moe.gate.pack_()
        moe.experts.pack_()
        packs = list(moe.experts.packs())
        assert len(packs) == 2 and torch.equal(moe(x), before)
        for p in moe.experts.parameters():
            p.mul_(1.5)
        assert torch.equal(moe(x), before)  # the caches are not written by themselves
        moe.experts.pack_()
        assert [a.data.data_ptr() for a in packs] == [
            a.data.data_ptr() for a in moe.experts.packs()
        ]
        changed = moe(x)
        moe.experts.packed_gate_up = moe.experts.packed_down = None
        assert not torch.equal(changed, before) and torch.equal(moe(x), changed)


def test_recorded_gradients_read_the_parameters_not_stale_caches() -> None:
    moe, x = layer(), tokens()
    moe.experts.pack_()
    with torch.no_grad():
        moe.experts.down_proj.mul_(0.0)
    assert moe(x).abs().max() == 0
    with torch.no_grad():
        assert moe(x).abs().max() > 0


def test_a_tokens_bits_do_not_depend_on_the_others() -> None:
    moe, x = layer(torch.bfloat16, shared_inner=40), tokens(64, torch.bfloat16)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            whole = moe(x)
            for rows in ([5], list(range(0, 64, 3)), list(range(63, -1, -1))):
                assert torch.equal(moe(x[rows]), whole[rows])


def test_slices_of_experts_add_up_to_the_layer() -> None:
    moe, x = layer(), tokens()
    gate = moe.gate.choose(x)
    total = torch.zeros_like(x)
    for first, count in ((0, 2), (2, 3), (5, 1)):
        part = Experts(count, HIDDEN, INNER, first=first, activation="fp32")
        rows = slice(first, first + count)
        part.gate_up_proj = torch.nn.Parameter(moe.experts.gate_up_proj[rows].detach())
        part.down_proj = torch.nn.Parameter(moe.experts.down_proj[rows].detach())
        total = total + part(x, gate.topk_ids, gate.topk_weights)
    torch.testing.assert_close(total, moe(x), rtol=1e-5, atol=1e-6)


def test_the_selection_bias_decides_who_is_chosen_and_weighs_nothing() -> None:
    routing = Routing(per_token=2, scoring="sigmoid")
    moe = layer(bias_correction=True)
    moe.gate.routing = routing
    bias = moe.gate.e_score_correction_bias
    assert bias is not None and "gate.e_score_correction_bias" in moe.state_dict()
    assert not any(p is bias for p in moe.parameters())
    bias.copy_(torch.tensor([9.0, 0, 0, 9, 0, 0]))
    gate = moe.gate.choose(tokens())
    scores = (tokens() @ moe.gate.weight.T).sigmoid()
    assert gate.topk_ids.sort(-1).values.tolist() == [[0, 3]] * TOKENS
    torch.testing.assert_close(gate.topk_weights, scores.gather(1, gate.topk_ids.long()))


class _Half:
    """A balance that halves the weights, so that its use is seen."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def record(self, gate: Gate) -> Tensor:
        self.seen.append(gate.counts.clone())
        return 0.5 * gate.topk_weights


def test_balance_is_asked_where_gradients_are_recorded_and_only_there() -> None:
    moe, x = layer(), tokens()
    plain_y = moe(x)
    moe.balance = balance = _Half()
    torch.testing.assert_close(moe(x), 0.5 * plain_y)
    assert len(balance.seen) == 1 and int(balance.seen[0].sum()) == 2 * TOKENS
    with torch.no_grad():
        torch.testing.assert_close(moe(x), plain_y)
    assert len(balance.seen) == 1


def test_packing_without_parameters_is_refused() -> None:
    moe = layer()
    moe.experts.pack_()
    moe.experts.gate_up_proj = moe.experts.down_proj = None
    with pytest.raises(ValueError, match="packed alone"):
        moe.experts.pack_()
    assert moe(tokens()).shape == (TOKENS, HIDDEN)
