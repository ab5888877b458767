"""Mixtral, Qwen3-MoE, OLMoE and DeepSeek with experts, beside transformers' own models of them.

Configurations, files in both directions, logits, gradients, generation, training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastllm import LLM, SamplingParams
from fastllm.errors import ModelFileError
from fastllm.models.adapters import load_adapter, save_adapter
from fastllm.models.config import ModelConfig
from fastllm.models.expert_files import holds_experts
from fastllm.models.gguf_export import export_gguf, export_hf, weights_of
from fastllm.models.loader import hf_tensors, in_file_order, load_model, save_pretrained
from fastllm.models.moe_config import MoeConfig
from fastllm.models.trainable import initialize, load_trainable
from fastllm.models.weights import SafetensorsWeights, open_weights
from fastllm.nn.lora import LoraConfig, adapted, add_lora, lora_parameters
from fastllm.ops.sampling import log_probs
from fastllm.testing.plain_decoder import plain_loss
from fastllm.testing.small_models import (
    SPARSE,
    batch_of,
    config_of,
    model_of,
    random_documents,
)
from fastllm.train.optim import AdamW

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 28, "kv_lora_rank": 32, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24, "v_head_dim": 40, "first_k_dense_replace": 1, "n_routed_experts": 8,
    "moe_intermediate_size": 48, "num_experts_per_tok": 3,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": 9}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "head_dim": 32,
         "norm_topk_prob": True, "num_hidden_layers": 3, "mlp_only_layers": [1]},
    ),
    "olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 3, "num_key_value_heads": 4}),
    "deepseek_v2": (
        "DeepseekV2",
        {**LATENT, "n_shared_experts": 2, "topk_method": "group_limited_greedy", "n_group": 4,
         "topk_group": 2, "routed_scaling_factor": 1.5},
    ),
    "deepseek_v3": (
        "DeepseekV3", {**LATENT, "n_shared_experts": 1, "n_group": 4, "topk_group": 2},
    ),
}  # fmt: skip
PROMPT = [(37 * i + i * i) % 96 for i in range(40)]
families = pytest.mark.parametrize("family", FAMILIES)


def some(short: Sequence[Any], *others: Any) -> list[Any]:
    """Cases of a plain run, then those of the full one."""
    return [*short, *(pytest.param(*case, marks=pytest.mark.full) for case in others)]


def values_of(family: str, **changes: Any) -> dict[str, Any]:
    """A config.json of the family."""
    name, options = FAMILIES[family]
    named = {"architectures": [f"{name}ForCausalLM"], "model_type": family}
    return named | SIZES | options | changes


def theirs_of(family: str, **changes: Any) -> Any:
    """transformers' configuration."""
    name, options = FAMILIES[family]
    return getattr(transformers, f"{name}Config")(**SIZES | options | changes)


def random_model(family: str) -> Any:
    """transformers' model, weights large enough that every part of it matters."""
    config = theirs_of(family)
    name = f"{FAMILIES[family][0]}ForCausalLM"
    model = getattr(transformers, name)._from_config(config, experts_implementation="eager")
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            scale = 0.3 if tensor.ndim == 1 else 1.5 * tensor.shape[-1] ** -0.5
            tensor.copy_(torch.randn(tensor.shape, generator=g) * scale + float("norm" in key))
    return model.eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """transformers' random model of a family, and the directory that it was saved to."""
    made: dict[str, tuple[Any, Path]] = {}

    def get(family: str) -> tuple[Any, Path]:
        if family not in made:
            model, directory = random_model(family), tmp_path_factory.mktemp(family)
            model.save_pretrained(directory)
            made[family] = model, directory
        return made[family]

    return get


def logits_of(model: Any, ids: Sequence[int] = PROMPT) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


# configurations


@families
def test_a_saved_config_means_what_transformers_takes_it_for(family: str) -> None:
    theirs = theirs_of(family)
    values = theirs.to_dict() | {"architectures": [f"{FAMILIES[family][0]}ForCausalLM"]}
    ours = ModelConfig.from_hf(values)
    assert ours == ModelConfig.from_hf(values_of(family))
    again = type(theirs).from_dict(ours.to_hf())
    meant = {*SIZES, *FAMILIES[family][1], "rope_parameters", "rms_norm_eps"}
    for key in meant - {"pad_token_id"}:  # nothing of the model
        assert getattr(again, key) == getattr(theirs, key), key
    assert ModelConfig.from_hf(ours.to_hf()) == ours


@families
def test_absent_keys_mean_the_defaults_of_the_class(family: str) -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 96, "num_hidden_layers": 5}
    sizes |= {"num_attention_heads": 32, "vocab_size": 60000}
    if family == "deepseek_v2":
        sizes |= {"num_experts_per_tok": 6}
    if family == "deepseek_v3":
        sizes |= {"num_key_value_heads": 32}
    name = FAMILIES[family][0]
    theirs = getattr(transformers, f"{name}Config")(**sizes)
    named = {"architectures": [f"{name}ForCausalLM"], "model_type": family}
    ours = ModelConfig.from_hf(named | sizes)
    assert ours == replace(
        ModelConfig.from_hf(named | theirs.to_dict()), bos_token_id=ours.bos_token_id, dtype=None
    )


@families
def test_weights_are_those_of_transformers_model(family: str) -> None:
    name = FAMILIES[family][0]
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(theirs_of(family))
    theirs = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert ModelConfig.from_hf(values_of(family)).weight_shapes() == theirs


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("mixtral", {"num_experts_per_tok": 5}, "per_token 5 is more than the num_experts 4"),
        ("mixtral", {"num_local_experts": 0}, "num_experts must be from 1"),
        ("mixtral", {"num_local_experts": 1 << 40}, "num_experts must be from 1"),
        ("mixtral", {"num_local_experts": "many"}, "num_local_experts: must be an integer"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step: must be at least 1"),
        ("qwen3_moe", {"mlp_only_layers": ["1"]}, "mlp_only_layers: must hold integers"),
        ("qwen3_moe", {"mlp_only_layers": [0] * 2000}, "mlp_only_layers: has 2000 items"),
        ("qwen3_moe", {"num_hidden_layers": 1 << 40}, "num_hidden_layers must be from 1"),
        ("qwen3_moe", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv: clipped queries"),
        ("deepseek_v2", {"topk_method": "random"}, "topk_method: 'random' is not supported"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func: 'sigmoid' is not supported"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob: DeepSeek-V2"),
        ("deepseek_v2", {"n_group": 3}, "num_experts 8 is not a multiple of groups 3"),
        ("deepseek_v2", {"num_experts_per_tok": None}, "num_experts_per_tok: is missing"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method: 'greedy' is not supported"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func: 'softmax' is not supported"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq: 2 is not supported"),
        ("deepseek_v3", {"topk_group": 5}, "kept_groups must be from 1 to 4, is 5"),
        ("deepseek_v3", {"n_group": 8, "topk_group": 8}, "top2 needs two experts a group"),
        ("deepseek_v3", {"topk_group": 1}, "per_token 3 is more than 1 groups of 2 hold"),
        ("deepseek_v3", {"routed_scaling_factor": -1.0}, "scale must be positive"),
    ],
)
def test_what_is_not_known_is_refused_by_name(
    family: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ModelFileError, match=words):
        ModelConfig.from_hf(values_of(family, **changes))


def test_which_layers_have_experts_is_read_from_every_spelling() -> None:
    def sparse(family: str, **changes: Any) -> list[int]:
        config = ModelConfig.from_hf(values_of(family, num_hidden_layers=6, **changes))
        return [layer for layer in range(6) if config.experts_of(layer) is not None]

    assert sparse("mixtral") == [0, 1, 2, 3, 4, 5]
    assert sparse("qwen3_moe", mlp_only_layers=[0, 4]) == [1, 2, 3, 5]
    assert sparse("qwen3_moe", mlp_only_layers=[], decoder_sparse_step=3) == [2, 5]
    assert sparse("qwen3_moe", mlp_only_layers=[5], decoder_sparse_step=2) == [1, 3]
    assert sparse("deepseek_v3", first_k_dense_replace=2) == [2, 3, 4, 5]
    assert sparse("deepseek_v3", first_k_dense_replace=9) == []
    assert sparse("deepseek_v2", n_routed_experts=None) == []
    assert ModelConfig.from_hf(values_of("deepseek_v2", n_routed_experts=None)).experts is None


def test_experts_and_the_model_type_belong_together() -> None:
    config = ModelConfig.from_hf(values_of("olmoe"))
    with pytest.raises(ValueError, match="olmoe needs experts"):
        replace(config, experts=None)
    with pytest.raises(ValueError, match="llama has no experts"):
        replace(config, model_type="llama")
    with pytest.raises(ValueError, match="names layer 2 of 2"):
        replace(config, experts=replace(config.experts, dense_layers=(2,)))
    with pytest.raises(ValueError, match="cannot express"):
        replace(config, experts=replace(config.experts, scale=2.0)).to_hf()
    with pytest.raises(ValueError, match="must ascend"):
        MoeConfig(num_experts=4, per_token=1, moe_intermediate_size=8, dense_layers=(1, 0))


# files


@families
def test_logits_are_those_of_transformers(
    family: str, models: Callable[[str], tuple[Any, Path]]
) -> None:
    theirs, directory = models(family)
    want = logits_of(theirs)
    packed = load_model(directory, dtype="float32")
    trained = load_trainable(directory, dtype="float32")
    documents, _ = batch_of([PROMPT])
    with torch.no_grad():
        for model in (packed, trained):
            got = model.logits(model.train_hidden(documents))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@families
def test_saved_models_are_the_files_that_transformers_saves(
    family: str, models: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    theirs, directory = models(family)
    wanted = load_file(directory / "model.safetensors")
    trained = load_trainable(directory)
    packed = load_model(directory)
    export_hf(weights_of(trained), tmp_path / "exported", "f32", None)
    export_hf(weights_of(packed), tmp_path / "unpacked", "f32", None)
    export_hf(weights_of(open_weights(directory)), tmp_path / "copied", "f32", None)
    save_pretrained(trained, tmp_path / "trained")
    save_pretrained(packed, tmp_path / "packed")
    for name in ("exported", "unpacked", "copied", "trained", "packed"):
        saved = load_file(tmp_path / name / "model.safetensors")
        assert set(saved) == set(wanted), name
        for key, tensor in wanted.items():
            assert torch.equal(saved[key], tensor), (name, key)
    again = type(theirs).from_pretrained(tmp_path / "packed", experts_implementation="eager")
    assert torch.equal(logits_of(again), logits_of(theirs))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_files_with_a_layers_experts_in_one_tensor_are_read(
    family: str, models: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    theirs, directory = models(family)
    state = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    assert any(holds_experts(name) for name in state)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    fused, separate = load_trainable(tmp_path).weights(), load_trainable(directory).weights()
    assert list(fused) == list(separate)
    for name, tensor in separate.items():
        assert torch.equal(fused[name], tensor), name
    packed = hf_tensors(load_model(tmp_path))
    for name, tensor in hf_tensors(load_model(directory)).items():
        assert torch.equal(packed[name], tensor), name


def test_experts_are_read_one_by_one(
    models: Callable[[str], tuple[Any, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    get = SafetensorsWeights.get

    def only_small(self: SafetensorsWeights, name: str) -> Any:
        assert not holds_experts(name)
        return get(self, name)

    monkeypatch.setattr(SafetensorsWeights, "get", only_small)
    _, directory = models("mixtral")
    load_model(directory)
    load_trainable(directory)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("missing", "block_sparse_moe.experts.3.w3.weight: the weight is missing"),
        ("narrow", r"w2.weight: has shape \[64, 79\], the configuration says \[64, 80\]"),
        ("extra", "experts.4.w1.weight: is not a weight of the configured model"),
        ("twice", "is the same weight as"),
    ],
)
def test_wrong_files_are_named(
    change: str, words: str, models: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    _, directory = models("mixtral")
    tensors = load_file(directory / "model.safetensors")
    prefix = "model.layers.0.block_sparse_moe.experts."
    if change == "missing":
        del tensors[f"{prefix}3.w3.weight"]
    elif change == "narrow":
        tensors[f"{prefix}2.w2.weight"] = torch.ones(64, 79)
    elif change == "extra":
        tensors[f"{prefix}4.w1.weight"] = torch.ones(80, 64)
    else:
        tensors["model.layers.0.mlp.experts.1.w1.weight"] = torch.ones(80, 64)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    with pytest.raises(ModelFileError, match=words):
        load_model(tmp_path)


@pytest.mark.parametrize("case", ["mixtral", "qwen3 moe", "olmoe"])
def test_gguf_files_hold_the_model(case: str, tmp_path: Path) -> None:
    config = config_of(case)
    assert config.experts is not None
    config = replace(config, experts=replace(config.experts, dense_layers=()))
    model = initialize(config, dtype=torch.float32)
    export_gguf(weights_of(model), tmp_path / "m.gguf", "f32", None)
    again = load_trainable(tmp_path / "m.gguf", dtype="float32")
    assert again.config.experts == config.experts
    assert again.config.model_type == config.model_type
    for name, tensor in model.weights().items():
        assert torch.equal(again.weights()[name], tensor), name
    packed = hf_tensors(load_model(tmp_path / "m.gguf", dtype="float32"))
    for name, tensor in hf_tensors(model).items():
        assert torch.equal(packed[name], tensor), name


def test_quantized_experts_stay_packed_and_train_adapters(tmp_path: Path) -> None:
    config = replace(config_of("qwen3 moe"), hidden_size=64, intermediate_size=96)
    assert config.experts is not None
    experts = replace(config.experts, moe_intermediate_size=32, dense_layers=())
    model = initialize(replace(config, experts=experts), dtype=torch.float32)
    export_gguf(weights_of(model), tmp_path / "m.gguf", "q8_0", None)
    loaded = load_trainable(tmp_path / "m.gguf")
    packs = [pack for layer in loaded.model.layers for pack in layer.mlp.experts.packs()]
    assert {pack.format for pack in packs} == {"q8_0"} and len(packs) == 6
    wanted = weights_of(open_weights(tmp_path / "m.gguf"))
    got = weights_of(loaded)
    for name in loaded.config.weight_shapes():
        if holds_experts(name):
            assert torch.equal(got.values(name), wanted.values(name)), name
    with pytest.raises(ValueError, match=r"q8_0.*Hugging Face directory cannot"):
        save_pretrained(loaded, tmp_path / "hf")
    parameters = add_lora(loaded, LoraConfig(r=4))
    documents = batch_of(random_documents((30,)))
    first = 0.0
    for _ in range(12):
        loss = loaded.loss(*documents, reduction="mean")
        loss.backward()
        first = first or loss.item()
        with torch.no_grad():
            for parameter in parameters:
                parameter -= 0.02 * parameter.grad.sign().to(parameter.dtype)
                parameter.grad = None
    assert loss.item() < 0.8 * first


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        ("qwen3 moe", {}, r"dense_layers=\(1,\) has no GGUF form in architecture 'qwen3moe'"),
        ("olmoe", {"renormalize": True}, "renormalize=True has no GGUF form"),
        ("deepseek v2 experts", {}, "'deepseek_v2' cannot be exported to GGUF"),
    ],
)
def test_what_gguf_cannot_say_is_refused(
    case: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    config = config_of(case)
    assert config.experts is not None
    config = replace(config, experts=replace(config.experts, **changes))
    with pytest.raises(ValueError, match=words):
        export_gguf(weights_of(initialize(config)), tmp_path / "m.gguf", "f32", None)


# generation


@families
def test_greedy_answers_are_those_of_transformers(
    family: str, models: Callable[[str], tuple[Any, Path]]
) -> None:
    theirs, directory = models(family)
    prompts = [PROMPT[:n] for n in (5, 33, 40)]
    llm = LLM(directory, dtype="float32", max_num_batched_tokens=24)
    greedy = SamplingParams(temperature=0.0, max_tokens=16, detokenize=False, ignore_eos=True)
    answers = [out.outputs[0].token_ids for out in llm.generate(prompts, greedy)]
    for ids, answer in zip(prompts, answers, strict=True):
        given = torch.tensor([ids])
        want = theirs.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=16, do_sample=False
        )
        assert answer == want[0, len(ids) :].tolist()


def chosen(llm: LLM, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """Sampled ids and their log-probabilities."""
    params = SamplingParams(
        temperature=1.0, seed=3, max_tokens=9, detokenize=False, logprobs=0, ignore_eos=True
    )
    outs = [out.outputs[0] for out in llm.generate(prompts, params)]
    return [
        (o.token_ids, [e[t].logprob for t, e in zip(o.token_ids, o.logprobs, strict=True)])
        for o in outs
    ]


@pytest.mark.parametrize(
    ("family", "dtype"),
    some(
        [("qwen3_moe", "float32"), ("olmoe", "bfloat16"), ("deepseek_v3", "bfloat16")],
        *((family, "float32") for family in FAMILIES if family != "qwen3_moe"),
        *((family, "bfloat16") for family in ("mixtral", "qwen3_moe", "deepseek_v2")),
    ),
)
def test_bits_do_not_depend_on_graphs_batches_or_chunks(
    family: str, dtype: str, models: Callable[[str], tuple[Any, Path]]
) -> None:
    _, directory = models(family)
    prompts = [PROMPT, PROMPT[3:9], PROMPT[:1]]
    llm = LLM(directory, dtype=dtype, max_num_batched_tokens=20)
    answers = chosen(llm, prompts)
    assert answers == chosen(LLM(directory, dtype=dtype, enforce_eager=True), prompts)
    assert answers == [chosen(llm, [prompt])[0] for prompt in prompts]
    for prompt, (ids, logprobs) in zip(prompts, answers, strict=True):
        logits = llm.logits(prompt + ids)[len(prompt) - 1 : -1]
        assert logprobs == log_probs(logits, torch.tensor(ids)[:, None])[:, 0].tolist()


def test_a_captured_step_is_native_throughout(models: Callable[[str], tuple[Any, Path]]) -> None:
    llm = LLM(models("qwen3_moe")[1])
    chosen(llm, [PROMPT])
    (step,) = llm._engine.runner._steps.values()
    names = step._run.__self__.names()
    assert names.count("quant_moe") == names.count("moe_gate") == 2  # of three layers
    assert names[-1] == "sampling"


# training


@families
def test_gradients_are_those_of_transformers(
    family: str, models: Callable[[str], tuple[Any, Path]]
) -> None:
    theirs, directory = models(family)
    documents = random_documents((33, 12))
    theirs.zero_grad()
    loss = sum(
        torch.nn.functional.cross_entropy(
            theirs(torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]), reduction="sum"
        )
        for ids in documents
    )
    loss.backward()
    ours = load_trainable(directory, dtype="float32")
    found = ours.loss(*batch_of(documents))
    found.backward()
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)
    for name, parameter in theirs.named_parameters():
        got = in_file_order(ours.weights()[name].grad, name, ours.config)
        assert got is not None, name
        error = float((got - parameter.grad).norm() / parameter.grad.norm())
        assert error < 1e-3, (name, error)


@pytest.mark.parametrize("case", SPARSE)
def test_float32_gradients_are_those_of_float64_autograd(case: str) -> None:
    model, documents = model_of(case, torch.float32), random_documents((33, 1, 70))
    exact = {n: p.detach().double() for n, p in model.weights().items()}
    for tensor in exact.values():
        tensor.requires_grad_()
    wanted = plain_loss(model.config, exact, documents)
    wanted.backward()
    for checkpoint in (False, True)[: 2 if case == "qwen3 moe" else 1]:
        model.zero_grad()
        loss = model.loss(*batch_of(documents), checkpoint=checkpoint)
        loss.backward()
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=0)
        for name, parameter in model.named_parameters():
            want = exact[name].grad
            error = float((parameter.grad.double() - want).norm() / want.norm())
            assert error < 1e-4, (name, error)


@pytest.mark.parametrize(
    ("case", "dtype"),
    some(
        [("mixtral", torch.float32), ("qwen3 moe", torch.bfloat16)],
        ("olmoe", torch.float32),
        ("olmoe", torch.bfloat16),
        ("mixtral", torch.bfloat16),
        ("qwen3 moe", torch.float32),
    ),
)
def test_generation_has_trainings_log_probs_after_every_step(case: str, dtype: torch.dtype) -> None:
    model = model_of(case, dtype)
    llm = LLM.from_model(model, max_model_len=128, max_num_seqs=4, max_num_batched_tokens=16)
    optimizer = AdamW([{"params": list(model.parameters()), "lr": 0.02}])
    prompts = random_documents((5, 61, 1), seed=3)
    seen: list[object] = []
    for step in range(2):
        answers = chosen(llm, prompts)
        assert answers not in seen
        seen.append(answers)
        whole = [prompt + ids for prompt, (ids, _) in zip(prompts, answers, strict=True)]
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                logp, _ = model.log_probs(*batch_of(whole))
            rows = logp.split([len(ids) for ids in whole])
            for ids, (new, got), own in zip(whole, answers, rows, strict=True):
                assert got == own[len(ids) - len(new) - 1 : -1].tolist(), f"gradients {grad}"
        model.loss(*batch_of(random_documents((40, 24), seed=step))).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.weights_changed()
    # of 1, 2 and 4 slots: weights changed in place, and nothing was captured anew
    assert len(llm._engine.runner._steps) <= 3


def test_generation_follows_a_routers_bias() -> None:
    model = model_of("deepseek v3 experts", torch.float32)
    llm = LLM.from_model(model, max_model_len=128)
    before = chosen(llm, [PROMPT])
    with torch.no_grad():
        model.model.layers[1].mlp.gate.e_score_correction_bias.add_(torch.arange(8.0))
    after = chosen(llm, [PROMPT])  # the captured steps read the buffer
    assert after != before
    assert after == chosen(LLM.from_model(model, enforce_eager=True), [PROMPT])


@pytest.mark.parametrize(
    "case",
    some(["qwen3 moe", "deepseek v3 experts"], ["mixtral"], ["olmoe"], ["deepseek v2 experts"]),
)
def test_a_model_learns_a_batch_by_heart(case: str) -> None:
    model = initialize(config_of(case), dtype=torch.bfloat16)
    batch = batch_of(random_documents((24, 24)))
    optimizer = AdamW([{"params": list(model.parameters()), "lr": 0.02}])
    losses = []
    for _ in range(25):
        loss = model.loss(*batch, reduction="mean")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 4 and losses[-1] < 0.5, losses[::6]


def test_fresh_experts_do_not_depend_on_one_another() -> None:
    config = config_of("mixtral")
    fewer = replace(config, experts=replace(config.experts, num_experts=3))
    all_weights = initialize(config, seed=1).weights()
    for name, tensor in initialize(fewer, seed=1).weights().items():
        if holds_experts(name):
            assert torch.equal(tensor, all_weights[name][:3]), name
    gate_up = all_weights["model.layers.0.mlp.experts.gate_up_proj"].float()
    down = all_weights["model.layers.0.mlp.experts.down_proj"].float()
    deviation = (0.4 / config.hidden_size) ** 0.5
    assert gate_up.std().item() == pytest.approx(deviation, rel=0.02)
    assert down.std().item() == pytest.approx(deviation / 2, rel=0.02)  # two layers
    assert not torch.equal(gate_up[0], gate_up[1])


def test_gradients_of_bfloat16_experts_are_collected_in_float32() -> None:
    model = initialize(config_of("olmoe"), dtype=torch.bfloat16)
    model.loss(*batch_of(random_documents((20,)))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name


# adapters


@pytest.mark.parametrize("case", ["mixtral", "deepseek v2 experts"])
def test_adapters_train_on_attention_and_shared_parts(case: str, tmp_path: Path) -> None:
    model = model_of(case, torch.bfloat16)
    parameters = add_lora(model, LoraConfig(r=4, alpha=8), seed=1)
    names = {name.rpartition(".")[2] for name, _ in adapted(model)}
    shared = {"gate_proj", "up_proj", "down_proj"} if "deepseek" in case else set()
    assert names >= {"o_proj", *shared}
    assert not any(".experts." in name for name, _ in adapted(model))
    llm = LLM.from_model(model, max_model_len=128)
    for step in range(2):
        ((ids, got),) = chosen(llm, [PROMPT])
        if "deepseek" not in case:
            logp, _ = model.log_probs(*batch_of([PROMPT + ids]))
            assert got == logp[len(PROMPT) - 1 : -1].tolist()
        model.loss(*batch_of(random_documents((30,), seed=step))).backward()
        with torch.no_grad():
            for parameter in parameters:
                parameter -= 0.05 * parameter.grad.sign().to(parameter.dtype)
                parameter.grad = None
    save_adapter(model, tmp_path)
    again = model_of(case, torch.bfloat16)
    load_adapter(again, tmp_path)
    assert lora_parameters(again).keys() == lora_parameters(model).keys()
    with torch.no_grad():
        documents, _ = batch_of([PROMPT])
        assert torch.equal(again.train_hidden(documents), model.train_hidden(documents))


@pytest.mark.parametrize("target", ["experts", "gate_up_proj", "mlp.gate", "experts.0.up_proj"])
def test_experts_and_routers_take_no_adapter(target: str) -> None:
    model = model_of("mixtral", torch.float32)
    with pytest.raises(ValueError, match=f"{target}.*Experts and routers take none"):
        add_lora(model, LoraConfig(target_modules=("q_proj", target)))
    assert {name.rpartition(".")[2] for name, _ in adapted(model)} == set()


def test_a_config_without_generation_tokens_is_saved_as_it_is(tmp_path: Path) -> None:
    model = initialize(config_of("deepseek v3 experts"), dtype=torch.float32)
    save_pretrained(model, tmp_path / "m")
    saved = json.loads((tmp_path / "m" / "config.json").read_text())
    assert saved["num_nextn_predict_layers"] == 0 and saved["first_k_dense_replace"] == 1
    assert load_model(tmp_path / "m").config == replace(model.config, dtype=torch.float32)
