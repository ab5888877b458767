"""The loss of causal models without logits: transformers' loss and gradients, or its forward."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, inputs, tiny
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

from fastllm.integrations.transformers import loss as part
from fastllm.integrations.transformers.swap import swap, swapped


def fused(model: Any) -> Any:
    """A copy of the model with the part in place, in training mode."""
    model = copy.deepcopy(model).train()
    offer = part.offer("", model, model)
    assert offer is not None and offer.replaced, offer
    assert offer.install is not None
    offer.install()
    assert swapped(model) == ("loss",)
    return model


def step(model: Any, given: dict[str, Any]) -> dict[str, Tensor]:
    """The loss and the gradients of all parameters that have one."""
    model.zero_grad()
    output = model(**given)
    output.loss.backward()
    found = {"loss": output.loss.detach()}
    found |= {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found


def assert_same_step(model: Any, given: dict[str, Any], relative: float = 1e-4) -> None:
    ours = fused(model)
    found, expected = step(ours, given), step(model.train(), given)
    assert ours(**given).logits is None and model(**given).logits is not None
    assert found.keys() == expected.keys() and len(found) > 5
    for name, value in expected.items():
        room = relative * float(value.abs().max())
        torch.testing.assert_close(found[name], value, rtol=relative, atol=room)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_those_of_the_logits(family: str) -> None:
    assert_same_step(tiny(family), inputs())


@pytest.mark.parametrize(
    "more",
    [
        {"num_items_in_batch": 77},
        {"num_items_in_batch": torch.tensor(77)},
        {"ignore_index": 5, "labels": torch.arange(48).view(2, 24) % 7},
        {"shift_labels": torch.arange(48).view(2, 24)},
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_a_trainer_passes_to_the_loss_holds(more: dict[str, Any]) -> None:
    assert_same_step(tiny("llama"), inputs(padding="right") | more)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_the_balance_of_routers_is_in_the_loss(family: str) -> None:
    model = tiny(family, output_router_logits=True, router_aux_loss_coef=0.5)
    assert_same_step(model, inputs())
    output = fused(model)(**inputs())
    assert output.aux_loss > 0 and len(output.router_logits) == 2


def test_a_head_with_a_bias() -> None:
    model = tiny("qwen2")
    model.lm_head = nn.Linear(64, model.config.vocab_size)
    assert_same_step(model, inputs())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_bf16_errors_are_at_most_twice_those_of_the_logits(family: str) -> None:
    model, given = tiny(family), inputs((24, 24))
    exact = step(copy.deepcopy(model).double().train(), given)
    model = model.bfloat16()
    ours, theirs = step(fused(model), given), step(model.train(), given)
    for name, value in exact.items():
        ulp = float(value.abs().max()) * 2**-8
        bound = max(2 * float((theirs[name] - value).abs().max()), ulp)
        assert float((ours[name] - value).abs().max()) <= bound, name
        assert ours[name].dtype == theirs[name].dtype


def test_autocast_runs_the_head_in_its_dtype() -> None:
    model = tiny("llama")
    exact = step(copy.deepcopy(model).train(), inputs())
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = step(fused(model), inputs()), step(model.train(), inputs())
    for name in ("loss", "lm_head.weight"):
        error = float((theirs[name] - exact[name]).abs().max())
        assert float((ours[name] - exact[name]).abs().max()) <= 2 * error
        assert ours[name].dtype == theirs[name].dtype


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_gradient_checkpointing_changes_nothing() -> None:
    model = tiny("qwen3")
    expected = step(model.train(), inputs())
    ours = fused(model)
    ours.gradient_checkpointing_enable()
    found = step(ours, inputs() | {"use_cache": False})
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


class _Largest(TorchDispatchMode):
    """The most elements of any tensor that an op gives."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        self.most = max([self.most, *sizes])
        return output


def test_no_tensor_of_tokens_times_vocabulary_appears() -> None:
    vocab, lengths = 1024, (96, 96)
    model = tiny("llama", vocab_size=vocab)
    largest = {}
    for name, candidate in (("ours", fused(model)), ("theirs", model.train())):
        with _Largest() as seen:
            candidate(**inputs(lengths)).loss.backward()
        largest[name] = seen.most
    assert largest["theirs"] >= sum(lengths) * vocab
    assert largest["ours"] <= 64 * vocab < sum(lengths) * vocab  # the head's own gradient


@pytest.mark.parametrize(
    "more",
    [
        {"labels": None},
        {"logits_to_keep": 3, "labels": None},
        {"skip_logits": False},
        {"return_dict": False},
        {"label_smoothing": 0.1},
    ],
    ids=str,
)
def test_calls_that_need_logits_get_them(more: dict[str, Any]) -> None:
    model, given = tiny("llama").train(), inputs() | more
    found = fused(model)(**given)
    given.pop("skip_logits", None)
    expected = model(**given)
    if isinstance(expected, tuple):
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    else:
        assert torch.equal(found.logits, expected.logits)


def test_evaluation_gives_logits_unless_they_are_declined() -> None:
    model = tiny("llama")
    ours = fused(model).eval()
    with torch.no_grad():
        expected, found = model(**inputs()), ours(**inputs())
        lean = ours(**inputs(), skip_logits=True)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    assert lean.logits is None
    torch.testing.assert_close(lean.loss, expected.loss)


def test_labels_may_be_given_by_position() -> None:
    model, given = tiny("llama"), inputs()
    order = (given["input_ids"], given["attention_mask"], None, None, None, given["labels"])
    ours = fused(model)
    assert ours(*order).logits is None
    torch.testing.assert_close(ours(*order).loss, model(*order).loss)


def test_a_loss_function_set_later_is_used() -> None:
    model = fused(tiny("llama"))
    model.loss_function = lambda logits, labels, **_: logits.sum()
    output = model(**inputs())
    assert output.logits is not None and torch.equal(output.loss, output.logits.sum())


def test_the_signature_stays_that_of_the_class() -> None:
    model = tiny("mixtral")
    assert inspect.signature(fused(model).forward) == inspect.signature(model.forward)


class _ScaledLogits(LlamaForCausalLM):
    """A class whose forward is not the known one."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / 3
        return output


class _PackedLinear(nn.Linear):
    """Stands for another library's quantized layer."""


def _other_class(model: Any) -> None:
    model.__class__ = _ScaledLogits


def _packed_head(model: Any) -> None:
    model.lm_head.__class__ = _PackedLinear


def _hooked_head(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, args, output: output * 2)


def _own_loss(model: Any) -> None:
    model.loss_function = lambda logits, **_: logits.sum()


def _resized_head(model: Any) -> None:
    model.lm_head = nn.Linear(64, 130, bias=False)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (_other_class, "forward"),
        (_packed_head, "_PackedLinear"),
        (_hooked_head, "hooks"),
        (_own_loss, "loss_function"),
        (_resized_head, "130 outputs"),
        (lambda model: model.half(), "float16"),
    ],
)
def test_models_that_the_op_does_not_serve_are_left_with_a_reason(change: Any, word: str) -> None:
    model = tiny("llama")
    change(model)
    answer = part.offer("", model, model)
    assert answer is not None and not answer.replaced and word in answer.reason


@pytest.mark.parametrize("change", [_packed_head, _hooked_head])
def test_a_head_changed_after_patching_gets_the_classes_own_forward(change: Any) -> None:
    model = tiny("llama").train()
    ours = fused(model)
    change(ours)
    change(model)
    found, expected = ours(**inputs()), model(**inputs())
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)


def test_modules_that_are_no_causal_models_are_none_of_this_part() -> None:
    model = tiny("llama")
    assert part.offer("model", model.model, model) is None
    assert part.offer("lm_head", model.lm_head, model) is None


def test_a_lora_adapter_on_the_head_keeps_its_logits() -> None:
    peft = pytest.importorskip("peft")
    model = fused(tiny("llama"))
    swap_again = part.offer("", model, model)
    assert swap_again is not None and swap_again.replaced
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    output = model(**inputs())
    assert output.logits is not None
    answer = part.offer("", model, model)
    assert answer is not None and "Linear" in answer.reason


@pytest.mark.parametrize("bf16", [False, True])
def test_a_trainer_with_accumulated_gradients_takes_the_same_steps(
    tmp_path: Path, bf16: bool
) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    rows = [
        {key: value[0] for key, value in inputs((10 + 3 * i,), seed=i).items()} for i in range(12)
    ]

    def collate(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        fill = {"labels": -100}
        return {
            key: nn.utils.rnn.pad_sequence(
                [row[key] for row in batch], batch_first=True, padding_value=fill.get(key, 0)
            )
            for key in batch[0]
        }

    results = {}
    for name, model in (("ours", fused(tiny("llama"))), ("theirs", tiny("llama"))):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / name), per_device_train_batch_size=2, max_steps=3,
            gradient_accumulation_steps=2, learning_rate=1e-2, logging_steps=1, report_to="none",
            save_strategy="no", use_cpu=True, disable_tqdm=True, seed=0, bf16=bf16,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collate)
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        results[name] = losses, dict(model.named_parameters())
    assert len(results["ours"][0]) == 3
    # bf16: gradients are rounded at other places, and Adam takes its first steps by their signs
    room = 1e-2 if bf16 else 1e-5
    losses = [torch.tensor(result[0]) for result in results.values()]
    torch.testing.assert_close(losses[0], losses[1], rtol=room, atol=0)
    if bf16:
        return
    for name, value in results["theirs"][1].items():
        torch.testing.assert_close(results["ours"][1][name], value, rtol=1e-3, atol=1e-4)


def test_the_forward_compiles_as_one_graph() -> None:
    model = fused(tiny("llama", num_hidden_layers=1))
    given = inputs((16,))
    expected = step(model, given)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = compiled(**given)
    model.zero_grad()
    output.loss.backward()
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected["loss"])
    torch.testing.assert_close(model.lm_head.weight.grad, expected["lm_head.weight"])


def test_swapping_twice_changes_nothing() -> None:
    model = fused(tiny("llama"))
    before = type(model)
    swap(model, part.NAME, part.fused_forward(type(model).forward))
    assert type(model) is before
