"""Experts of transformers' mixtures: our function gives what theirs give, or says why not."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from tiny_models import inputs, tiny, tiny_config
from torch import Tensor, nn
from transformers.integrations.moe import grouped_mm_experts_forward

from fastllm.integrations.transformers import experts, registry
from fastllm.integrations.transformers.experts import experts_forward, is_experts, refusal

SERVED = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")
HIDDEN = 64


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    registry.register()


def layer_of(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The first experts layer of a tiny model of the family."""
    model = tiny(family, dtype, experts_implementation="eager", **changes)
    return next(module for module in model.modules() if is_experts(module))


def batch(layer: Any, dtype: torch.dtype, tokens: int = 37) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(tokens, layer.num_experts, generator=generator)
    weights, ids = scores.topk(2)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    return x.to(dtype), ids, weights.to(dtype)


def values_and_gradients(
    layer: Any, implementation: str, x: Tensor, ids: Tensor, weights: Tensor
) -> dict[str, Tensor]:
    """The output of the layer and the gradients of everything that has one."""
    layer = copy.deepcopy(layer)
    layer.config = copy.copy(layer.config)
    layer.config._experts_implementation = implementation
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = layer(x, ids, weights)
    factors = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    y.backward(factors.to(y.dtype))
    found = {"y": y, "x": x.grad, "weights": weights.grad}
    found |= {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in found.items() if value is not None}


@pytest.mark.parametrize("family", SERVED)
def test_fp32_values_and_gradients_equal_the_eager_loop(family: str) -> None:
    layer = layer_of(family)
    given = batch(layer, torch.float32)
    ours = values_and_gradients(layer, "fastllm", *given)
    eager = values_and_gradients(layer, "eager", *given)
    assert ours.keys() == eager.keys() and "gate_up_proj" in ours
    for name, value in eager.items():
        assert ours[name].dtype == value.dtype
        torch.testing.assert_close(
            ours[name], value, rtol=1e-4, atol=1e-4 * float(value.abs().max())
        )


def test_transposed_weights_whose_gates_come_first() -> None:
    name = "transformers.models.openai_privacy_filter.modeling_openai_privacy_filter"
    module = pytest.importorskip(name)  # as old as the clamped gate without turns
    config = tiny_config("gpt_oss")
    config.swiglu_alpha, config.swiglu_limit = 1.702, 7.0
    layer = module.OpenAIPrivacyFilterExperts(config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    assert refusal(layer) is None and layer.is_transposed and layer.is_concatenated
    given = batch(layer, torch.float32)
    ours = values_and_gradients(layer, "fastllm", *given)
    for key, value in values_and_gradients(layer, "eager", *given).items():
        room = 1e-4 * float(value.abs().max())
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=room)


@pytest.mark.parametrize("family", SERVED)
def test_bf16_errors_are_at_most_twice_those_of_grouped_mm(family: str) -> None:
    layer = layer_of(family, torch.bfloat16)
    given = batch(layer, torch.bfloat16)
    exact = values_and_gradients(
        copy.deepcopy(layer).double(), "eager", given[0].double(), given[1], given[2].double()
    )
    ours = values_and_gradients(layer, "fastllm", *given)
    theirs = values_and_gradients(layer, "grouped_mm", *given)
    for name, value in exact.items():
        ulp = float(value.abs().max()) * 2**-8
        bound = max(2 * float((theirs[name] - value).abs().max()), ulp)
        assert float((ours[name] - value).abs().max()) <= bound, name
        assert ours[name].dtype == theirs[name].dtype


def test_ids_of_other_ranks_contribute_nothing() -> None:
    layer = layer_of("qwen3_moe")
    x, ids, weights = batch(layer, torch.float32)
    layer._is_expert_parallel = True
    mine = torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) < 0.6
    mine[0], mine[1] = False, True
    found = experts_forward(layer, x, torch.where(mine, ids, layer.num_experts), weights)
    expected = experts_forward(layer, x, ids, weights * mine)
    torch.testing.assert_close(found, expected)
    assert not found[0].any() and found[1].any()


def test_a_gradient_of_frozen_weights_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of("mixtral").requires_grad_(False)
    asked: list[list[bool]] = []
    module: Any = sys.modules["fastllm.ops.moe"]  # the package has its function by that name
    real = module.moe_backward

    def spy(*args: Any, **options: Any) -> Any:
        asked.append(args[11])
        return real(*args, **options)

    monkeypatch.setattr(module, "moe_backward", spy)
    x, ids, weights = batch(layer, torch.float32)
    experts_forward(layer, x.requires_grad_(), ids, weights).sum().backward()
    assert asked == [[True, False, False, False, False, False]] and x.grad is not None


def test_mixed_dtypes_compute_in_that_of_the_weights_as_grouped_mm_does() -> None:
    layer = layer_of("mixtral", torch.bfloat16)
    x, ids, weights = batch(layer, torch.float32)
    with torch.no_grad():
        found = experts_forward(layer, x, ids, weights)
        rounded = experts_forward(layer, x.bfloat16(), ids, weights)
    assert found.dtype == torch.float32 and torch.equal(found.bfloat16(), rounded)


def test_a_diverged_router_gives_nan_and_no_error() -> None:
    layer = layer_of("mixtral")
    x, ids, weights = batch(layer, torch.float32)
    weights[3] = torch.nan
    y = experts_forward(layer, x, ids, weights)
    assert y[3].isnan().all() and y[:3].isfinite().all() and y[4:].isfinite().all()


def test_a_whole_graph_compiles_forward_and_backward() -> None:
    layer = layer_of("qwen3_moe")
    x, ids, weights = batch(layer, torch.float32)
    expected = experts_forward(layer, x, ids, weights)
    layer.config._experts_implementation = "fastllm"
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x.requires_grad_()
    found = compiled(x, ids, weights)
    found.sum().backward()
    assert torch.equal(found, expected) and x.grad is not None and x.grad.any()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # by PEFT
def test_lora_on_stacked_weights_trains_through_our_function() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=[], init_lora_weights=False,
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )  # fmt: skip
    found = {}
    for name in ("eager", "fastllm"):
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny("mixtral", experts_implementation=name), config)
        model(**inputs()).loss.backward()
        found[name] = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert found["eager"]
    for name, value in found["eager"].items():
        assert value is not None and value.any(), name
        torch.testing.assert_close(found["fastllm"][name], value, rtol=1e-3, atol=1e-5)


class _Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu().square()


def _squared(layer: Any) -> None:
    layer.act_fn = _Squared()


def _half(layer: Any) -> None:
    layer.half()


def _of_parts(layer: Any) -> None:
    layer.gate_up_proj = nn.Parameter(layer.gate_up_proj.as_subclass(_Quantized))


class _Quantized(Tensor):
    """Stands for another library's tensor."""


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda layer: setattr(layer, "has_gate", False), "gate"),
        (lambda layer: setattr(layer, "has_post_expert_norm", True), "normalizes"),
        (_squared, "_Squared"),
        (_half, "float16"),
        (_of_parts, "_Quantized"),
    ],
)
def test_what_the_op_does_not_know_is_refused_with_a_reason(change: Any, word: str) -> None:
    layer = layer_of("mixtral")
    assert refusal(layer) is None
    change(layer)
    assert word in str(refusal(layer))
    answer = experts.offer("mlp.experts", layer, layer)
    assert answer is not None and not answer.replaced and word in answer.reason


@pytest.mark.parametrize("name", ["alpha", "limit"])
def test_a_clamped_gate_with_other_constants_is_refused(name: str) -> None:
    layer = layer_of("gpt_oss")
    assert refusal(layer) is None
    setattr(layer, name, 3.0)
    assert "_apply_gate" in str(refusal(layer))


def test_a_clamped_gate_of_the_same_names_that_computes_something_else_is_refused() -> None:
    layer = layer_of("gpt_oss")

    class Other(type(layer)):  # type: ignore[misc]
        def _apply_gate(self, gate_up: Tensor) -> Tensor:
            gate, up = gate_up[..., ::2], gate_up[..., 1::2]
            gate = gate.clamp(min=None, max=self.limit)
            up = up.clamp(min=-self.limit, max=self.limit)
            return up * gate * torch.sigmoid(gate * self.alpha)

    layer.__class__ = Other
    assert "_apply_gate" in str(refusal(layer))


def test_hooks_on_the_activation_leave_experts_to_transformers() -> None:
    layer, calls = layer_of("mixtral"), []
    layer.act_fn.register_forward_hook(lambda *_: calls.append(1))
    assert "hooks" in str(refusal(layer)) and not calls
    experts_forward(layer, *batch(layer, torch.float32))
    assert calls


def test_a_refused_layer_gets_transformers_own_function() -> None:
    layer = layer_of("mixtral")
    _squared(layer)
    given = batch(layer, torch.float32)
    with torch.no_grad():
        assert torch.equal(
            experts_forward(layer, *given), grouped_mm_experts_forward(layer, *given)
        )


def test_the_part_knows_experts_and_nothing_else() -> None:
    model = tiny("mixtral")
    offers = {name: experts.offer(name, m, model) for name, m in model.named_modules()}
    found = {name for name, offer in offers.items() if offer is not None and offer.replaced}
    assert found == {f"model.layers.{i}.mlp.experts" for i in range(2)}
    for name in sorted(found):
        install = offers[name].install  # type: ignore[union-attr]
        assert install is not None
        install()
    assert model.config._experts_implementation == "fastllm"
