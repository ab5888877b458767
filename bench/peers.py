"""The peers of the end-to-end suites, on the same model file: transformers and llama.cpp."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastllm.models.loader import is_quantized
from fastllm.models.weights import open_weights


def has_llama_cpp() -> bool:
    """Whether llama-cpp-python is installed."""
    return find_spec("llama_cpp") is not None


def has_transformers() -> bool:
    """Whether transformers is installed."""
    return find_spec("transformers") is not None


def activation_modes(path: Path, device: str, quick: bool) -> list[str]:
    """The activation modes to measure: the default of an inference load first."""
    if not is_quantized(open_weights(path)):
        return ["bf16"]
    modes = ["int8", "bf16"] if device == "cpu" else ["bf16", "int8"]
    return modes[:1] if quick else modes


@functools.cache
def transformers_model(path: Path, dtype: torch.dtype, device: str = "cpu") -> Any:
    """The model of `path` in transformers, its weights dequantized and rounded to `dtype`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    weights = open_weights(path)
    fields = dict(weights.config.to_hf())
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(fields.pop("model_type"), **fields), dtype=dtype
    )
    state = {name: weights.get(name).to_float32().to(dtype) for name in weights.names}
    if weights.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    model.generation_config.eos_token_id = None  # it must not stop before the count is reached
    return model.to(device).eval()


def transformers_decode(model: Any, start: int, count: int) -> Callable[[], Tensor]:
    """Greedy generation of `count` tokens after one token."""
    ids = torch.tensor([[start]], device=model.device)
    return lambda: model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )


def transformers_prefill(model: Any, prompts: Callable[[], list[int]]) -> Callable[[], Tensor]:
    """The forward pass over a prompt with its cache, and the last row of logits."""

    @torch.no_grad()
    def run() -> Tensor:
        ids = torch.tensor([prompts()], device=model.device)
        return model(ids, use_cache=True, logits_to_keep=1).logits

    return run


def faster_dtype(path: Path, make: Callable[[Any], Callable[[], object]]) -> torch.dtype:
    """Whichever of bfloat16 and float32 runs `make(model)` faster here: the peer at its best."""
    seconds = {}
    for dtype in (torch.bfloat16, torch.float32):
        run = make(transformers_model(path, dtype))
        run()
        start = time.perf_counter()
        run()
        seconds[dtype] = time.perf_counter() - start
    return min(seconds, key=lambda dtype: seconds[dtype])


@functools.cache
def llama_cpp_model(path: Path, threads: int, context: int = 1024) -> Any:
    """llama.cpp with as many threads as we use and everything else at its default."""
    from llama_cpp import Llama

    return Llama(
        str(path),
        n_ctx=context,
        n_batch=512,
        n_ubatch=512,
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=0,
        verbose=False,
    )


def llama_cpp_decode(model: Any, start: int, count: int) -> Callable[[], list[int]]:
    """Greedy generation of `count` tokens after one token."""

    def run() -> list[int]:
        model.reset()
        stream = model.generate([start], temp=0.0)
        return [next(stream) for _ in range(count)]

    return run


def llama_cpp_prefill(model: Any, prompts: Callable[[], list[int]]) -> Callable[[], None]:
    """The forward pass over a prompt."""

    def run() -> None:
        model.reset()
        model.eval(prompts())

    return run
