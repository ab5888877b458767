"""Tiny models on disk, loaded by transformers with a `QuantConfig`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny
from transformers import AutoModelForCausalLM

from fastllm.integrations.transformers import QuantConfig


def saved(family: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    tiny(family, dtype, **changes).save_pretrained(folder / "plain")
    return folder / "plain"


def load(folder: Path, **config: Any) -> Any:
    options = {"quantization_config": QuantConfig(**config)} if config else {}
    return AutoModelForCausalLM.from_pretrained(folder, **options)
