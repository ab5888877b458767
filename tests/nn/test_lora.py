"""Adapters: where they go, what they add, what they train."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fastllm.nn.linear import Linear, ParallelLinear
from fastllm.nn.lora import (
    LoraConfig,
    adapters_disabled,
    add_lora,
    lora_parameters,
    merge_lora,
    remove_lora,
)


class Block(nn.Module):
    """Two layers that run as one product where they are packed together, and one behind them."""

    def __init__(self, dtype: torch.dtype, bias: bool = False) -> None:
        super().__init__()
        self.dtype, self.device = dtype, torch.device("cpu")
        self.q_proj, self.k_proj = self._linear(64, 48, bias, 0), self._linear(64, 16, bias, 1)
        self.o_proj, self.lm_head = self._linear(48, 64, bias, 2), self._linear(64, 20, False, 3)
        self.qk = ParallelLinear((self.q_proj, self.k_proj), ("q_proj", "k_proj"))

    def _linear(self, columns: int, rows: int, bias: bool, seed: int) -> Linear:
        g = torch.Generator().manual_seed(seed)
        layer = Linear(columns, rows, bias, "bf16" if self.dtype == torch.bfloat16 else "fp32")
        weight = torch.randn(rows, columns, generator=g) * columns**-0.5
        layer.weight = nn.Parameter(weight.to(self.dtype), requires_grad=False)
        if bias:
            layer.bias = nn.Parameter(torch.randn(rows, generator=g), requires_grad=False)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qk(x)
        return self.lm_head(self.o_proj(q) * k.sum(-1, keepdim=True))


def _filled(model: nn.Module, config: LoraConfig, seed: int = 0) -> list[nn.Parameter]:
    """An adapter that changes something: B is random too."""
    parameters = add_lora(model, config, seed)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.1)
    return parameters


def _input(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(6, 64, generator=torch.Generator().manual_seed(9)).to(dtype)


QO = LoraConfig(r=4, alpha=8, target_modules=("q_proj", "o_proj"))


def test_a_new_adapter_changes_nothing_and_alone_is_trained() -> None:
    model, x = Block(torch.bfloat16), _input(torch.bfloat16)
    before = model(x)
    parameters = add_lora(model, QO, seed=3)
    assert torch.equal(model(x), before)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert list(trained.values()) == parameters
    assert list(trained) == [
        "q_proj.lora_A.weight", "q_proj.lora_B.weight",
        "o_proj.lora_A.weight", "o_proj.lora_B.weight",
    ]  # fmt: skip
    assert [tuple(p.shape) for p in parameters] == [(4, 64), (48, 4), (4, 48), (64, 4)]
    assert {p.dtype for p in parameters} == {torch.bfloat16}


def test_the_seed_alone_draws_the_factors() -> None:
    first, second = Block(torch.float32), Block(torch.float32)
    torch.manual_seed(1)
    one = add_lora(first, QO, seed=3)
    torch.manual_seed(2)
    two = add_lora(second, QO, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    remove_lora(second)
    assert not torch.equal(add_lora(second, QO, seed=4)[0], one[0])
    assert one[0].abs().max() <= 64**-0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [("q_proj",), ("k_proj", "o_proj"), "all-linear"])
def test_a_fused_product_has_the_bits_of_its_members(
    dtype: torch.dtype, targets: str | tuple[str, ...]
) -> None:
    model, x = Block(dtype, bias=True), _input(dtype)
    _filled(model, LoraConfig(r=4, alpha=6, target_modules=targets))
    apart = model(x)
    model.qk.pack_()
    model.o_proj.pack_()
    assert torch.equal(model(x), apart)
    with adapters_disabled(model):
        assert not torch.equal(model(x), apart)
    assert torch.equal(model(x), apart)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 4.0)])
def test_base_and_term_are_rounded_once(rslora: bool, scale: float) -> None:
    model, x = Block(torch.bfloat16, bias=True), _input(torch.bfloat16)
    config = LoraConfig(r=4, alpha=8, target_modules=("q_proj",), rslora=rslora)
    a, b = _filled(model, config)
    layer = model.q_proj
    t = (x.float() @ a.float().T).bfloat16()
    exact = x.double() @ layer.weight.double().T + layer.bias.double()
    exact += scale * (t.double() @ b.double().T)
    error = (layer(x).double() - exact).abs()
    assert bool((error <= 2.0**-8 * exact.abs() + 1e-6).all())


def test_gradients_are_those_of_float64_autograd() -> None:
    model, x = Block(torch.float32, bias=True), _input().requires_grad_()
    parameters = _filled(model, LoraConfig(r=4, alpha=6, target_modules="all-linear"))
    loss = (model(x) * torch.linspace(-1, 1, 20)).sum()
    got = torch.autograd.grad(loss, [x, *parameters])
    x64 = x.detach().double().requires_grad_()
    factors = [p.detach().double().requires_grad_() for p in parameters]

    def layer(module: Linear, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return x @ (module.weight.double() + 1.5 * b @ a).T + module.bias.double()

    q, k = layer(model.q_proj, x64, *factors[:2]), layer(model.k_proj, x64, *factors[2:4])
    o = layer(model.o_proj, q, *factors[4:]) * k.sum(-1, keepdim=True)
    y = o @ model.lm_head.weight.double().T
    exact = torch.autograd.grad((y * torch.linspace(-1, 1, 20).double()).sum(), [x64, *factors])
    for mine, right in zip(got, exact, strict=True):
        assert (mine - right).abs().max() <= 2e-6 * right.abs().max()


def test_gradients_of_bfloat16_factors_are_summed_in_float32() -> None:
    model = Block(torch.bfloat16)
    a, _ = _filled(model, LoraConfig(r=4, alpha=6, target_modules=("q_proj",)))
    for _ in range(3):
        model(_input(torch.bfloat16)).float().sum().backward()
    assert a.grad is not None and a.grad.dtype == torch.float32


def test_dropout_is_for_training_alone_and_repeats_with_its_seed() -> None:
    model, x = Block(torch.float32), _input()
    _filled(model, LoraConfig(r=4, dropout=0.5, target_modules=("q_proj", "o_proj")))
    model.eval()
    plain = model(x)
    model.train()
    with torch.no_grad():
        assert torch.equal(model(x), plain)
    torch.manual_seed(5)
    first, second = model(x), model(x)
    assert not torch.equal(first, plain) and not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(model(x), first)


def test_merging_adds_the_term_to_the_weight() -> None:
    model, x = Block(torch.float32), _input()
    _filled(model, QO)
    apart = model(x)
    merge_lora(model)
    assert not lora_parameters(model)
    assert (model(x) - apart).abs().max() < 1e-5 * apart.abs().max()


def test_merging_into_packed_weights_alone_is_refused() -> None:
    model = Block(torch.bfloat16)
    model.q_proj.pack_()
    model.q_proj.weight = None
    add_lora(model, QO)
    with pytest.raises(ValueError, match="q_proj holds a packed weight alone"):
        merge_lora(model)


def test_a_copied_model_has_an_adapter_of_its_own() -> None:
    model, x = Block(torch.float32), _input()
    _filled(model, QO)
    before, other = model(x), copy.deepcopy(model)
    with torch.no_grad():
        other.q_proj.lora_B.weight.zero_()
    assert torch.equal(model(x), before) and not torch.equal(other(x), before)


def test_an_unknown_target_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'q_prj' names no layer.*did you mean q_proj\?.*o_proj"):
        add_lora(Block(torch.float32), LoraConfig(target_modules=("q_prj",)))
    with pytest.raises(ValueError, match="'lm_head' names no layer"):
        add_lora(Block(torch.float32), LoraConfig(target_modules=("lm_head",)))


@pytest.mark.parametrize(
    ("fields", "name"),
    [({"r": 0}, "r "), ({"dropout": 1.0}, "dropout"), ({"target_modules": ()}, "target_modules"),
     ({"alpha": float("nan")}, "alpha")],
)  # fmt: skip
def test_a_config_that_cannot_be_is_refused(fields: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        LoraConfig(**fields)
