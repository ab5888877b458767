"""Tiny random transformers models of every family that the drop-in backend knows, and inputs.

Two layers, 64 wide, 128 tokens of vocabulary; norms, biases and sinks are random too, so that one
that is forgotten shows. Windows are shorter than the inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

VOCAB = 128
WINDOW = 8  # tokens that a sliding layer sees, itself included, as transformers counts
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LAYER_TYPES = ["sliding_attention", "full_attention"]
_LONG_ROPE = {
    "rope_type": "longrope",
    "factor": 8.0,
    "rope_theta": 10_000.0,
    "short_factor": [1.0 + 0.05 * i for i in range(8)],
    "long_factor": [1.0 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": 32,
}
# family -> (names of its config class and model class without their ends, its own fields)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "smollm": (
        "Llama",
        {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "hidden_size": 96,
         "tie_word_embeddings": True},
    ),
    "mistral": ("Mistral", {"sliding_window": WINDOW, "head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "head_dim": 16,
         "norm_topk_prob": True},
    ),
    "olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 32}),
    "deepseek_v3": (
        "DeepseekV3",
        {"num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 2,
         "topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
         "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
         "v_head_dim": 16},
    ),
    "gemma2": (
        "Gemma2",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW,
         "layer_types": _LAYER_TYPES, "final_logit_softcapping": 5.0,
         "attn_logit_softcapping": 2.0},
    ),
    "gemma3": (
        "Gemma3",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW,
         "layer_types": _LAYER_TYPES},
    ),
    "phi3": (
        "Phi3",
        {"rope_parameters": _LONG_ROPE, "original_max_position_embeddings": 32},
    ),
    "gpt_oss": (
        "GptOss",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
         "sliding_window": WINDOW, "layer_types": _LAYER_TYPES,
         "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
    ),
}  # fmt: skip


def tiny_config(family: str, **changes: Any) -> Any:
    """The family's config at the smallest size that still has all of its parts."""
    stem, fields = FAMILIES[family]
    name = f"{stem}TextConfig" if stem == "Gemma3" else f"{stem}Config"
    return getattr(transformers, name)(**(_COMMON | fields | changes))


def tiny(
    family: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    attn_implementation: str | None = None,
    experts_implementation: str | None = None,
    **changes: Any,
) -> PreTrainedModel:
    """A random causal language model of `family` (a key of FAMILIES), in evaluation mode.

    Args:
        dtype: of all parameters.
        seed: equal seeds give equal weights.
        attn_implementation: as in `from_pretrained`; None: what transformers chooses.
        experts_implementation: the same, for families with experts.
        changes: fields of the config in place of the family's.
    """
    torch.manual_seed(seed)
    config = tiny_config(family, **changes)
    if family == "gemma2" and attn_implementation is None:
        attn_implementation = "eager"  # before 5.22 sdpa is chosen, which drops the soft cap
    chosen = {
        "attn_implementation": attn_implementation,
        "experts_implementation": experts_implementation,
    }
    model = getattr(transformers, f"{FAMILIES[family][0]}ForCausalLM")._from_config(
        config, **{k: v for k, v in chosen.items() if v is not None}
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "bias" in name:  # norms, biases, sinks
                parameter.add_(0.2 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(0.1 * torch.randn_like(buffer))
    return model.to(dtype).eval()


def inputs(
    lengths: tuple[int, ...] = (24, 17), padding: str = "left", seed: int = 0
) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels` `[len(lengths), max(lengths)]`, padded.

    Args:
        lengths: valid tokens of each sequence.
        padding: "left" or "right"; padded places hold id 0, mask 0 and label -100.
    """
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(3, VOCAB, (len(lengths), width), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, slice(width - length, width) if padding == "left" else slice(length)] = 1
    ids = ids * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
