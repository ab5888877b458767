"""Optimizers: torch's own as the judge, masters, round trips of state, who takes what."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastllm.models.trainable import initialize
from fastllm.nn.embedding import Embedding
from fastllm.testing.opinfo import generator
from fastllm.train import presets
from fastllm.train.optim import (
    AdamW,
    MasterOptimizer,
    Muon,
    OptimConfig,
    accumulate_in_fp32,
    clip_grad_norm_,
    grad_norm,
    make_optimizer,
    set_rates,
)
from fastllm.train.presets import ShapeConfig

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Matrices of 48 columns: threads would wait for each other longer than they compute."""
    torch.set_num_threads(1)


def parameters(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[nn.Parameter]:
    g = generator(1)
    return [nn.Parameter(torch.randn(*shape, generator=g).to(dtype)) for shape in shapes]


def set_gradients(params: list[nn.Parameter], seed: int) -> None:
    g = generator(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=g).to(p.dtype)


def twins(dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    shapes = ((33, 20), (16, 48), (24, 24))
    return parameters(dtype, *shapes), parameters(dtype, *shapes)


def test_adamw_in_float32_equals_torchs() -> None:
    ours, theirs = twins()
    values: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    a, b = AdamW(ours, **values), torch.optim.AdamW(theirs, **values, fused=True)
    for step in range(12):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("match_rms", [True, False])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_in_float32_equals_torchs(match_rms: bool, nesterov: bool) -> None:
    ours, theirs = twins()
    values: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "nesterov": nesterov}
    adjust = "match_rms_adamw" if match_rms else "original"
    a = Muon(ours, **values, match_rms=match_rms)
    b = torch.optim.Muon(theirs, **values, adjust_lr_fn=adjust)
    for step in range(4):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        # Both iterate in bfloat16: an update's entries (about 0.2 to 1 times the rate) may differ
        # by a few of its units.
        torch.testing.assert_close(p, q, rtol=0, atol=2e-3)


def test_muon_of_a_batch_of_matrices_is_muon_of_each() -> None:
    (batch,) = parameters(torch.float32, (3, 24, 16))
    each = [nn.Parameter(batch.detach()[i].clone()) for i in range(3)]
    a, b = Muon([batch], lr=0.02), Muon(each, lr=0.02)
    batch.grad = torch.randn(3, 24, 16, generator=generator(3))
    for i, p in enumerate(each):
        p.grad = batch.grad[i].clone()
    a.step()
    b.step()
    torch.testing.assert_close(
        batch.detach(), torch.stack([p.detach() for p in each]), atol=2e-3, rtol=0
    )


def test_stacked_matrices_are_each_stepped_by_themselves() -> None:
    (both,) = parameters(torch.float32, (3, 24, 16))
    halves = [nn.Parameter(part.clone()) for part in both.detach().chunk(2, dim=1)]
    a = Muon([{"params": [both], "stacked": 2}], lr=0.02)
    b = Muon(halves, lr=0.02)
    both.grad = torch.randn(3, 24, 16, generator=generator(3))
    for half, part in zip(halves, both.grad.chunk(2, dim=1), strict=True):
        half.grad = part.clone()
    a.step()
    b.step()
    torch.testing.assert_close(both.detach(), torch.cat([h.detach() for h in halves], 1))
    with pytest.raises(ValueError, match=r"shape \(3, 24, 16\) cannot be 5 stacked"):
        Muon([{"params": [both], "stacked": 5}])


def make(kind: str, params: list[nn.Parameter]) -> MasterOptimizer:
    return AdamW(params, lr=1e-3) if kind == "adamw" else Muon(params, lr=1e-3)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_bfloat16_parameters_are_their_masters_rounded(kind: str) -> None:
    params, wide = twins()
    narrow = [nn.Parameter(p.detach().bfloat16()) for p in params]
    for p, q in zip(wide, narrow, strict=True):
        p.data = q.detach().float()
    a, b = make(kind, wide), make(kind, narrow)
    start = [p.detach().clone() for p in narrow]
    for step in range(5):
        set_gradients(narrow, step)
        for p, q in zip(wide, narrow, strict=True):
            assert q.grad is not None
            p.grad = q.grad.float()
        a.step()
        b.step()
    for p, q in zip(wide, narrow, strict=True):
        assert torch.equal(b.state[q]["master"], p)
        assert torch.equal(q, p.bfloat16())
    assert any(not torch.equal(p, q) for p, q in zip(start, narrow, strict=True))


def test_small_steps_add_up_in_the_master() -> None:
    p = nn.Parameter(torch.ones(64, dtype=BF16))
    optimizer = AdamW([p], lr=1e-4)  # half a spacing of bfloat16 below 1 is 2e-3
    for _ in range(40):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert (p < 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_loaded_state_goes_on_with_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    params, _ = twins(dtype)
    optimizer = make(kind, params)
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = [nn.Parameter(p.detach().clone()) for p in params]
    other = make(kind, again)
    other.load_state_dict(torch.load(file))
    for p in again:
        floats = {k: v for k, v in other.state[p].items() if k != "step"}
        assert floats and all(v.dtype == torch.float32 for v in floats.values())
        assert ("master" in floats) == (dtype == BF16)
    for step in range(3, 6):
        for some, stepper in ((params, optimizer), (again, other)):
            set_gradients(some, step)
            stepper.step()
    for p, q in zip(params, again, strict=True):
        assert torch.equal(p, q)
        for name, value in optimizer.state[p].items():
            assert torch.equal(value, other.state[q][name])


def test_a_state_of_another_shape_is_refused() -> None:
    params, _ = twins()
    optimizer = AdamW(params)
    optimizer.initialize_state()
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][1]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"exp_avg of parameter 1 has shape \(3,\)"):
        optimizer.load_state_dict(state)


def test_a_state_from_before_stacked_matrices_is_read() -> None:
    params, others = twins()
    optimizer = make("muon", params)
    optimizer.initialize_state()
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group.pop("stacked", None)
    other = make("muon", others)
    other.load_state_dict(state)
    for some, stepper in ((params, optimizer), (others, other)):
        set_gradients(some, 0)
        stepper.step()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_grad_scale_is_the_gradient_multiplied() -> None:
    for kind in ("adamw", "muon"):
        ours, theirs = twins()
        a, b = make(kind, ours), make(kind, theirs)
        set_gradients(ours, 0)
        for p, q in zip(ours, theirs, strict=True):
            assert p.grad is not None
            q.grad = p.grad * 0.25
        a.step(grad_scale=torch.tensor(0.25))
        b.step()
        for p, q in zip(ours, theirs, strict=True):
            assert torch.equal(p, q)
            assert torch.equal(a.state[p]["step"], torch.tensor(1))


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_clipping_through_the_scale_equals_torchs(max_norm: float) -> None:
    ours, theirs = twins()
    set_gradients(ours, 0)
    set_gradients(theirs, 0)
    scale = torch.tensor(1 / 8)
    norm = clip_grad_norm_(ours, max_norm, scale)
    for q in theirs:
        assert q.grad is not None
        q.grad /= 8
    want = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    torch.testing.assert_close(norm, want)
    for p, q in zip(ours, theirs, strict=True):
        assert p.grad is not None and q.grad is not None
        torch.testing.assert_close(p.grad * scale, q.grad)


def test_the_norm_shows_a_bad_gradient_and_no_gradient() -> None:
    params, _ = twins()
    assert grad_norm(params) == 0
    set_gradients(params, 0)
    assert params[1].grad is not None
    params[1].grad[3, 4] = float("nan")
    assert grad_norm(params).isnan()


def test_bad_clipping_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="max_norm must be positive"):
        clip_grad_norm_([], 0.0, torch.tensor(1.0))
    with pytest.raises(ValueError, match="grad_scale must be a 0-dim float32"):
        clip_grad_norm_([], 1.0, torch.ones(2))


def test_gradients_of_bfloat16_parameters_accumulate_in_float32() -> None:
    model = nn.Linear(4, 3, bias=False, dtype=BF16)
    accumulate_in_fp32(model)
    for _ in range(257):  # bfloat16 counts to 256
        model(torch.ones(1, 4, dtype=BF16)).sum().backward()
    assert model.weight.grad is not None
    assert model.weight.grad.dtype == torch.float32
    assert (model.weight.grad == 257).all()
    before = model.weight.detach().clone()
    AdamW(model.parameters(), lr=0.1).step()
    assert not torch.equal(before, model.weight)


class Tiny(nn.Module):
    """The parts of a decoder that make_optimizer tells apart."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed_tokens = Embedding(11, 8)
        weight = torch.randn(11, 8, generator=generator())
        self.embed_tokens.weight = nn.Parameter(weight)
        self.block = nn.Linear(8, 8)
        self.norm = nn.RMSNorm(8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.lm_head = nn.Linear(8, 11, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight


def named_groups(model: nn.Module, optimizer: MasterOptimizer) -> list[tuple[set[str], Any]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [({names[id(p)] for p in g["params"]}, g) for g in optimizer.param_groups]


def test_decay_and_muon_take_the_right_parameters() -> None:
    model = Tiny(tied=False)
    config = OptimConfig(name="muon", lr=1e-3, weight_decay=0.1, muon_lr=2e-3)
    found = named_groups(model, make_optimizer(model, config))
    rest = {"embed_tokens.weight", "block.bias", "norm.weight"}
    assert [names for names, _ in found] == [{"block.weight"}, {"lm_head.weight"}, rest]
    assert [g["weight_decay"] for _, g in found] == [0.1, 0.1, 0.0]
    assert [g["muon"] for _, g in found] == [True, False, False]
    assert [g["lr"] for _, g in found] == [2e-3, 1e-3, 1e-3]


def test_routers_are_stepped_as_heads_and_gate_and_up_as_two_matrices() -> None:
    shape = ShapeConfig(preset="deepseek", depth=2, width=32, head_dim=16, experts=4)
    config = presets.model_config(shape, vocab_size=50, bos=None, eos=(), context=16)
    model = initialize(config, dtype=torch.float32)
    found = named_groups(
        model, make_optimizer(model, OptimConfig(name="muon", lr=1e-3, expert_rate=3.0))
    )
    by_name = {name: group for names, group in found for name in names}
    prefix = "model.layers.1.mlp."
    for name, muon, stacked in (
        ("gate.weight", False, None), ("experts.gate_up_proj", True, 2),
        ("experts.down_proj", True, 1), ("shared_experts.gate_proj.weight", True, 1),
    ):  # fmt: skip
        group = by_name[prefix + name]
        assert (group["muon"], group.get("stacked")) == (muon, stacked), name
        assert group["lr"] == pytest.approx(
            3e-3 if "experts." in name and "shared" not in name else 1e-3
        )
        assert group["weight_decay"] == 0.1
    assert len(by_name) == len(list(model.parameters()))  # the selection bias is none of them


def test_a_tied_embedding_is_stepped_once_and_does_not_decay() -> None:
    model = Tiny(tied=True)
    optimizer = make_optimizer(model, OptimConfig(lr=1e-3))
    found = named_groups(model, optimizer)
    rest = {"embed_tokens.weight", "block.bias", "norm.weight"}
    assert [names for names, _ in found] == [{"block.weight"}, rest]
    set_rates(optimizer, 0.5)
    assert {g["lr"] for _, g in found} == {5e-4}


def test_a_schedule_of_torch_drives_the_rates() -> None:
    model = Tiny(tied=True)
    optimizer = make_optimizer(model, OptimConfig(name="muon", lr=1e-3, muon_lr=0.02))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.01, 5e-4]


def test_bad_settings_are_named() -> None:
    params, _ = twins()
    with pytest.raises(ValueError, match="lr must be at least"):
        AdamW(params, lr=-1.0)
    with pytest.raises(ValueError, match="beta2 must be at least 0 and below 1"):
        AdamW(params, betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="parameters must be float32 or bfloat16"):
        AdamW([nn.Parameter(torch.ones(2, dtype=torch.float64))])
    with pytest.raises(ValueError, match="Muon takes matrices"):
        Muon([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="optimizer must be 'adamw' or 'muon'"):
        make_optimizer(Tiny(tied=True), OptimConfig(name="sgd"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nothing to train"):
        make_optimizer(nn.Linear(2, 2).requires_grad_(False), OptimConfig())


def test_training_lowers_a_loss() -> None:
    for name in ("adamw", "muon"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 4)).to(BF16)
        accumulate_in_fp32(model)
        optimizer = make_optimizer(model, OptimConfig(name=name, lr=0.02))  # type: ignore[arg-type]
        x = torch.randn(32, 8)
        y = torch.tanh(x @ torch.randn(8, 4))

        def loss_of(model: nn.Module = model, x: Tensor = x, y: Tensor = y) -> Tensor:
            return (model(x.to(BF16)).float() - y).square().mean()

        first = loss_of().item()
        for _ in range(60):
            optimizer.zero_grad()
            loss_of().backward()
            optimizer.step()
        assert loss_of().item() < 0.5 * first, name
