"""Mixtral, Qwen3-MoE, OLMoE and DeepSeek with experts as transformers knows them, very small.

conftest.py loads this file under its own name: test folders are not packages. transformers is
imported where it is used, so that the folder's other tests run without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllm import LLM, SamplingParams

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
    import transformers

    name, options = FAMILIES[family]
    return getattr(transformers, f"{name}Config")(**SIZES | options | changes)


def random_model(family: str) -> Any:
    """transformers' model, weights large enough that every part of it matters."""
    import transformers

    config = theirs_of(family)
    name = f"{FAMILIES[family][0]}ForCausalLM"
    model = getattr(transformers, name)._from_config(config, experts_implementation="eager")
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            scale = 0.3 if tensor.ndim == 1 else 1.5 * tensor.shape[-1] ** -0.5
            tensor.copy_(torch.randn(tensor.shape, generator=g) * scale + float("norm" in key))
    return model.eval()


def logits_of(model: Any, ids: Sequence[int] = PROMPT) -> Tensor:
    """transformers' logits [tokens, vocabulary] of the ids."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


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
