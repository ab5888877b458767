"""`patch`: what it replaces, what it leaves alone and why, and that all of it can be undone."""

from __future__ import annotations

import copy
import io
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import FAMILIES, inputs, tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel
from transformers.models.llama import modeling_llama

import fastllm
from fastllm.integrations.transformers import OPS, PatchError, Report, Row
from fastllm.integrations.transformers.swap import swap, swapped

TIGHT = 1e-4


def classes(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules()]


def reasons(report: Report, part: str) -> set[str]:
    return {row.reason for row in report.rows if row.part == part and not row.replaced}


def loss_and_logits(model: nn.Module, **batch: Tensor) -> tuple[float, Tensor]:
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        return float(model(**batch).loss), logits


def same(found: Tensor, wanted: Tensor) -> bool:
    return float((found - wanted).abs().max()) < TIGHT * float(wanted.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_patched_computes_the_same_and_goes_back(family: str) -> None:
    model = tiny(family)
    batch = inputs((20, 20))
    before, keys = classes(model), list(model.state_dict())
    chosen = model.config._attn_implementation, model.config._experts_implementation
    wanted = loss_and_logits(model, **batch)
    report = fastllm.patch(model)
    assert report.replaced("attention") and report.replaced("norm"), report
    if family in ("llama", "qwen3", "mixtral"):
        parts = {"attention", "norm", "rope", "loss", "mlp" if family != "mixtral" else "experts"}
        assert parts <= set(report.counts())
    for part in report.counts():
        assert report.replaced(part) or all(reasons(report, part)), f"{part} without a reason"
    assert list(model.state_dict()) == keys
    found = loss_and_logits(model, **batch)
    assert abs(found[0] - wanted[0]) < TIGHT * wanted[0] and same(found[1], wanted[1])
    patched_classes = classes(model)
    again = fastllm.patch(model)
    assert classes(model) == patched_classes and again.counts() == report.counts()
    assert {row.reason for row in again.rows if row.replaced} == {"already replaced"}
    fastllm.unpatch(model)
    assert classes(model) == before and "fastllm" not in str(sorted(model.__dict__))
    assert (model.config._attn_implementation, model.config._experts_implementation) == chosen
    assert torch.equal(loss_and_logits(model, **batch)[1], wanted[1])
    fastllm.unpatch(model)


def test_the_report_is_a_table_with_a_line_for_layers_that_are_alike() -> None:
    text = str(fastllm.patch(tiny("llama", num_hidden_layers=3), ops=("attention", "norm")))
    assert "model.layers.{0-2}.self_attn" in text and "attention: 3 of 3" in text
    assert "model.norm" in text and "norm: 7 of 7" in text
    assert text.splitlines()[0].split() == ["module", "class", "part", "replaced"]
    holes = Report([Row(f"layers.{i}.mlp", "MLP", "mlp", i != 2, "odd" * (i == 2))
                    for i in (0, 1, 2, 4)])  # fmt: skip
    assert "layers.{0-1,4}.mlp" in str(holes) and "layers.2.mlp" in str(holes)
    assert "odd" in str(holes) and not holes.replaced("mlp") and not holes.replaced("rope")
    assert "nothing in this model" in str(fastllm.patch(nn.Linear(2, 2)))


def test_only_the_ops_that_are_named_are_replaced_in_this_model_only() -> None:
    model, other = tiny("llama"), tiny("llama")
    before = classes(other)
    rotate = modeling_llama.apply_rotary_pos_emb
    report = fastllm.patch(model, ops=("norm", "rope"))
    assert set(report.counts()) == {"norm", "rope"}
    assert model.config._attn_implementation == "sdpa"
    assert classes(other) == before and modeling_llama.apply_rotary_pos_emb is rotate
    assert modeling_llama.LlamaRMSNorm.forward.__module__ == modeling_llama.__name__


def test_a_with_block_undoes_what_it_did_and_no_more() -> None:
    model = tiny("llama")
    plain = classes(model)
    fastllm.patch(model, ops=("norm",))
    before = classes(model)
    with fastllm.patched(model) as report:
        assert report.replaced("attention") and model.config._attn_implementation == "fastllm"
        assert classes(model) != before
    assert classes(model) == before and model.config._attn_implementation == "sdpa"
    with pytest.raises(ZeroDivisionError), fastllm.patched(model):
        _ = 1 / 0
    assert classes(model) == before
    fastllm.unpatch(model)
    assert classes(model) == plain


def test_copies_saved_and_pickled_models(tmp_path: Path) -> None:
    model = tiny("qwen3")
    batch = inputs((20, 20))
    wanted = loss_and_logits(model, **batch)[1]
    fastllm.patch(model)
    patched_logits = loss_and_logits(model, **batch)[1]
    copied = copy.deepcopy(model)
    assert classes(copied) == classes(model)
    assert torch.equal(loss_and_logits(copied, **batch)[1], patched_logits)
    fastllm.unpatch(copied)
    assert torch.equal(loss_and_logits(copied, **batch)[1], wanted)
    assert model.config._attn_implementation == "fastllm" and swapped(model.model.norm)
    model.save_pretrained(tmp_path)
    assert "fastllm" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    assert torch.equal(loss_and_logits(loaded, **batch)[1], wanted)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    whole = torch.load(file, weights_only=False)
    assert not any(swapped(module) for module in whole.modules())
    assert same(loss_and_logits(whole, **batch)[1], wanted)


def test_patching_and_unpatching_from_many_threads_leaves_a_whole_model() -> None:
    model = tiny("llama")
    before = classes(model)
    start = threading.Barrier(4)
    wrong: list[BaseException] = []

    def work() -> None:
        start.wait()
        try:
            for _ in range(3):
                assert fastllm.patch(model).replaced("norm")
                fastllm.unpatch(model)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and classes(model) == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ops": ("attention", "norms")}, ValueError, "ops: norms unknown; there are attention"),
        ({"ops": "norm"}, ValueError, r'a sequence of names is needed, such as \("norm",\)'),
        ({"model": "gpt2"}, TypeError, "model: a torch.nn.Module is needed, not str"),
    ],
)
def test_bad_arguments_are_refused_by_name(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fastllm.patch(**arguments)


def untouched(model: nn.Module) -> bool:
    return not any(swapped(module) for module in model.modules())


def test_models_on_meta_or_in_between_are_left_alone() -> None:
    with torch.device("meta"):
        model = tiny("llama")
    report = fastllm.patch(model)
    assert untouched(model) and model.config._attn_implementation == "sdpa"
    assert reasons(report, "norm") == {"on the meta device: load its weights first"}
    model = tiny("llama")
    model.model.layers[1].to("meta")
    report = fastllm.patch(model, ops=("norm", "attention"))
    assert swapped(model.model.norm) and not swapped(model.model.layers[1].input_layernorm)
    assert report.counts()["norm"] == (3, 5)


def test_strict_raises_with_the_reasons_and_changes_nothing() -> None:
    model = tiny("llama")
    model.model.layers[1].to("meta")
    with pytest.raises(PatchError, match="meta device") as caught:
        fastllm.patch(model, strict=True)
    assert untouched(model) and model.config._attn_implementation == "sdpa"
    assert not caught.value.report.replaced("norm")
    fastllm.patch(tiny("llama"), strict=True)


def test_a_forward_that_another_library_has_set_stays() -> None:
    model = tiny("llama")
    norm = model.model.norm

    def liger_forward(hidden_states: Tensor) -> Tensor:
        return hidden_states

    norm.forward = liger_forward
    report = fastllm.patch(model, ops=("norm",))
    assert not swapped(norm) and norm.forward is liger_forward
    assert any("was set on the module by" in reason for reason in reasons(report, "norm"))
    assert report.counts()["norm"] == (4, 5)


def test_a_class_whose_forward_another_library_has_replaced_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return hidden_states

    forward.__module__ = "liger_kernel.transformers.rms_norm"
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", forward)
    model = tiny("llama")
    report = fastllm.patch(model, ops=("norm",))
    assert untouched(model)
    assert reasons(report, "norm") == {
        "LlamaRMSNorm.forward was replaced by liger_kernel.transformers.rms_norm"
    }


def test_compiled_models_and_modules_are_left_alone() -> None:
    model = tiny("llama")
    compiled = torch.compile(model, backend="eager")
    report = fastllm.patch(compiled)
    assert untouched(model) and "compiled before" in report.rows[0].reason
    model.model.norm.compile(backend="eager")
    report = fastllm.patch(model, ops=("norm",))
    assert not swapped(model.model.norm) and report.counts()["norm"] == (4, 5)
    with pytest.raises(PatchError, match="compiled before"):
        fastllm.patch(compiled, strict=True)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT's
def test_a_model_under_peft_is_patched_and_trains_its_adapter() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    batch = inputs((20, 14), padding="right")
    grads = []
    for patching in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(tiny("llama"), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
        if patching:
            report = fastllm.patch(model)
            assert report.replaced("attention") and report.replaced("norm"), report
        model(**batch).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(same(found, wanted) for wanted, found in zip(*grads, strict=True))
    fastllm.unpatch(model)
    assert untouched(model) and model.config._attn_implementation == "sdpa"


def test_unknown_architectures_run_on_as_they_were() -> None:
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64}
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    bert = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                intermediate_size=32, vocab_size=64)).eval()  # fmt: skip
    batch = inputs((12, 7), padding="right")
    ids, mask = batch["input_ids"] % 64, batch["attention_mask"]
    for model in (gpt2, bert):
        with torch.no_grad():
            wanted = model(input_ids=ids, attention_mask=mask)[0]
            report = fastllm.patch(model)
            found = model(input_ids=ids, attention_mask=mask)[0]
        assert isinstance(report, Report) and same(found[mask.bool()], wanted[mask.bool()])
        fastllm.unpatch(model)
        assert untouched(model)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)
            self.norm = nn.LayerNorm(8)

    own = Own()
    before = classes(own)
    assert not any(row.replaced for row in fastllm.patch(own).rows) and classes(own) == before


def test_a_model_built_with_our_names_keeps_them_and_a_half_frozen_one_trains() -> None:
    model = tiny("mixtral", attn_implementation="fastllm", experts_implementation="fastllm")
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad_(False)
    report = fastllm.patch(model)
    assert report.replaced("attention") and report.replaced("experts")
    batch = inputs((20, 20))
    model(**batch).loss.backward()
    plain = tiny("mixtral")
    plain(**batch).loss.backward()
    for found, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        assert found.grad is None or same(found.grad, wanted.grad)
    assert model.model.layers[0].mlp.gate.weight.grad is None
    fastllm.unpatch(model)
    assert model.config._attn_implementation == "fastllm"


def test_a_model_inside_another_is_undone_from_either() -> None:
    for patched, undone in (("model", ""), ("", "model")):
        outer = tiny("mixtral")
        plain = classes(outer)
        names = outer.config._attn_implementation, outer.config._experts_implementation
        fastllm.patch(outer.get_submodule(patched))
        fastllm.unpatch(outer.get_submodule(undone))
        assert (outer.config._attn_implementation, outer.config._experts_implementation) == names
        fastllm.unpatch(outer)
        assert classes(outer) == plain and "fastllm" not in str(sorted(outer.model.__dict__))


def test_an_error_in_the_middle_leaves_nothing_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    before = classes(model)
    done = []

    def fail(*arguments: Any, **attributes: Any) -> None:
        done.append(arguments[0])
        if len(done) == 3:
            raise MemoryError
        swap(*arguments, **attributes)

    monkeypatch.setattr("fastllm.integrations.transformers.norm.swap", fail)
    with pytest.raises(MemoryError):
        fastllm.patch(model)
    assert classes(model) == before and model.config._attn_implementation == "sdpa"
    monkeypatch.undo()
    fastllm.patch(model)
    patched_classes = classes(model)
    last = model.model.norm
    last.__class__ = type("Wrapped", (type(last),), {})
    with pytest.raises(RuntimeError, match="wrapped by another library"):
        fastllm.unpatch(model)
    last.__class__ = type(last).__mro__[1]
    assert classes(model) == patched_classes


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit's own
def test_a_script_of_torch_jit_inside_a_model_stays() -> None:
    model = tiny("llama")
    model.extra = torch.jit.trace(nn.Linear(2, 2), (torch.zeros(1, 2),))
    assert fastllm.patch(model).replaced("norm")


def test_ops_are_the_parts_that_the_page_names() -> None:
    assert OPS == ("attention", "experts", "norm", "rope", "mlp", "linear", "loss")
