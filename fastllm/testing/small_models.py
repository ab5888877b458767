"""Small models of every kind that is trained, and documents for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.config import ModelConfig
from ..models.decoder import Decoder
from ..models.mla_config import MlaConfig
from ..models.moe_config import MoeConfig
from ..models.trainable import initialize
from ..nn.batch import Documents

VOCAB = 96
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
}  # fmt: skip
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "head_dim": 24,
    "mla": MlaConfig(
        q_lora_rank=20, kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16
    ),
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama tied, biases": {
        "model_type": "llama", "tie_word_embeddings": True, "attention_bias": True,
        "attention_output_bias": True, "mlp_bias": True,
    },
    "mistral window": {"model_type": "mistral", "sliding_window": (7, 7)},
    "qwen3 tied": {"model_type": "qwen3", "qk_norm": True, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "qk_norm": True},
    "deepseek v3": {"model_type": "deepseek_v3", **_LATENT},
}  # fmt: skip
_ROUTED: dict[str, Any] = {"num_experts": 8, "per_token": 3, "moe_intermediate_size": 40}
SPARSE: dict[str, dict[str, Any]] = {
    "mixtral": {
        "model_type": "mixtral",
        "experts": MoeConfig(
            num_experts=4, per_token=2, moe_intermediate_size=80, renormalize=True
        ),
    },
    "qwen3 moe": {
        "model_type": "qwen3_moe", "qk_norm": True, "num_hidden_layers": 3,
        "experts": MoeConfig(**_ROUTED, renormalize=True, dense_layers=(1,)),
    },
    "olmoe": {
        "model_type": "olmoe", "qk_norm_whole": True, "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "experts": MoeConfig(**_ROUTED | {"moe_intermediate_size": 80}),
    },
    "deepseek v2 experts": {
        "model_type": "deepseek_v2", **_LATENT,
        "experts": MoeConfig(
            **_ROUTED, shared=2, groups=4, kept_groups=2, scale=1.5, dense_layers=(0,)
        ),
    },
    "deepseek v3 experts": {
        "model_type": "deepseek_v3", **_LATENT,
        "experts": MoeConfig(
            **_ROUTED, shared=1, scoring="sigmoid", groups=2, kept_groups=1, group_score="top2",
            renormalize=True, scale=2.5, bias_correction=True, dense_layers=(0,),
        ),
    },
}  # fmt: skip


def config_of(case: str) -> ModelConfig:
    """The configuration of one of CONFIGS or SPARSE."""
    return ModelConfig(**{**_SIZES, **(CONFIGS | SPARSE)[case]})


def model_of(case: str, dtype: torch.dtype, seed: int = 0) -> Decoder:
    """A trainable model whose weights are large enough that every part of it matters."""
    model = initialize(config_of(case), dtype=dtype, seed=seed)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.weights().values():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=g))
            else:
                parameter.mul_(2.5)
    return model


def random_documents(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Token ids of documents of these lengths."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (n,), generator=g).tolist() for n in lengths]


def batch_of(documents: Sequence[Sequence[int]]) -> tuple[Documents, Tensor]:
    """Documents packed, and the next token of each place; the last of each has none."""
    targets = [token for ids in documents for token in (*ids[1:], -100)]
    return Documents.pack(documents), torch.tensor(targets)
