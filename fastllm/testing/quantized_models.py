"""Small models whose rows fit every quantized format: 256 and 512 columns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..models.config import ModelConfig
from ..models.decoder import Decoder
from ..models.loader import save_pretrained
from ..models.mla_config import MlaConfig
from ..models.tokenizer import Tokenizer
from ..models.trainable import initialize
from .small_models import config_of

HIDDEN, INNER = 256, 512


def wide_config(case: str, **sizes: Any) -> ModelConfig:
    """A configuration of `small_models`, of two layers and with wider ones."""
    config = config_of(case)
    wider: dict[str, Any] = {
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "sliding_window": (),
    }  # fmt: skip
    if config.mla is not None:
        wider |= {"num_key_value_heads": 4, "head_dim": 96}
        wider["mla"] = MlaConfig(
            q_lora_rank=256, kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32,
            v_head_dim=64,
        )  # fmt: skip
    if config.experts is not None:
        dense = (0,) if config.experts.dense_layers else ()
        inner = INNER if config.model_type == "mixtral" else HIDDEN
        wider["experts"] = replace(config.experts, moe_intermediate_size=inner, dense_layers=dense)
    return replace(config, **{**wider, **sizes})


def decoder(case: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Decoder:
    """A trainable model of such a configuration."""
    return initialize(wide_config(case), dtype=dtype, seed=seed)


def directory(case: str, folder: Path, tokenizer: Tokenizer | None = None, **sizes: Any) -> Path:
    """Its Hugging Face directory."""
    save_pretrained(initialize(wide_config(case, **sizes), seed=1), folder, tokenizer)
    return folder
