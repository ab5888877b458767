"""`verify` sees what is wrong, where, and leaves a model exactly as it was."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny_models import inputs, tiny
from torch import Tensor

from fastllm.integrations.transformers import attention, patch, registry, unpatch, verify
from fastllm.integrations.transformers.comparing import _first_difference, _unit
from fastllm.integrations.transformers.report import Report
from fastllm.integrations.transformers.swap import swapped
from fastllm.integrations.transformers.verification import Check, Speed, Verification

QUICK: dict[str, Any] = {"tokens": 0, "speed": False, "shape": (2, 12)}


@pytest.fixture
def spoil(
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[Callable[[Tensor], Tensor]], None]]:
    """Puts a function behind our attention: spoil(change)."""
    right = attention.attention_forward

    def install(change: Callable[[Tensor], Tensor]) -> None:
        def wrong(*args: Any, **kwargs: Any) -> Any:
            out, weights = right(*args, **kwargs)
            return change(out), weights

        monkeypatch.setattr(attention, "attention_forward", wrong)

    yield install
    monkeypatch.undo()
    registry.register()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_right_model_is_equal_on_random_and_real_inputs(dtype: torch.dtype) -> None:
    found = verify(tiny("qwen3", dtype), inputs(padding="right"), tokens=8, shape=(2, 16))
    assert found.ok and found.exit_code == 0, str(found)
    seen = {(check.what, check.batch) for check in found.checks}
    for what in ("logits", "median logits", "loss", "gradients", "tokens", "median scores"):
        assert {(what, "random"), (what, "real")} <= seen
    assert all((check.own is not None) == (dtype != torch.float32)
               for check in found.checks if check.what == "logits")  # fmt: skip
    assert [speed.what for speed in found.speeds] == [
        "forward, 2 x 16", "forward+backward, 2 x 16", "8 tokens, 1 row",
    ]  # fmt: skip


def test_wrong_values_are_found_in_logits_loss_and_gradients(spoil: Any) -> None:
    spoil(lambda out: 1.01 * out)
    found = verify(tiny("llama"), ops=["attention"], **QUICK)
    assert found.exit_code == 1
    assert {check.what for check in found.checks if not check.ok} == {
        "logits", "median logits", "loss", "gradients",
    }  # fmt: skip
    assert "NOT equal: logits (random)" in str(found)


def test_a_wrong_gradient_is_found_and_its_parameter_is_named(spoil: Any) -> None:
    spoil(lambda out: out + (out - out.detach()))  # the same values, twice the gradient
    found = verify(tiny("llama"), ops=["attention"], **QUICK)
    (wrong,) = [check for check in found.checks if not check.ok]
    assert wrong.what == "gradients" and "self_attn" in wrong.worst


def test_wrong_decoding_is_found_where_the_whole_forward_is_right(spoil: Any) -> None:
    spoil(lambda out: out if out.shape[1] > 1 else 0.5 * out)
    found = verify(tiny("llama"), ops=["attention"], tokens=8, speed=False, shape=(2, 12))
    assert {check.what for check in found.checks if not check.ok} >= {"median scores"}
    assert all(check.ok for check in found.checks if "logits" in check.what)


def test_what_is_not_a_number_is_not_equal(spoil: Any) -> None:
    spoil(lambda out: out * math.nan)
    assert not verify(tiny("llama"), ops=["attention"], **QUICK).ok


def state(model: Any) -> list[Any]:
    """Everything that must be the same afterwards."""
    config = (model.config._attn_implementation, model.config._experts_implementation)
    modules = [(type(m), m.training, swapped(m), sorted(m.__dict__)) for m in model.modules()]
    return [modules, config, registry.defaults_taken(), torch.get_rng_state().tolist()]


@pytest.mark.parametrize("how", ["plain", "patched", "some ops", "by name", "default"])
def test_the_model_is_left_as_it_was(how: str) -> None:
    model = tiny("mixtral").train()
    model.model.layers[0].eval()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    model.model.embed_tokens.weight.requires_grad_(False)
    if how in ("patched", "some ops"):
        patch(model, ops=("attention", "experts") if how == "patched" else ("experts",))
    elif how == "by name":
        model.set_attn_implementation("fastllm")
    elif how == "default":
        patch(default=True)
    try:
        before = state(model)
        values = [(p, p.clone(), p.grad) for p in model.parameters()]
        assert verify(model, tokens=2, shape=(2, 8)).ok
        assert state(model) == before
        for parameter, value, grad in values:
            assert torch.equal(parameter, value) and parameter.grad is grad
        assert torch.equal(model.lm_head.weight.grad, torch.ones_like(model.lm_head.weight))
    finally:
        unpatch()


def test_an_error_on_the_way_leaves_the_model_as_it_was(spoil: Any) -> None:
    def fail(out: Tensor) -> Tensor:
        raise RuntimeError("no kernel")

    spoil(fail)
    model = tiny("llama").train()
    before = state(model)
    with pytest.raises(RuntimeError, match="no kernel"):
        verify(model, **QUICK)
    assert state(model) == before


def test_a_patched_model_is_compared_as_it_is_patched() -> None:
    model = tiny("mixtral")
    patch(model, ops=["experts"])
    assert set(verify(model, **QUICK).report.counts()) == {"experts"}


def test_a_model_patched_in_part_is_refused_and_left_alone() -> None:
    model = tiny("llama")
    patch(model.model.layers[0], ops=["norm"])
    before = state(model)
    with pytest.raises(ValueError, match="patched in part"):
        verify(model, **QUICK)
    assert state(model) == before


def test_frozen_models_have_no_gradients_to_compare() -> None:
    found = verify(tiny("llama").requires_grad_(False), **(QUICK | {"speed": True}))
    assert found.ok
    assert {check.what for check in found.checks} == {"logits", "median logits", "loss"}
    assert len(found.speeds) == 1


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers by an old name
@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_adapters_of_peft_are_compared_by_their_gradients(task: str | None) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False, task_type=task
    )
    found = verify(peft.get_peft_model(tiny("llama"), config), **QUICK)
    assert found.ok and found.report.replaced("attention")
    (gradients,) = [check for check in found.checks if check.what == "gradients"]
    assert "lora_" in gradients.worst


def test_bad_arguments_are_named() -> None:
    model = tiny("llama")
    for match, arguments in {
        "texts: they need a tokenizer": {"texts": ["a"]},
        "input_ids": {"inputs": {}},
        "shape": {"shape": (0, 8)},
        "unknown": {"ops": ["atention"]},
    }.items():
        with pytest.raises(ValueError, match=match):
            verify(model, **(QUICK | arguments))
    for wrong in ("llama", torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="model"):
            verify(wrong)
    with torch.device("meta"), pytest.raises(ValueError, match="meta"):
        verify(type(model)(model.config), **QUICK)


def test_tokens_may_differ_only_where_scores_are_that_close() -> None:
    scores = torch.tensor([[[4.0, 3.9, 0.0], [0.0, 0.0, 4.0]]])
    ids, ours = torch.tensor([[0, 2]]), torch.tensor([[1, 0]])
    check = _first_difference("real", 0.01, ids, ours, scores, [0])
    assert check.error == pytest.approx(0.025) and not check.ok
    assert "row 0 differs from token 0 on" in check.worst
    assert _first_difference("real", 0.0, ids, ids, scores, [2]).ok


def test_one_unit_in_the_last_place_is_that_of_the_largest_value() -> None:
    assert _unit(torch.bfloat16, 1.0) == 2.0**-7
    assert _unit(torch.bfloat16, 1.999) == pytest.approx(2.0**-7 / 1.999)


def test_a_result_is_a_table_and_json() -> None:
    check = Check(what="loss", batch="random", error=0.5, bound=0.1, own=0.05, worst="")
    speed = Speed(what="forward", original=3.0, patched=1.5)
    found = Verification(
        model="M", dtype="bfloat16", reference="r", report=Report(), checks=(check,),
        speeds=(speed,),
    )  # fmt: skip
    text = str(found)
    assert "WRONG" in text and "2.00x" in text and "NOT equal: loss (random)" in text
    again = json.loads(json.dumps(found.as_dict()))
    assert again["checks"][0]["ok"] is False and again["speeds"][0]["ratio"] == 2.0
