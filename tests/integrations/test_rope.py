"""Rotary embeddings of other people's attention layers on our kernel: what is taken, values."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, inputs, tiny
from torch import Tensor, nn

from fastllm.integrations.transformers import rope
from fastllm.integrations.transformers.swap import swapped, unswap

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def attention(model: nn.Module) -> list[nn.Module]:
    """The attention layers of a model."""
    return [m for m in model.modules() if type(m).__name__.endswith("Attention")]


def install(model: nn.Module) -> None:
    """Our rotation in every attention layer of `model`."""
    layers = attention(model)
    assert layers
    for module in layers:
        offer = rope.offer("attention", module, model)
        assert offer is not None and offer.replaced and offer.install is not None, offer
        offer.install()
        assert swapped(module) == ("rope",)


def functions(family: str) -> list[Callable[..., Any]]:
    """The functions of the family's file that its attention layers may call."""
    file = importlib.import_module(type(tiny(family)).__module__)
    return [getattr(file, name) for name in rope._FUNCTIONS if hasattr(file, name)]


def tensors(dtype: torch.dtype, repeated: bool, columns: int = 16) -> list[Tensor]:
    """q, k as views of projections, cos and sin of three sequences."""
    q, k = (torch.randn(3, 5, heads, 16).transpose(1, 2).to(dtype) for heads in (4, 2))
    angle = torch.randn(3, 5, columns // 2)
    angle = torch.cat((angle, angle), -1) if repeated else angle
    return [q, k, angle.cos().to(dtype), angle.sin().to(dtype)]


def run(function: Callable[..., Any], values: list[Tensor]) -> list[Tensor]:
    """The results and the gradients of q and k."""
    leaves = [t.detach().requires_grad_() for t in values[:2]]
    results = function(*leaves, *values[2:])
    dys = [torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype) for y in results]
    return [*results, *torch.autograd.grad(results, leaves, dys)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_functions_of_a_family_are_known_and_equal_their_own(family: str) -> None:
    for theirs in functions(family):
        rotation = rope.rotation_of(theirs)
        assert rotation is not None
        ours = rope.rotate_with(rotation, theirs)
        for dtype in (F32, BF16, F16):
            values = tensors(dtype, rotation.repeated)
            exact = run(theirs, [t.double() for t in values])
            for mine, other, right in zip(
                run(ours, values), run(theirs, values), exact, strict=True
            ):
                assert mine.dtype == other.dtype and mine.shape == other.shape
                error, peer = ((t.double() - right).abs().max().item() for t in (mine, other))
                assert error <= max(2 * peer, torch.finfo(dtype).eps * right.abs().max().item())


def test_columns_behind_the_rotated_ones_pass_through() -> None:
    (theirs,) = functions("phi3")
    rotation = rope.rotation_of(theirs)
    assert rotation is not None
    values = tensors(F32, repeated=True, columns=8)
    for mine, other in zip(
        run(rope.rotate_with(rotation, theirs), values), run(theirs, values), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


def test_results_are_views_of_tokens_first_and_inputs_are_not_copied() -> None:
    (theirs,) = functions("llama")
    rotation = rope.rotation_of(theirs)
    assert rotation is not None
    for tokens in (1, 5):
        q, k = (torch.randn(3, tokens, heads, 16).transpose(1, 2) for heads in (4, 2))
        cos = torch.ones(1, tokens, 16)  # one table for all sequences
        for y, x in zip(
            rope.rotate_with(rotation, theirs)(q, k, cos, 0 * cos), (q, k), strict=True
        ):
            assert y.transpose(1, 2).is_contiguous() and torch.equal(y, x)


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize(("batch", "tokens"), [(0, 3), (2, 0), (0, 1)])
def test_nothing_to_rotate_is_nothing(family: str, batch: int, tokens: int) -> None:
    theirs = functions(family)[-1]
    rotation = rope.rotation_of(theirs)
    assert rotation is not None
    q, k = (torch.randn(batch, heads, tokens, 16) for heads in (4, 2))
    cos = torch.randn(batch, tokens, 16 if rotation.repeated else 8)
    for y, x in zip(rope.rotate_with(rotation, theirs)(q, k, cos, cos), (q, k), strict=True):
        assert y.shape == x.shape


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_our_rotation_equals_itself(family: str) -> None:
    model, batch = tiny(family, attn_implementation="eager"), inputs(padding="right")
    expected = model(**batch)
    expected.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    install(model)
    found = model(**batch)
    found.loss.backward()
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            scale = grads[name].abs().max().item()
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "deepseek_v3"])
def test_greedy_generation_is_the_same(family: str) -> None:
    model, batch = tiny(family), inputs()
    ids = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(**ids, **options)
    install(model)
    assert torch.equal(model.generate(**ids, **options), expected)
    with torch.inference_mode():
        assert torch.equal(model.generate(**ids, **options), expected)


def test_tables_are_made_once_per_forward_and_again_after_a_change() -> None:
    (theirs,) = functions("llama")
    rotation = rope.rotation_of(theirs)
    assert rotation is not None
    ours = rope.rotate_with(rotation, theirs)
    q, k, cos, sin = tensors(F32, repeated=True)
    ours(q, k, cos, sin)
    first = rope._rows(cos, sin, True, 3, 5)
    again = rope._rows(cos, sin, True, 3, 5)
    assert first is not None and again is not None and again[1] is first[1]
    cos.mul_(2.0)
    torch.testing.assert_close(ours(q, k, cos, sin), theirs(q, k, cos, sin))
    other = sin.neg()
    torch.testing.assert_close(ours(q, k, cos, other), theirs(q, k, cos, other))


def test_what_the_kernel_does_not_take_goes_to_the_function_itself() -> None:
    (theirs,) = functions("llama")
    rotation = rope.rotation_of(theirs)
    assert rotation is not None
    ours = rope.rotate_with(rotation, theirs)
    q, k, cos, sin = tensors(F32, repeated=True)
    double = [t.double() for t in (q, k, cos, sin)]
    tokens_first = [q.transpose(1, 2), k.transpose(1, 2), cos, sin]
    for values, named in (
        (double, {}),
        (tokens_first, {"unsqueeze_dim": 2}),
        ([q, k.double(), cos, sin], {}),
        ([q, k, cos.clone().requires_grad_(), sin], {}),
    ):
        for mine, other in zip(ours(*values, **named), theirs(*values, **named), strict=True):
            assert torch.equal(mine, other)
    mixed = [q.bfloat16(), k.bfloat16(), cos, sin]  # as under autocast
    for mine, other in zip(ours(*mixed), theirs(*mixed), strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, rtol=1e-2, atol=1e-2)


def test_a_rotation_of_other_pairs_is_not_known() -> None:
    from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb

    assert rope.rotation_of(apply_rotary_pos_emb) is None


class _OtherRotary(nn.Module):
    """A rotary embedding whose halves differ, in the file of Llama's."""

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angle = positions[..., None] * torch.arange(1.0, 17.0)
        return angle.cos(), angle.sin()


def test_layers_that_cannot_be_replaced_are_left_with_a_reason() -> None:
    model: Any = tiny("llama")
    layer = attention(model)[0]

    def reason(module: nn.Module, of: nn.Module) -> str:
        offer = rope.offer("attention", module, of)
        assert offer is not None and not offer.replaced
        return offer.reason

    assert "no rotary embedding" in reason(layer, layer)
    changed = copy.deepcopy(model)
    changed.model.rotary_emb = _OtherRotary()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_OtherRotary, "__module__", type(layer).__module__)
        assert "two halves" in reason(attention(changed)[0], changed)

    class Multimodal(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return apply_multimodal_rotary_pos_emb(x)

    assert "which has no kernel" in reason(Multimodal(), model)
    assert rope.offer("mlp", model.model.layers[0].mlp, model) is None


def apply_multimodal_rotary_pos_emb(x: Tensor) -> Tensor:
    """Stands for a function that we do not know."""
    return x


def test_all_layers_of_a_class_share_a_forward_and_other_models_keep_theirs() -> None:
    model, other = tiny("qwen3"), tiny("qwen3")
    install(model)
    first, second = attention(model)
    assert type(first) is type(second) and "rope" not in swapped(attention(other)[0])
    assert type(first).forward is not type(attention(other)[0]).forward
    unswap(first)
    assert type(first) is type(attention(other)[0])
