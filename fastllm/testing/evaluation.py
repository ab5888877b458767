"""A small model on disk for evaluations: two random layers, a tokenizer of a few words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ..models.loader import save_pretrained
from ..models.tokenizer_training import train_tokenizer
from ..models.trainable import initialize
from .small_models import config_of

_TEXTS = ("What is 12 + 34? The answer is 46.", "Question: Which of these is red?\nAnswer: a rose")


def save_small_model(folder: Path, case: str = "llama") -> Path:
    """A Hugging Face directory whose next tokens are far from equally likely."""
    tokenizer = train_tokenizer(_TEXTS * 3, 320, allow_smaller=True)
    config = replace(
        config_of(case), vocab_size=tokenizer.vocab_size, eos_token_ids=(0,), bos_token_id=0
    )
    model = initialize(config, dtype=torch.float32, seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(40.0 if "lm_head" in name else 2.5)
    save_pretrained(model, folder, tokenizer)
    return folder
