"""What `LLM` is given, checked: prompts, parameters, lengths, dtypes and memory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastllm.engine.cache import PAGE_SIZE, page_bytes, pages_for
from fastllm.engine.request import SamplingParams
from fastllm.errors import ModelFileError
from fastllm.models.config import ModelConfig
from fastllm.models.loader import DTYPES

Prompt = str | Sequence[int]
Params = SamplingParams | Sequence[SamplingParams] | None

_CACHE_DTYPES = DTYPES | {
    "float16": torch.float16,
    "fp16": torch.float16,
    "f16": torch.float16,
    "int8": torch.int8,
}
# The part of a CPU's cache that pages without a user may take: for each of them another is written
# for the first time, which costs faults (SmolLM2: 30 ms of a prompt of 512 tokens that takes 150).
_KEPT_SHARE = 32
_BATCHED_TOKENS = {"cpu": 512, "cuda": 8192}  # in one forward: enough to be compute-bound


def batched_tokens(asked: int | None, device: torch.device) -> int:
    """Prompt tokens in one forward: what was asked for, or the device's default."""
    if asked is None:
        return _BATCHED_TOKENS[device.type]
    check_count("max_num_batched_tokens", asked, 1 << 20)
    return asked


def as_list(prompts: Any) -> list[Prompt]:
    """One prompt or several -> a list of prompts."""
    if isinstance(prompts, Tensor):
        prompts = prompts.tolist()
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, bytes | Mapping) or not isinstance(prompts, Sequence):
        raise TypeError(
            "prompts must be a string, a list of token ids, or a list of those, got "
            f"{type(prompts).__name__}"
        )
    if prompts and all(isinstance(p, int) and not isinstance(p, bool) for p in prompts):
        return [list(prompts)]
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, bytes | Mapping) or not isinstance(prompt, str | Sequence | Tensor):
            raise TypeError(
                f"prompt {i} must be a string or a list of token ids, got {type(prompt).__name__}"
            )
    return [p.tolist() if isinstance(p, Tensor) else p for p in prompts]


def params_of(params: Params, count: int) -> list[SamplingParams]:
    """The parameters of each of `count` prompts. Raises TypeError or ValueError."""
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    params = list(params)
    for p in params:
        if not isinstance(p, SamplingParams):
            raise TypeError(f"sampling_params must hold SamplingParams, got {type(p).__name__}")
    if len(params) != count:
        raise ValueError(f"there are {count} prompts and {len(params)} sampling_params")
    return params


def check_head_dims(config: ModelConfig, path: str | os.PathLike[str]) -> None:
    """Raise ModelFileError, naming `path`, unless attention's kernels serve these heads."""
    sizes = {"head_dim": config.head_dim}
    most = 512
    if config.mla is not None:
        rank, width = config.mla.kv_lora_rank, config.mla.cache_width
        sizes, most = {"kv_lora_rank": rank, "kv_lora_rank + qk_rope_head_dim": width}, 576
    for name, size in sizes.items():
        if size % 8 or size > most:
            raise ModelFileError(
                path, name, f"{size} has no attention kernel: multiples of 8 up to {most} do",
                "Pass enforce_eager=True to run plain PyTorch attention, which is slow"
            )  # fmt: skip


def check_count(name: str, value: Any, most: int) -> None:
    """Raise TypeError or ValueError unless `value` is an integer from 1 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r:.80}")
    if not 1 <= value <= most:
        raise ValueError(f"{name} must be from 1 to {most}, got {value}")


def cache_dtype(name: str, compute: torch.dtype, config: ModelConfig) -> torch.dtype:
    """The dtype of the KV cache of a model that computes in `compute`."""
    if name == "auto":
        return compute
    dtype = _CACHE_DTYPES.get(str(name).removeprefix("torch."))
    if dtype is None:
        raise ValueError(
            f"kv_cache_dtype must be 'auto', 'bf16', 'fp16', 'fp32' or 'int8', got {name!r:.80}"
        )
    if dtype == torch.int8 and config.mla is not None:
        raise ValueError(
            "kv_cache_dtype 'int8' is for keys and values; the latents of this model are small as "
            "they are: use 'auto'"
        )
    if dtype not in (compute, torch.int8):
        raise ValueError(
            f"kv_cache_dtype {name!r} does not fit dtype {compute}: queries and keys have one "
            "dtype. Use 'auto' or 'int8', or load with another dtype"
        )
    return dtype


def cache_budget(device: torch.device, path: str | os.PathLike[str] | None) -> float:
    """Bytes that the KV cache may come to take. path: of weights yet to be loaded."""
    if device.type == "cuda":
        files: list[str | os.PathLike[str]] = []
        if path is not None:
            files = [path] if os.path.isfile(path) else [e.path for e in os.scandir(path)]
        weights = sum(os.path.getsize(file) for file in files)
        return 0.8 * (torch.cuda.mem_get_info(device)[0] - weights)
    return 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # mapped when written


def context_length(config: ModelConfig, asked: int | None, pages: int) -> int:
    """max_model_len: what was asked for, or the model's own length as far as `pages` allow."""
    affordable = pages * PAGE_SIZE
    if asked is None:
        if affordable < PAGE_SIZE:
            raise ValueError("there is no memory for a KV cache: free some, or use a smaller model")
        return min(config.max_position_embeddings, affordable)
    if isinstance(asked, bool) or not isinstance(asked, int):
        raise TypeError(f"max_model_len must be an integer, got {asked!r}")
    if not 2 <= asked <= config.max_position_embeddings:
        raise ValueError(
            f"max_model_len must be from 2 to {config.max_position_embeddings}, the positions that "
            f"the model was made for, got {asked}"
        )
    if asked > affordable:
        raise ValueError(
            f"max_model_len {asked} needs more memory for the KV cache than there is: at most "
            f"{max(affordable, 0)} fit"
        )
    return asked


@dataclass(frozen=True, slots=True)
class CachePlan:
    """dtype, longest sequence and pages of a KV cache; most_kept: see `PagePool`."""

    dtype: torch.dtype
    max_model_len: int
    pages: int
    most_kept: int | None


def plan_cache(
    config: ModelConfig, compute: torch.dtype, device: torch.device, *, kv_cache_dtype: str,
    max_model_len: int | None, max_num_seqs: int, num_pages: int | None,
    path: str | os.PathLike[str] | None,
) -> CachePlan:  # fmt: skip
    """How large a cache is made of what `LLM` was asked for and the memory that there is.

    path: of weights yet to be loaded. Raises TypeError or ValueError naming the argument.
    """
    dtype = cache_dtype(kv_cache_dtype, compute, config)
    if num_pages is not None:
        check_count("num_pages", num_pages, 1 << 24)
        longest = context_length(config, max_model_len, num_pages)
        return CachePlan(dtype, longest, num_pages, None)
    affordable = int(cache_budget(device, path) // page_bytes(config, dtype)) - 1
    longest = context_length(config, max_model_len, affordable)
    pages = min(max_num_seqs * pages_for(longest), affordable) + 1
    kept = affordable // _KEPT_SHARE if device.type == "cpu" else None
    return CachePlan(dtype, longest, pages, kept)
