"""RMSNorm layers of other people's models on our kernel: what is taken, values, gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, tiny
from torch import Tensor, nn

from fastllm.integrations.transformers import norm
from fastllm.integrations.transformers.swap import swapped

F32, BF16 = torch.float32, torch.bfloat16
PAIRS = [(F32, F32), (BF16, BF16), (F32, BF16), (BF16, F32)]


def norms(family: str) -> dict[str, nn.Module]:
    """One norm of every class and role ("q_norm", "input_layernorm") of a family."""
    found: dict[str, nn.Module] = {}
    for name, module in tiny(family).named_modules():
        if "Norm" in type(module).__name__:
            found.setdefault(name.rsplit(".", 1)[-1], module)
    return found


def replaced(module: nn.Module) -> nn.Module:
    """A copy of `module` with our forward."""
    new = copy.deepcopy(module)
    offer = norm.offer("norm", new, new)
    assert offer is not None and offer.replaced and offer.install is not None, offer
    offer.install()
    assert swapped(new) == ("norm",)
    return new


def run(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """The result and the gradients of x and of the weight."""
    x = x.detach().requires_grad_()
    y = module(x)
    return [y, *torch.autograd.grad(y, [x, module.get_parameter("weight")], dy.to(y.dtype))]


def assert_near(ours: list[Tensor], theirs: list[Tensor], exact: list[Tensor]) -> None:
    """Errors at most twice theirs or one unit in the last place of the largest value."""
    for mine, other, right in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        if not mine.numel():
            continue
        top = right.abs().max().item()
        if mine.dtype == other.dtype == F32 and theirs[0].dtype == F32:
            allowed = 4e-6 * top
        else:
            allowed = torch.finfo(BF16).eps * top
        error, peer = ((t.double() - right).abs().max().item() for t in (mine, other))
        assert error <= max(2 * peer, allowed), (error, peer, top)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_norm_of_a_family_is_replaced_and_equals_its_own(family: str) -> None:
    found = norms(family)
    assert found
    for role, module in found.items():
        width = module.get_parameter("weight").shape[0]
        x = 3 * torch.randn(2, 5, 4, width) if role in ("q_norm", "k_norm") else None
        x = torch.randn(2, 5, width) if x is None else x
        dy = torch.randn_like(x)
        for x_dtype, weight_dtype in PAIRS:
            theirs = copy.deepcopy(module).to(weight_dtype)
            exact = exact_norm(theirs, x.to(x_dtype), dy.to(x_dtype))
            assert_near(
                run(replaced(theirs), x.to(x_dtype), dy.to(x_dtype)),
                run(theirs, x.to(x_dtype), dy.to(x_dtype)),
                exact,
            )


def exact_norm(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """In float64 from the same, already rounded, input and weight."""
    offset = 1.0 if "Gemma" in type(module).__name__ else 0.0
    eps: Any = getattr(module, "variance_epsilon", None) or module.eps
    leaves = [x.double().requires_grad_(), module.get_parameter("weight").double()]
    leaves[1] = leaves[1].detach().requires_grad_()
    y = leaves[0] * torch.rsqrt(leaves[0].square().mean(-1, keepdim=True) + eps)
    y = y * (leaves[1] + offset)
    return [y, *torch.autograd.grad(y, leaves, dy.double())]


def test_views_empty_inputs_and_many_dimensions_are_taken() -> None:
    module = norms("llama")["input_layernorm"]
    ours = replaced(module)
    wide = torch.randn(3, 7, 130)
    for x in (
        wide[..., 5:69],  # rows of a wider tensor
        wide[:, ::2, :64],
        torch.randn(64, 6).T,  # columns apart
        torch.randn(2, 4, 3, 64).transpose(1, 2),
        torch.randn(2, 1, 2, 3, 64),
        torch.empty(0, 64),
        torch.empty(2, 0, 64),
        torch.randn(64),
    ):
        torch.testing.assert_close(ours(x), module(x), rtol=1e-5, atol=1e-5)


def test_other_dtypes_keep_their_own_forward() -> None:
    module = norms("qwen3")["q_norm"]
    ours = replaced(module)
    half = torch.randn(3, 16).half()
    assert torch.equal(ours(half), module(half))
    double = torch.randn(3, 16).double()
    assert torch.equal(ours(double), module(double))
    assert torch.equal(ours(hidden_states=half), module(hidden_states=half))


def test_under_autocast_dtypes_and_values_are_those_of_the_module() -> None:
    for family in ("llama", "gemma3"):
        module = norms(family)["input_layernorm"]
        ours = replaced(module)
        x = torch.randn(3, 64)
        with torch.autocast("cpu", dtype=BF16):
            for value in (x, x.bfloat16()):
                y, expected = ours(value), module(value)
                assert y.dtype == expected.dtype
                torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)


def test_a_frozen_weight_gets_no_gradient() -> None:
    ours = replaced(norms("gemma2")["input_layernorm"]).requires_grad_(False)
    x = torch.randn(2, 64, requires_grad=True)
    ours(x).sum().backward()
    assert x.grad is not None and ours.get_parameter("weight").grad is None


class _Changed(nn.Module):
    """Looks like LlamaRMSNorm in all but what it computes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8)), 1e-6
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "mean":
            x = x - x.mean(-1, keepdim=True)
        eps = 1e-5 if self.kind == "epsilon" else self.variance_epsilon
        if self.kind == "outside":
            return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + eps)
        y = self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return y + 1e-3 if self.kind == "shift" else y


@pytest.mark.parametrize("kind", ["mean", "epsilon", "outside", "shift"])
def test_what_computes_something_else_is_left_with_a_reason(kind: str) -> None:
    offer = norm.offer("norm", _Changed(kind), nn.Module())
    assert offer is not None and not offer.replaced and "its forward gives neither" in offer.reason


def test_a_class_of_any_name_that_computes_the_norm_is_taken() -> None:
    offer = norm.offer("norm", _Changed("none"), nn.Module())
    assert offer is not None and offer.replaced
    torch_own = norm.offer("norm", nn.RMSNorm(8, eps=1e-6), nn.Module())
    assert torch_own is not None and torch_own.replaced


def test_other_layers_are_not_norms() -> None:
    for module in (nn.LayerNorm(8), nn.BatchNorm1d(8), nn.GroupNorm(2, 8), nn.Linear(8, 8)):
        assert norm.offer("norm", module, nn.Module()) is None


def test_norms_of_more_than_a_weight_are_left_with_a_reason() -> None:
    class BiasedRMSNorm(_Changed):
        def __init__(self) -> None:
            super().__init__("none")
            self.bias = nn.Parameter(torch.zeros(8))

    class GatedRMSNorm(_Changed):
        def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
            return super().forward(x)

    bare = nn.RMSNorm(8, eps=1e-6, elementwise_affine=False)
    for module, reason in (
        (BiasedRMSNorm(), "other parameters"),
        (GatedRMSNorm("none"), "more than one tensor"),
        (bare, "no weight"),
    ):
        offer = norm.offer("norm", module, nn.Module())
        assert offer is not None and not offer.replaced and reason in offer.reason


def test_trying_a_module_leaves_it_and_the_random_numbers_alone() -> None:
    module = norms("llama")["input_layernorm"]
    before, state = dict(module.__dict__), torch.random.get_rng_state()
    weight = module.get_parameter("weight")
    norm.offer("norm", module, module)
    assert module.__dict__ == before and module.get_parameter("weight") is weight
    assert torch.equal(torch.random.get_rng_state(), state)
