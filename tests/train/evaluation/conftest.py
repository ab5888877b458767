"""A small model with a tokenizer and a chat template, on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastllm.models.loader import save_pretrained
from fastllm.models.tokenizer_training import train_tokenizer
from fastllm.models.trainable import initialize
from fastllm.testing.small_models import config_of

TEXTS = ["What is 12 + 34? The answer is 46.", "Question: Which of these is red?\nAnswer: a rose"]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory of two random layers whose choices are far from even."""
    folder = tmp_path_factory.mktemp("evaluation") / "model"
    tokenizer = train_tokenizer(TEXTS * 3, 320, allow_smaller=True)
    config = replace(
        config_of("llama"), vocab_size=tokenizer.vocab_size, eos_token_ids=(0,), bos_token_id=0
    )
    model = initialize(config, dtype=torch.float32, seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(40.0 if "lm_head" in name else 2.5)
    save_pretrained(model, folder, tokenizer)
    return folder
