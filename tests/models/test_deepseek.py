"""DeepSeek-V2 and V3 directories: what their configurations mean, and generation from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastllm import LLM, SamplingParams
from fastllm.engine.cache import PAGE_SIZE, page_bytes
from fastllm.errors import ModelFileError
from fastllm.models.config import ModelConfig
from fastllm.models.loader import load_model
from fastllm.models.mla_config import MlaConfig, half_split_index
from fastllm.ops.log_probs import log_probs

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 32, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24, "v_head_dim": 40, "first_k_dense_replace": 2,
    "max_position_embeddings": 512,
}  # fmt: skip
YARN = {
    "type": "yarn", "factor": 8.0, "mscale": 0.707, "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip
MLA_FIELDS = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, detokenize=False, ignore_eos=True)


def config_of(version: str, **options: Any) -> Any:
    return getattr(transformers, f"Deepseek{version}Config")(**SIZES | options)


def values_of(version: str, **changes: Any) -> dict[str, Any]:
    """A config.json in the checkpoints' own spelling."""
    name = {"V2": "deepseek_v2", "V3": "deepseek_v3"}[version]
    architecture = f"Deepseek{version}ForCausalLM"
    return {"architectures": [architecture], "model_type": name} | SIZES | changes


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with every part: query latent, YaRN with its factors, interleaved rows."""
    torch.manual_seed(0)
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, **YARN}
    del rope["type"]
    config = config_of("V3", q_lora_rank=28, rope_parameters=rope)
    model = transformers.DeepseekV3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        scale = 0.3 if parameter.ndim == 1 or "embed" in name else 1.5 / parameter.shape[-1] ** 0.5
        torch.nn.init.normal_(parameter, float("norm" in name), scale)
    directory = tmp_path_factory.mktemp("deepseek")
    model.save_pretrained(directory)
    return directory


def prompt(length: int, seed: int = 1) -> list[int]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 320, (length,), generator=g).tolist()


@pytest.mark.parametrize("version", ["V2", "V3"])
@pytest.mark.parametrize("q_lora_rank", [28, None])
def test_a_saved_config_means_what_transformers_takes_it_for(
    version: str, q_lora_rank: int | None, tmp_path: Path
) -> None:
    theirs = config_of(version, q_lora_rank=q_lora_rank)
    theirs.save_pretrained(tmp_path)
    values = theirs.to_dict() | {"architectures": [f"Deepseek{version}ForCausalLM"]}
    ours = ModelConfig.from_hf(values)
    assert ours.mla is not None and ours.experts is None
    for name in MLA_FIELDS:
        assert getattr(ours.mla, name) == getattr(theirs, name), name
    assert ours.head_dim == theirs.qk_head_dim and ours.rotary_dim == theirs.head_dim
    again = type(theirs).from_dict(ours.to_hf())
    for name in (*MLA_FIELDS, *SIZES, "head_dim", "rope_parameters"):
        assert getattr(again, name) == getattr(theirs, name), name


@pytest.mark.parametrize("version", ["V2", "V3"])
def test_absent_keys_mean_the_defaults_of_the_class(version: str) -> None:
    sizes = {"vocab_size": 320, "hidden_size": 2048, "intermediate_size": 96}
    sizes |= {"num_attention_heads": 128, "num_hidden_layers": 2, "num_experts_per_tok": 2}
    theirs = getattr(transformers, f"Deepseek{version}Config")(**sizes)
    named = {"architectures": [f"Deepseek{version}ForCausalLM"]}
    ours = ModelConfig.from_hf(named | {"model_type": theirs.model_type} | sizes)
    assert ours.mla is not None
    for name in MLA_FIELDS:
        assert getattr(ours.mla, name) == getattr(theirs, name), name
    assert (ours.experts is None) == (theirs.first_k_dense_replace >= 2)
    assert ours.max_position_embeddings == theirs.max_position_embeddings


def test_yarn_scales_the_softmax_of_latent_attention() -> None:
    plain = ModelConfig.from_hf(values_of("V2", q_lora_rank=None))
    yarn = ModelConfig.from_hf(values_of("V2", q_lora_rank=None, rope_scaling=YARN))
    factor = 0.1 * 0.707 * torch.log(torch.tensor(8.0, dtype=torch.float64)).item() + 1
    assert plain.softmax_scale == pytest.approx(40**-0.5)
    assert yarn.softmax_scale == pytest.approx(40**-0.5 * factor**2)


def test_a_missing_router_is_named(tmp_path: Path, model_directory: Path) -> None:
    values = json.loads((model_directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"first_k_dense_replace": 1}))
    (tmp_path / "model.safetensors").symlink_to(model_directory / "model.safetensors")
    config = ModelConfig.from_directory(tmp_path)
    assert config.experts is not None and config.experts.dense_layers == (0,)
    with pytest.raises(
        ModelFileError, match=r"layers\.1\.mlp\.gate\.weight: the weight is missing"
    ):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_lora_rank": 0}, "kv_lora_rank must be from 1"),
        ({"kv_lora_rank": 1 << 40}, "kv_lora_rank must be from 1"),
        ({"q_lora_rank": "many"}, "q_lora_rank: must be an integer"),
        ({"qk_rope_head_dim": 15}, "qk_rope_head_dim 15 is odd"),
        ({"qk_rope_head_dim": -2}, "head_dim|qk_rope_head_dim must be"),
        ({"v_head_dim": 0}, "v_head_dim must be from 1"),
        ({"num_key_value_heads": 2}, "cannot have 2 key heads"),
    ],
)
def test_sizes_that_cannot_be_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelFileError, match=words):
        ModelConfig.from_hf(values_of("V3", **changes))


def test_latent_attention_and_the_model_type_belong_together() -> None:
    latent = ModelConfig.from_hf(values_of("V3"))
    with pytest.raises(ValueError, match="deepseek_v3 needs latent attention"):
        replace(latent, mla=None)
    with pytest.raises(ValueError, match="llama has no latent attention"):
        replace(latent, model_type="llama")
    with pytest.raises(ValueError, match="sliding_window"):
        replace(latent, sliding_window=(8, None))


def test_layers_that_predict_further_tokens_are_left_out(
    tmp_path: Path, model_directory: Path
) -> None:
    tensors = load_file(model_directory / "model.safetensors")
    tensors["model.layers.2.eh_proj.weight"] = torch.ones(64, 128)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((model_directory / "config.json").read_text())
    assert len(load_model(tmp_path).model.layers) == 2


def test_rotated_rows_of_every_head_are_reordered_and_nothing_else() -> None:
    mla = MlaConfig(
        q_lora_rank=None, kv_lora_rank=3, qk_nope_head_dim=1, qk_rope_head_dim=4, v_head_dim=2
    )
    prefix = "model.layers.0.self_attn."
    q = half_split_index(mla, 2, prefix + "q_proj.weight")
    kv = half_split_index(mla, 2, prefix + "kv_a_proj_with_mqa.bias")
    assert q is not None and q.tolist() == [0, 1, 3, 2, 4, 5, 6, 8, 7, 9]
    assert kv is not None and kv.tolist() == [0, 1, 2, 3, 5, 4, 6]
    for name in ("kv_b_proj.weight", "o_proj.weight", "kv_a_layernorm.weight"):
        assert half_split_index(mla, 2, prefix + name) is None


def test_greedy_answers_are_those_of_transformers(model_directory: Path) -> None:
    model = transformers.DeepseekV3ForCausalLM.from_pretrained(model_directory)
    prompts = [prompt(n, n) for n in (5, 70, 131)]
    llm = LLM(model_directory, dtype="float32", max_num_batched_tokens=64)
    answers = [out.outputs[0].token_ids for out in llm.generate(prompts, GREEDY)]
    for ids, answer in zip(prompts, answers, strict=True):
        want = model.generate(
            torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None
        )
        assert answer == want[0, len(ids) :].tolist()


def test_graphs_and_eager_steps_give_the_same_answers(model_directory: Path) -> None:
    params = SamplingParams(
        temperature=1.0, seed=3, n=3, max_tokens=70, detokenize=False, ignore_eos=True
    )
    prompts = [prompt(40), prompt(64)]
    answers = []
    for eager in (False, True):
        llm = LLM(model_directory, enforce_eager=eager)
        outs = llm.generate(prompts, params)
        answers.append([sample.token_ids for out in outs for sample in out.outputs])
    assert answers[0] == answers[1] and len({tuple(a) for a in answers[0]}) == 6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prompts_and_decode_steps_give_the_same_log_probabilities(
    model_directory: Path, dtype: str
) -> None:
    llm = LLM(model_directory, dtype=dtype)
    params = SamplingParams(temperature=0.0, max_tokens=12, detokenize=False, logprobs=0)
    ids = prompt(100)
    out = llm.generate([ids, prompt(7)], params)[0].outputs[0]
    decoded = [e[t].logprob for t, e in zip(out.token_ids, out.logprobs, strict=True)]
    whole = llm.logits(ids + out.token_ids)[len(ids) - 1 : -1]
    picked = log_probs(whole, torch.tensor(out.token_ids).unsqueeze(1))[:, 0]
    assert picked.tolist() == decoded


def test_a_cached_position_is_one_latent_and_one_key(model_directory: Path) -> None:
    llm = LLM(model_directory, dtype="float32", max_model_len=128)
    assert page_bytes(llm.config, torch.float32) == 2 * PAGE_SIZE * 48 * 4
    layers = llm._engine.runner.cache.layers
    assert len(layers) == 2 and layers[0].shape[1:] == (PAGE_SIZE, 48)


def test_a_width_without_a_kernel_is_named(tmp_path: Path) -> None:
    config = config_of("V2", q_lora_rank=None, kv_lora_rank=20)
    transformers.DeepseekV2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ModelFileError, match=r"kv_lora_rank.*20.*enforce_eager"):
        LLM(tmp_path)
    llm = LLM(tmp_path, enforce_eager=True)
    assert len(llm.generate([prompt(5)], GREEDY)[0].outputs[0].token_ids) == 12
