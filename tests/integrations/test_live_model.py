"""A transformers model's live weights under our decoder: shared, followed, or refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import fastllm
from fastllm import LLM, SamplingParams
from fastllm.integrations.live_model import LiveModel
from fastllm.nn import QuantLinear
from fastllm.nn.batch import Documents
from fastllm.nn.linear import Linear

# PEFT reads a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

PROMPT = [5, 17, 99, 3, 42, 8, 61]
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, detokenize=False, ignore_eos=True)


def our_logits(live: LiveModel, ids: Sequence[int]) -> Tensor:
    live.refresh()
    decoder = live.decoder
    with torch.no_grad():
        x = decoder.train_hidden(Documents.pack([list(ids)], decoder.device))
        return decoder.logits(x)


def their_logits(model: nn.Module, ids: Sequence[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits[0].float()


@pytest.mark.parametrize(
    "family", ["llama", "smollm", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "olmoe"]
)
def test_logits_are_the_models_and_follow_its_weights(family: str) -> None:
    model = tiny(family)
    live = LiveModel(model)
    theirs = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in live.decoder.parameters()} == theirs  # no copy of any
    torch.testing.assert_close(
        our_logits(live, PROMPT), their_logits(model, PROMPT), rtol=1e-4, atol=1e-4
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    torch.testing.assert_close(
        our_logits(live, PROMPT), their_logits(model, PROMPT), rtol=1e-4, atol=1e-4
    )
    assert live.current


def test_an_engine_on_live_weights_answers_as_one_made_after_the_step() -> None:
    model = tiny("llama")
    live = LiveModel(model)
    llm = LLM.from_model(live.decoder)
    before = llm.generate([PROMPT], GREEDY)[0].outputs[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids = torch.tensor([PROMPT])
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    live.refresh()
    after = llm.generate([PROMPT], GREEDY)[0].outputs[0]
    fresh = LLM.from_model(LiveModel(model).decoder).generate([PROMPT], GREEDY)[0].outputs[0]
    assert after.token_logprobs != before.token_logprobs
    assert (after.token_ids, after.token_logprobs) == (fresh.token_ids, fresh.token_logprobs)
    assert live.decoder.model.norm.weight.grad is model.model.norm.weight.grad


def test_writes_past_torchs_counters_are_seen_by_refresh() -> None:
    model = tiny("llama")
    live = LiveModel(model)
    llm = LLM.from_model(live.decoder)
    before = llm.generate([PROMPT], GREEDY)[0].outputs[0].token_logprobs
    model.model.layers[0].mlp.down_proj.weight.data.mul_(3)
    live.refresh()
    after = llm.generate([PROMPT], GREEDY)[0].outputs[0].token_logprobs
    fresh = LLM.from_model(LiveModel(model).decoder).generate([PROMPT], GREEDY)[0].outputs[0]
    assert after != before and after == fresh.token_logprobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_adapter_is_served_beside_the_base(dtype: torch.dtype) -> None:
    peft = pytest.importorskip("peft")
    model = tiny("llama", dtype)
    base = {name: p.clone() for name, p in model.named_parameters()}
    config = peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.5,
        rank_pattern={"down_proj": 2},
    )  # fmt: skip
    adapted = peft.get_peft_model(model, config).eval()
    live = LiveModel(adapted)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0, "atol": 0.2}
    for _ in range(2):  # B is zero at first; the second time it is not
        torch.testing.assert_close(
            our_logits(live, PROMPT), their_logits(adapted, PROMPT), **tolerance
        )
        with torch.no_grad():
            for name, p in adapted.named_parameters():
                if "lora_B" in name:
                    p.add_(0.5 * torch.randn_like(p))
    with adapted.disable_adapter():
        without = their_logits(adapted, PROMPT)
        torch.testing.assert_close(our_logits(LiveModel(adapted), PROMPT), without, **tolerance)
    assert (without - our_logits(live, PROMPT)).abs().max() > 0.5
    for name, p in model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(p, base[name.replace(".base_layer", "")])


def test_layers_that_peft_trains_whole_are_the_trained_copies() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapted = peft.get_peft_model(tiny("llama"), config).eval()
    with torch.no_grad():
        adapted.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    torch.testing.assert_close(
        our_logits(LiveModel(adapted), PROMPT), their_logits(adapted, PROMPT), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
@pytest.mark.filterwarnings("ignore:.*tie:UserWarning")  # PEFT's, of what it unties
def test_a_tied_head_that_peft_unties_is_its_own(modules: list[str]) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=modules)
    adapted = peft.get_peft_model(tiny("smollm"), config).eval()
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "modules_to_save" in name:
                p.mul_(1.5 if "lm_head" in name else 0.5)
    torch.testing.assert_close(
        our_logits(LiveModel(adapted), PROMPT), their_logits(adapted, PROMPT), rtol=1e-4, atol=1e-4
    )


def test_switched_scaled_and_merged_adapters_are_noticed() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(tiny("llama"), config).eval()
    adapted.add_adapter("two", config)
    live = LiveModel(adapted)
    assert live.current
    adapted.set_adapter("two")
    assert not live.current
    live = LiveModel(adapted)
    torch.testing.assert_close(
        our_logits(live, PROMPT), their_logits(adapted, PROMPT), rtol=1e-4, atol=1e-4
    )
    with adapted.disable_adapter():
        assert not live.current
    assert live.current
    for layer in adapted.base_model.model.model.layers:
        layer.self_attn.q_proj.set_scale("two", 3.0)
    assert not live.current
    torch.testing.assert_close(
        our_logits(LiveModel(adapted), PROMPT), their_logits(adapted, PROMPT), rtol=1e-4, atol=1e-4
    )
    live = LiveModel(adapted)
    adapted.merge_adapter()
    assert not live.current


def test_a_changed_activation_is_noticed() -> None:
    model = tiny("llama")
    layer = model.model.layers[0].mlp
    layer.up_proj = QuantLinear.from_linear(layer.up_proj, "int8", activation="fp32")
    live = LiveModel(model)
    layer.up_proj.activation = "int8"
    assert not live.current


def test_a_quantized_base_stays_packed_under_its_adapter() -> None:
    peft = pytest.importorskip("peft")
    model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj = QuantLinear.from_linear(layer.mlp.up_proj, "int8", activation="fp32")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).eval()
    live = LiveModel(adapted)
    packed = live.decoder.model.layers[0].mlp.up_proj.packed
    codes = model.model.layers[0].mlp.up_proj.weight_codes
    assert packed is not None and packed.data.data_ptr() == codes.data_ptr()
    torch.testing.assert_close(
        our_logits(live, PROMPT), their_logits(adapted, PROMPT), rtol=1e-4, atol=1e-4
    )
    llm = LLM.from_model(live.decoder)
    assert len(llm.generate([PROMPT], GREEDY)[0].outputs[0].token_ids) == 6


@pytest.mark.parametrize(
    ("family", "embeddings"),
    [("llama", None), ("llama", "int8"), ("smollm", "int8"), ("mixtral", None)],
)
def test_a_model_that_is_loaded_quantized_is_served_packed(
    family: str, embeddings: str | None, tmp_path: Path
) -> None:
    tiny(family).save_pretrained(tmp_path)
    config = fastllm.QuantConfig("int8", activation="fp32", embeddings=embeddings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    live = LiveModel(model.eval())
    linears = [m for m in live.decoder.modules() if isinstance(m, Linear)]
    assert sum(m.packed is not None for m in linears) >= 8
    assert (live.decoder.model.embed_tokens.packed is not None) == (embeddings is not None)
    torch.testing.assert_close(
        our_logits(live, PROMPT), their_logits(model, PROMPT), rtol=1e-3, atol=1e-3
    )
    answer = LLM.from_model(live.decoder).generate([PROMPT], GREEDY)[0].outputs[0].token_ids
    ids = torch.tensor([PROMPT])
    theirs = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert answer == theirs[0, len(PROMPT) :].tolist()


def test_replaced_parameters_are_noticed() -> None:
    model = tiny("llama")
    live = LiveModel(model)
    assert live.current
    model.to(torch.bfloat16)
    assert not live.current and LiveModel(model).decoder.dtype == torch.bfloat16


def dora() -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(
        tiny("llama"), peft.LoraConfig(target_modules=["q_proj"], use_dora=True)
    )


def merged() -> nn.Module:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    model.merge_adapter()
    return model


def prompt_tuned() -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(
        tiny("llama"),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    )


def trained_tokens() -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2]}
    )
    return peft.get_peft_model(tiny("llama"), config)


def half_moved() -> nn.Module:
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.to(torch.bfloat16)
    return model


REFUSED: list[tuple[Any, str]] = [
    (lambda: tiny("gemma3"), "Gemma3ForCausalLM .* is a family that the engine cannot represent"),
    (lambda: tiny("phi3"), "Phi3ForCausalLM"),
    (lambda: tiny("gpt_oss"), "GptOssForCausalLM"),
    (lambda: tiny("deepseek_v3"), "deepseek_v3 with rope_interleave=true"),
    (lambda: tiny("llama", hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
    (lambda: tiny("llama", torch.float16), "the matrices are torch.float16"),
    (lambda: nn.Linear(2, 2), "Linear is no transformers model"),
    (half_moved, "the matrices are torch.bfloat16, torch.float32"),
    (trained_tokens, "TrainableTokensWrapper computes model.embed_tokens.weight"),
    (dora, "q_proj is a variant of LoRA"),
    (merged, "q_proj has a merged adapter"),
    (prompt_tuned, "adapter 'default' is PROMPT_TUNING"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_the_engine_cannot_represent_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LiveModel(make())
