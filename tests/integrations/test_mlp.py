"""Gated feed-forwards of other people's models with our activation: what is taken, values."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, inputs, tiny
from torch import Tensor, nn
from transformers.activations import ACT2FN

from fastllm.integrations.transformers import mlp
from fastllm.integrations.transformers.patching import patch
from fastllm.integrations.transformers.swap import swapped, unswap

F32, BF16 = torch.float32, torch.bfloat16
WITH_MLP = [f for f in FAMILIES if f not in ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")]


@pytest.fixture(autouse=True)
def everything_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small inputs too, which otherwise take the module's own operations."""
    monkeypatch.setattr(mlp, "_FROM", dict.fromkeys(mlp._FROM, (0, 0)))


def feed_forwards(family: str) -> dict[str, nn.Module]:
    """The feed-forwards of a model, those that are shared experts too."""
    modules = tiny(family).named_modules()
    return {name: m for name, m in modules if isinstance(m._modules.get("down_proj"), nn.Linear)}


def replaced(module: nn.Module) -> nn.Module:
    """A copy of `module` with our forward."""
    new = copy.deepcopy(module)
    offer = mlp.offer("mlp", new, new)
    assert offer is not None and offer.replaced and offer.install is not None, offer
    offer.install()
    assert swapped(new) == ("mlp",)
    return new


def run(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """The result and all gradients."""
    x = x.detach().requires_grad_()
    y = module(x)
    return [y, *torch.autograd.grad(y, [x, *module.parameters()], dy)]


@pytest.mark.parametrize("family", WITH_MLP)
def test_feed_forwards_of_a_family_equal_their_own(family: str) -> None:
    found = feed_forwards(family)
    assert found and (family != "deepseek_v3" or any("shared_experts" in name for name in found))
    for module in list(found.values())[:2]:
        width = module.get_submodule("down_proj").get_parameter("weight").shape[0]
        x, dy = torch.randn(2, 2, 9, width)
        for mine, theirs in zip(run(replaced(module), x, dy), run(module, x, dy), strict=True):
            top = theirs.abs().max().item()
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * top)
        theirs_half = copy.deepcopy(module).bfloat16()
        x, dy = x.bfloat16(), dy.bfloat16()
        exact = run(copy.deepcopy(theirs_half).double(), x.double(), dy.double())
        ours, peers = run(replaced(theirs_half), x, dy), run(theirs_half, x, dy)
        for mine, theirs, right in zip(ours, peers, exact, strict=True):
            error, peer = ((t.double() - right).abs().max().item() for t in (mine, theirs))
            assert mine.dtype == BF16
            assert error <= max(2 * peer, torch.finfo(BF16).eps * right.abs().max().item())


class _Gated(nn.Module):
    """A feed-forward whose forward has one step more, or none."""

    def __init__(self, activation: str = "silu", more: str = "") -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(16, 24), nn.Linear(16, 24)
        self.down_proj, self.act_fn = nn.Linear(24, 16), ACT2FN[activation]
        self.dropout, self.more = nn.Dropout(0.0), more

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        if self.more == "clamp":
            gate = gate.clamp(max=0.5)
        y = self.act_fn(gate) * self.up_proj(x)
        if self.more == "dropout":
            y = self.dropout(y)
        return self.down_proj(y) * (2 if self.more == "scale" else 1)


@pytest.mark.parametrize("more", ["clamp", "dropout", "scale"])
def test_a_forward_of_more_steps_is_left_with_a_reason(more: str) -> None:
    offer = mlp.offer("mlp", _Gated(more=more), nn.Module())
    assert offer is not None and not offer.replaced and "its forward is more than" in offer.reason


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_new", "gelu_tanh"),
        ("quick_gelu", None),
        ("relu", None),
        ("relu2", None),
        ("mish", None),
    ],
)
def test_activations_are_known_by_their_values(name: str, known: str | None) -> None:
    assert mlp.activation_of(ACT2FN[name]) == known
    offer = mlp.offer("mlp", _Gated(name), nn.Module())
    assert offer is not None and offer.replaced == (known is not None)
    assert offer.replaced or "activation" in offer.reason


def test_the_projections_are_called_as_modules_and_once() -> None:
    module, calls = _Gated(), []
    ours = replaced(module)
    for name, child in ours.named_children():
        child.register_forward_hook(lambda *_, name=name: calls.append(name))
    for dtype in (F32, torch.float64):  # the kernel's and the fallback's
        calls.clear()
        ours.to(dtype)(torch.randn(3, 16, dtype=dtype))
        assert calls[0:2] == ["gate_proj", "up_proj"] and calls.count("down_proj") == 1


def test_hooks_on_the_activation_run_once_and_leave_it_to_the_module() -> None:
    module, calls = _Gated(), []
    ours = replaced(module)
    for one in (module, ours):
        one.get_submodule("act_fn").register_forward_hook(lambda *_: calls.append(1))
    offer = mlp.offer("mlp", module, module)
    assert offer is not None and not offer.replaced and "hooks" in offer.reason and not calls
    x = torch.randn(3, 16)
    assert torch.equal(ours(x), module(x)) and len(calls) == 2


def test_few_rows_take_the_modules_own_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    kernel = mlp.swiglu
    monkeypatch.setattr(mlp, "swiglu", lambda *args: (calls.append(1), kernel(*args))[1])
    monkeypatch.setattr(mlp, "_FROM", {"silu": (5 * 24, 7 * 24)})
    module = _Gated()
    ours = replaced(module)
    for rows in (4, 5, 6, 7):
        calls.clear()
        x = torch.randn(rows, 16)
        with torch.no_grad():
            assert rows >= 5 or torch.equal(ours(x), module(x))
            ours(x)
        assert bool(calls) == (rows >= 5)
        calls.clear()
        ours(x)
        assert bool(calls) == (rows >= 7)


def test_mixed_dtypes_and_many_dimensions_are_the_modules_own() -> None:
    module = _Gated()
    ours = replaced(module)
    x = torch.randn(2, 2, 3, 16)
    assert torch.equal(ours(x), module(x))
    assert torch.equal(ours(x=x), module(x=x))
    assert ours(torch.empty(0, 16)).shape == (0, 16)
    with torch.autocast("cpu", dtype=BF16):
        y = ours(x[0])
        assert y.dtype == BF16
        torch.testing.assert_close(y, module(x[0]), rtol=2e-2, atol=2e-2)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_lora_inside_a_feed_forward_is_trained() -> None:
    peft = pytest.importorskip("peft")
    model = tiny("llama")
    config = peft.LoraConfig(target_modules=["gate_proj", "down_proj"], init_lora_weights=False)
    wrapped: Any = peft.get_peft_model(model, config)
    module = wrapped.base_model.model.model.layers[0].mlp
    x, dy = torch.randn(2, 5, 64)
    expected = module(x)
    offer = mlp.offer("mlp", module, wrapped)
    assert offer is not None and offer.install is not None
    offer.install()
    y = module(x)
    torch.testing.assert_close(y, expected)
    y.backward(dy)
    assert module.gate_proj.lora_A.default.weight.grad.abs().sum() > 0
    unswap(module)
    assert torch.equal(module(x), expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it
@pytest.mark.parametrize("family", ["llama", pytest.param("deepseek_v3", marks=pytest.mark.full)])
def test_norm_rotation_and_feed_forward_compile_into_one_graph(family: str) -> None:
    model, batch = tiny(family), inputs(padding="right")
    expected = model(**batch)
    gradients = torch.autograd.grad(expected.loss, list(model.model.layers.parameters()))
    patch(model, ops=("norm", "rope", "mlp"))
    for part in ("self_attn", "mlp", "input_layernorm"):
        layer = model.model.layers[0].get_submodule(part)
        assert swapped(layer)
        layer.compile(backend="aot_eager", fullgraph=True)
    found = model(**batch)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    again = torch.autograd.grad(found.loss, list(model.model.layers.parameters()))
    for mine, theirs in zip(again, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_layers_of_another_kind_are_not_feed_forwards() -> None:
    for module in (nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), tiny("mixtral").model):
        assert mlp.offer("mlp", module, module) is None
