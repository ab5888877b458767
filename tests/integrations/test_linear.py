"""Plain linear layers under `patch`: a few rows on our kernel, everything else on torch's."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from tiny_models import inputs, tiny
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import fastllm
from fastllm.integrations.transformers import linear
from fastllm.integrations.transformers.swap import swap, swapped
from fastllm.nn.quantize_model import quantize_model

BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Layers of any size are served; the shapes of the inputs that our kernel was given."""
    torch.manual_seed(0)
    seen: list[tuple[int, ...]] = []
    native = linear.native_linear

    def counted(x: Tensor, *rest: Any) -> Tensor:
        seen.append(tuple(x.shape))
        return native(x, *rest)

    monkeypatch.setattr(linear, "native_linear", counted)
    monkeypatch.setattr(linear, "_FROM", 0)
    monkeypatch.setattr(linear, "reads_in_place", lambda weight: weight.is_cpu)
    return seen


def layer(dtype: torch.dtype, n: int = 48, k: int = 96, bias: bool = True) -> nn.Linear:
    return nn.Linear(k, n, bias, dtype=dtype)


def replaced(module: nn.Linear) -> nn.Linear:
    offer = linear.offer("proj", module, module)
    assert offer is not None and offer.replaced and offer.install is not None
    offer.install()
    assert swapped(module) == ("linear",) and type(module).__name__ == "Linear"
    return module


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("shape", [(96,), (1, 96), (2, 3, 96), (12, 96), (0, 96), (2, 0, 96)])
def test_few_rows_are_ours_and_as_exact_as_torchs(
    shape: tuple[int, ...], dtype: torch.dtype, bias: bool, calls: list[Any]
) -> None:
    module = layer(dtype, bias=bias)
    draws = [torch.randn(shape).to(dtype) for _ in range(20)]
    theirs = [module(x) for x in draws]
    ours = [replaced(module)(x) for x in draws]
    assert calls == [shape] * 20
    assert ours[0].shape == theirs[0].shape and ours[0].dtype == dtype
    if ours[0].numel():
        weight, add = module.weight.double(), module.bias.double() if bias else None
        exact = torch.stack([nn.functional.linear(x.double(), weight, add) for x in draws])
        error, peer = ((torch.stack(y) - exact).abs().max().item() for y in (ours, theirs))
        assert error <= max(2 * peer, torch.finfo(dtype).eps * exact.abs().max().item())


@torch.no_grad()
def test_what_the_kernel_does_not_take_runs_the_layers_own_forward(calls: list[Any]) -> None:
    module = replaced(layer(BF16))
    with torch.enable_grad():
        assert module(torch.randn(1, 96, dtype=BF16)).requires_grad
    assert module(torch.randn(13, 96, dtype=BF16)).shape == (13, 48)
    with torch.autocast("cpu", dtype=BF16):
        assert module(torch.randn(1, 96)).dtype == BF16
    module(torch.randn(96, 2, dtype=BF16).T)  # columns apart
    module.to(torch.float16)(torch.randn(1, 96, dtype=torch.float16))
    module.double()(torch.randn(1, 96, dtype=torch.float64))
    for wrong in (torch.randn(1, 95), torch.randn(1, 96), torch.tensor(1.0)):
        with pytest.raises(RuntimeError):
            module.to(BF16)(wrong)
    mixed = replaced(layer(BF16))
    assert mixed.bias is not None
    mixed.bias.data = mixed.bias.data.float()
    with pytest.raises(RuntimeError):  # torch's own refusal
        mixed(torch.randn(1, 96, dtype=BF16))
    assert not calls
    replaced(layer(BF16))(torch.randn(1, 96, dtype=BF16))
    assert calls == [(1, 96)]


def test_compiled_vmapped_and_traced_calls_do_not_see_the_kernel(calls: list[Any]) -> None:
    module, x = replaced(layer(F32)), torch.randn(2, 96)
    with torch.no_grad():
        want = nn.functional.linear(x, module.weight, module.bias)
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), want)
        torch.testing.assert_close(torch.vmap(module)(x), want)
        meta = module.to("meta")(x.to("meta"))
    assert meta.shape == (2, 48) and not calls


def test_only_plain_layers_that_the_kernel_gains_by_are_offered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Scaled(nn.Linear):
        pass

    assert linear.offer("", Scaled(96, 48), nn.Module()) is None
    assert linear.offer("", nn.Bilinear(32, 32, 32), nn.Module()) is None
    assert linear.offer("", nn.Linear(96, 48, device="meta"), nn.Module()) is None
    monkeypatch.setattr(linear, "_FROM", 96 * 48 + 1)
    assert linear.offer("", layer(BF16), nn.Module()) is None
    monkeypatch.setattr(linear, "_FROM", 96 * 48)
    assert linear.offer("", layer(BF16), nn.Module()) is not None
    monkeypatch.setattr(linear, "reads_in_place", lambda weight: False)
    assert linear.offer("", layer(BF16), nn.Module()) is None


@torch.no_grad()
def test_biases_and_layouts_that_only_torch_takes_are_torchs(calls: list[Any]) -> None:
    x = torch.randn(3, 96)
    for bias in (torch.randn(48, 3)[:, 1], torch.randn(1).expand(48), torch.randn(1)):
        module = replaced(layer(F32))
        module.bias = nn.Parameter(bias)
        assert torch.equal(module(x), nn.functional.linear(x, module.weight, bias))
    module.bias = nn.Parameter(torch.randn(47))
    with pytest.raises(RuntimeError):
        module(x)
    module = replaced(layer(F32, bias=False))
    wanted = module(x)
    calls.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: sparse CSR is in beta
        module.weight = nn.Parameter(module.weight.to_sparse_csr())
        torch.testing.assert_close(module(x), wanted)
        assert linear.offer("", module, module) is None
    assert not calls


@torch.no_grad()
def test_a_weight_without_memory_is_refused_and_read_by_nobody() -> None:
    module = replaced(layer(F32))
    module.weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="no memory"):
        module(torch.randn(1, 96))


@torch.no_grad()
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_pruned_and_parametrized_layers_compute_what_they_are(
    name: str, first: bool, calls: list[Any]
) -> None:
    x = torch.randn(1, 96)
    for change in (
        lambda m: prune.l1_unstructured(m, name, amount=0.5),
        lambda m: parametrize.register_parametrization(m, name, nn.Tanh()),
    ):
        module = layer(F32)
        if not first:
            replaced(module)
        change(module)
        wanted = nn.functional.linear(x, module.weight, module.bias)
        fastllm.patch(nn.ModuleList([module]), ops=("linear",))
        assert torch.equal(module(x), wanted) and not calls


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # by PEFT
def test_adapters_of_peft_go_on_top_and_merge(calls: list[Any]) -> None:
    plain = tiny("llama").eval()
    model = copy.deepcopy(plain)
    fastllm.patch(model)
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "down_proj"])
    tuned = peft.get_peft_model(model, config)
    other = peft.get_peft_model(plain, config)
    other.load_state_dict(tuned.state_dict())
    ids = torch.arange(3, 8)[None]
    with torch.no_grad():
        torch.testing.assert_close(tuned(ids).logits, other(ids).logits, atol=1e-4, rtol=1e-4)
        assert (1, 5, 64) in calls
        torch.testing.assert_close(
            tuned.merge_and_unload()(ids).logits, other(ids).logits, atol=1e-4, rtol=1e-4
        )


@torch.no_grad()
def test_a_model_decodes_by_it_and_can_still_be_quantized(calls: list[Any]) -> None:
    model = tiny("llama").eval()
    batch = inputs((5,))
    wanted = model.generate(**batch, max_new_tokens=6, do_sample=False)
    report = fastllm.patch(model, strict=True)
    assert report.replaced("linear") and report.counts()["linear"][1] == 2 * 7 + 1
    assert torch.equal(model.generate(**batch, max_new_tokens=6, do_sample=False), wanted)
    assert (1, 1, 64) in calls
    assert len(quantize_model(model, "int8").layers) == 2 * 7  # the head is kept
    fastllm.unpatch(model)
    assert not any(swapped(module) for module in model.modules())


def test_a_head_that_is_served_keeps_the_fused_loss() -> None:
    model = tiny("llama").train()
    report = fastllm.patch(model)
    assert report.replaced("linear") and report.replaced("loss")
    batch = inputs((9,))
    assert model(**batch).logits is None


def test_swap_by_hand_is_undone_by_unpatch() -> None:
    module = layer(F32)
    swap(module, linear.NAME, linear.forward)
    fastllm.unpatch(module)
    assert type(module) is nn.Linear
