"""quantize_model: any tree of modules, layer by layer, and a report of what each layer became."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import fastllm
from fastllm.nn import QuantLinear
from fastllm.nn.linear import Linear
from fastllm.nn.lora import LoraConfig, add_lora
from fastllm.quantize import packed as packing
from fastllm.quantize.rule import FallbackWarning
from fastllm.testing.quantized_models import decoder


class Block(nn.Module):
    """A tree of layers as models have them."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp = nn.ModuleDict({"up": nn.Linear(256, 64), "down": nn.Linear(64, 256, False)})
        self.odd = nn.Linear(256, 37)
        self.narrow = nn.Linear(37, 256)
        self.again = self.odd
        self.lm_head = nn.Linear(256, 50)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp["down"](torch.nn.functional.silu(self.mlp["up"](x)))
        return self.lm_head(x + self.narrow(self.odd(x)))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Models this small wait for a second thread longer than they compute."""
    torch.set_num_threads(1)


def inputs(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(5, 256, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_layers_become_quantlinears_and_the_report_says_what_each_became() -> None:
    model, x = Block(), inputs()
    before = model(x)
    with pytest.warns(FallbackWarning, match="1 of 4 weights are q5_0, not q4_k: rows of 64"):
        report = fastllm.quantize_model(model, "q4_k")
    assert [(layer.name, layer.format, layer.shape) for layer in report.layers] == [
        ("mlp.up", "q4_k", (64, 256)), ("mlp.down", "q5_0", (256, 64)), ("odd", "q4_k", (37, 256)),
    ]  # fmt: skip
    assert dict(report.kept).keys() == {"narrow", "lm_head"}
    assert type(model.narrow) is type(model.lm_head) is nn.Linear
    assert isinstance(model.odd, QuantLinear) and model.again is model.odd
    assert model.odd.activation == "bf16" and model.odd.bias is not None
    assert 0 < (model(x) - before).abs().max() < 0.3
    up = report.layers[0]
    assert up.bits == 4.625 and up.error is not None and 1e-4 < up.error < 2e-2
    text = str(report)
    assert "mlp.down" in text and "q5_0 (not q4_k)" in text and "kept: lm_head (not chosen)" in text
    assert "1 of 4 weights are as they were, not q4_k: rows of 37 columns do not fit" in text
    assert report.bytes_before == sum(p.nbytes for p in Block().parameters())
    now = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    assert report.bytes_after == sum(now.values()) < 0.6 * report.bytes_before


def test_names_choose_and_skip() -> None:
    model = Block(torch.float32)
    report = fastllm.quantize_model(model, "q8_0", modules=r"^mlp|head", skip=("down",))
    assert [layer.name for layer in report.layers] == ["mlp.up", "lm_head"]
    assert model.mlp["up"].activation == "fp32"
    with pytest.raises(ValueError, match=r"modules '\(' is no pattern"):
        fastllm.quantize_model(Block(), "q8_0", modules="(")
    with pytest.raises(ValueError, match="no linear layer of the model is quantized"):
        fastllm.quantize_model(Block(), "q8_0", modules="encoder")
    with pytest.raises(ValueError, match="format 'bf16' is not quantized"):
        fastllm.quantize_model(Block(), "bf16")
    with pytest.raises(ValueError, match="did you mean"):
        fastllm.quantize_model(Block(), "q4k")


def test_a_tied_head_stays_tied() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(96, 64), "head": nn.Linear(64, 96, False)})
    model["up"] = nn.Linear(64, 64)
    model["head"].weight = model["embed"].weight
    report = fastllm.quantize_model(model, "q8_0", skip=())
    assert [layer.name for layer in report.layers] == ["up"]
    assert report.kept == [("head", "shares its weight with another module")]
    assert model["head"].weight is model["embed"].weight


def test_a_weight_that_cannot_be_quantized_is_named() -> None:
    model = Block()
    nn.init.constant_(model.mlp["down"].weight, float("inf"))
    with pytest.raises(ValueError, match=r"mlp\.down: .*infinity"):
        fastllm.quantize_model(model, "q8_0")
    with pytest.raises(ValueError, match=r"mlp\.up: its weight is on meta"):
        fastllm.quantize_model(Block().to("meta"), "q8_0")
    with pytest.raises(ValueError, match=r"mlp\.up: .*float64"):
        fastllm.quantize_model(Block(torch.float64), "q8_0")


@pytest.mark.parametrize("kind", ["torch", "qwen3 moe"])
def test_what_cannot_be_quantized_leaves_the_model_as_it_was(kind: str) -> None:
    """The last matrix is at fault: those before it are not replaced either."""
    model: nn.Module = Block() if kind == "torch" else decoder(kind, torch.float32)
    names = [name for name, module in model.named_modules() if type(module) in (nn.Linear, Linear)]
    last = "odd.weight" if kind == "torch" else "model.layers.1.mlp.experts.down_proj"
    model.get_parameter(last).data.view(-1)[-1] = float("nan")
    before = dict(model.named_parameters())
    problem = r"odd: row 36" if kind == "torch" else r"experts\.down_proj, expert \d+: row"
    for _ in range(2):
        with pytest.raises(ValueError, match=problem):
            fastllm.quantize_model(model, "q8_0")
    with pytest.raises(ValueError, match=r"activation 'int4' is not one of|load it with the one"):
        fastllm.quantize_model(model, "q8_0", activation="int4")
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert all(type(model.get_submodule(name)) in (nn.Linear, Linear) for name in names)
    model.get_parameter(last).data.view(-1)[-1] = 0.0
    assert fastllm.quantize_model(model, "q8_0", modules=r"odd|down").layers


@pytest.mark.parametrize(("format", "fits"), [("q8_0", True), ("q4_1", False), ("nf4", True)])
def test_values_beyond_fp16_are_refused_only_by_scales_of_fp16(format: str, fits: bool) -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(64, 8)).float()
    nn.init.constant_(model[1].weight, -1e6)
    if not fits:
        with pytest.raises(ValueError, match=r"1: row 0 of w holds values too large"):
            fastllm.quantize_model(model, format)
        assert type(model[0]) is nn.Linear
        return
    fastllm.quantize_model(model, format)
    assert isinstance(model[1], QuantLinear)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_linear_layers_that_are_more_than_a_weight_are_kept_and_named() -> None:
    model = nn.ModuleDict({name: nn.Linear(64, 64) for name in ("plain", "pruned", "made")})
    model["old"] = torch.nn.utils.weight_norm(nn.Linear(64, 64))
    model["heads"] = nn.MultiheadAttention(64, 2)
    model["empty"] = nn.Linear(64, 8)
    model["empty"].weight.data = torch.empty(0, 64)
    prune.l1_unstructured(model["pruned"], "weight", 0.5)
    nn.utils.parametrizations.orthogonal(model["made"])
    report = fastllm.quantize_model(model, "q8_0")
    assert [layer.name for layer in report.layers] == ["plain"]
    others = "its weight or bias is made of other parameters"
    assert dict(report.kept) == {
        "pruned": others,
        "old": others,
        "made": "it is a ParametrizedLinear, not torch.nn.Linear itself",
        "heads.out_proj": "it is a NonDynamicallyQuantizableLinear, not torch.nn.Linear itself",
        "empty": "its weight is empty",
    }
    with pytest.raises(ValueError, match="plain is kept, it is quantized already; pruned is kept"):
        fastllm.quantize_model(model, "q8_0")


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.Linear(64, 64), "itself a linear layer, which fastllm.nn.QuantLinear.from_linear"),
        (nn.MultiheadAttention(64, 2), "out_proj is kept, it is a NonDynamically"),
        (nn.Sequential(nn.Conv1d(64, 64, 1)), "it has no linear layer"),
    ],
)
def test_a_model_without_a_quantized_layer_is_told_why(model: nn.Module, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        fastllm.quantize_model(model, "q8_0")


def test_hooks_of_calls_stay_on_a_layer_that_is_replaced() -> None:
    model, x, seen = nn.Sequential(nn.Linear(64, 64)), torch.ones(1, 64), []
    model[0].register_forward_pre_hook(lambda *_, **__: seen.append("before"), with_kwargs=True)
    after = model[0].register_forward_hook(lambda *_: seen.append("after"))
    model[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    fastllm.quantize_model(model, "q8_0")
    model(x.requires_grad_()).sum().backward()
    assert seen == ["before", "after", "backward"]
    after.remove()
    fastllm.dequantize_model(model)
    model(x).sum().backward()
    assert seen[3:] == ["before", "backward"]


def test_one_dense_layer_at_a_time_is_beside_its_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    weights = [weakref.ref(layer.weight) for layer in model]
    alive = []
    quantize = packing.quantize_weight

    def watched(*args: Any) -> Any:
        alive.append(sum(weight() is not None for weight in weights))
        return quantize(*args)

    monkeypatch.setattr(packing, "quantize_weight", watched)
    fastllm.quantize_model(model, "q8_0")
    assert alive == [4, 3, 2, 1]


def test_adapters_go_on_afterwards() -> None:
    model = Block()
    fastllm.quantize_model(model, "q8_0", modules="up")
    add_lora(model, LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match="the model has adapters"):
        fastllm.quantize_model(model, "q8_0", modules="down")


class Transformers:
    """A model of transformers, small, with every kind of layer of a Llama."""

    def __init__(self, dtype: torch.dtype) -> None:
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(
            vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        )  # fmt: skip
        torch.manual_seed(0)
        self.model = transformers.LlamaForCausalLM(config).to(dtype)
        self.ids = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def llama() -> Transformers:
    return Transformers(torch.bfloat16)


# PEFT reads a property that transformers is about to rename.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_peft_trains_saves_loads_and_merges_adapters_on_a_quantized_model(
    llama: Transformers, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    model, ids = llama.model, llama.ids
    dtype, before = model.dtype, model(ids).logits.detach()
    report = fastllm.quantize_model(model, "nf4")
    assert len(report.layers) == 7 and model.dtype == dtype
    assert model.get_memory_footprint() == report.bytes_after < 0.5 * report.bytes_before
    base = model(ids).logits.detach()
    assert 0 < (base - before).abs().max() < 0.3
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    frozen = {k: t.clone() for k, t in adapted.state_dict().items() if "lora_" not in k}
    trained = [(n, p) for n, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 14 and all("lora_" in name for name, _ in trained)
    optimizer = torch.optim.AdamW([p for _, p in trained], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = adapted(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    for name, tensor in adapted.state_dict().items():
        assert "lora_" in name or torch.equal(tensor, frozen[name]), name
    wanted = adapted(ids).logits
    adapted.save_pretrained(tmp_path)
    unloaded = adapted.unload()
    assert torch.equal(unloaded(ids).logits, base)
    loaded = peft.PeftModel.from_pretrained(unloaded, tmp_path)
    assert torch.equal(loaded(ids).logits, wanted)
    for safe in (False, True):
        with pytest.raises(RuntimeError, match="dequantize_model"):
            loaded.merge_and_unload(safe_merge=safe)
    assert torch.equal(loaded(ids).logits, wanted)
    assert fastllm.dequantize_model(loaded) == 7
    merged = loaded.merge_and_unload()
    assert not any(isinstance(module, QuantLinear) for module in merged.modules())
    torch.testing.assert_close(merged(ids).logits, wanted, rtol=0, atol=2e-2)


def test_a_quantized_model_of_transformers_generates_and_is_restored(llama: Transformers) -> None:
    model, ids = llama.model, llama.ids[:, :4]
    fastllm.quantize_model(model, "q4_0")
    answer = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    other = Transformers(model.dtype).model
    nn.init.normal_(other.model.embed_tokens.weight)
    fastllm.quantize_model(other, "q4_0")
    other.load_state_dict(model.state_dict())
    again = other.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(again, answer)


def test_what_transformers_saves_of_it_is_loaded_here(llama: Transformers, tmp_path: Path) -> None:
    model, ids = llama.model, llama.ids[:1]
    fastllm.quantize_model(model, "q4_1", modules="mlp")
    model.save_pretrained(tmp_path)
    llm = fastllm.LLM(tmp_path, activation="bf16", max_model_len=64)
    theirs = model(ids).logits[0].float()
    assert (llm.logits(ids[0].tolist()) - theirs).abs().max() < 2e-2 * theirs.abs().max()
    assert llm.model.model.layers[0].mlp.gate_up.packed.format == "q4_1"
    fastllm.dequantize_model(model)
    assert not hasattr(model.config, "quantization_config")


def test_layers_of_fastllm_hold_codes_alone_and_groups_stay_one_product() -> None:

    for case in ("llama", "qwen3 moe", "deepseek v3 experts"):
        model = decoder(case)
        report = fastllm.quantize_model(model, "q8_0")
        attention, feed_forward = model.model.layers[0].self_attn, model.model.layers[0].mlp
        assert attention.qkv.packed is not None and attention.qkv.packed.format == "q8_0"
        assert all(member.weight is None is member.packed for member in attention.qkv.members)
        assert attention.o_proj.weight is None and attention.o_proj.packed is not None
        assert model.lm_head.weight is not None and model.model.embed_tokens.weight is not None
        sparse = model.model.layers[-1].mlp
        if case != "llama":
            assert sparse.experts.gate_up_proj is None and sparse.gate.weight is not None
            assert sparse.experts.packed_down.format == "q8_0"
        else:
            assert feed_forward.gate_up.packed is not None
        assert report.bytes_after < 0.7 * report.bytes_before == 0.7 * decoder(case).nbytes
        kept = {name.rpartition(".")[2] for name, _ in report.kept}
        assert kept <= {"lm_head", "gate", "kv_b_proj"}
        with pytest.raises(ValueError, match="packed already"):
            fastllm.quantize_model(model, "q8_0")
        plain = [m for m in model.modules() if type(m) is Linear and m.weight is not None]
        assert plain == [model.lm_head]
    with pytest.raises(ValueError, match="activation belongs to the loaded model"):
        fastllm.quantize_model(decoder("llama"), "q8_0", activation="int8")
