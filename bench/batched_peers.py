"""Batched generation by the peers: transformers' continuous batching and llama.cpp's batches."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

Prompts = Sequence[Sequence[int]]


def generate_batch(model: Any, prompts: Prompts, count: int) -> Callable[[], Any]:
    """Greedy continuation of all prompts by `count` tokens, through transformers' own scheduler."""
    from transformers import GenerationConfig

    settings = GenerationConfig(
        max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    inputs = [list(prompt) for prompt in prompts]
    return lambda: model.generate_batch(inputs, generation_config=settings, warmup=False)


def generate_padded(model: Any, prompts: Prompts, count: int) -> Callable[[], Any]:
    """The same as one batch of equally long prompts, `generate`."""
    ids = torch.tensor([list(prompt) for prompt in prompts], device=model.device)
    return lambda: model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )


class LlamaCppBatch:
    """llama.cpp's C interface: prompts in batches of 512 tokens, then one batch a step."""

    def __init__(self, path: Path, threads: int, sequences: int, length: int) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        llama_cpp.llama_backend_init()
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = sequences * -(-length // 256) * 256  # it pads each sequence to 256
        settings.n_batch = settings.n_ubatch = 512
        settings.n_seq_max = sequences
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise MemoryError(f"llama.cpp cannot make a context of {settings.n_ctx} tokens")
        self._batch = llama_cpp.llama_batch_init(512, 0, 1)
        chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_greedy())
        self._sampler = chain

    def generate(self, prompts: Prompts, count: int) -> list[list[int]]:
        """Greedy continuation of every prompt by `count` tokens."""
        api = self._api
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        answers: list[list[int]] = [[] for _ in prompts]
        places = [
            (token, at, i, at == len(prompt) - 1)
            for i, prompt in enumerate(prompts)
            for at, token in enumerate(prompt)
        ]
        while len(answers[-1]) < count:
            for start in range(0, len(places), 512):
                self._decode(places[start : start + 512], answers)
            places = [
                (answer[-1], len(prompt) + len(answer) - 1, i, True)
                for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
            ]
        return answers

    def _decode(self, places: list[tuple[int, int, int, bool]], answers: list[list[int]]) -> None:
        """One forward pass over (token, position, sequence, wanted) and its samples."""
        batch, api = self._batch, self._api
        batch.n_tokens = len(places)
        for row, (token, position, sequence, wanted) in enumerate(places):
            batch.token[row] = token
            batch.pos[row] = position
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = sequence
            batch.logits[row] = wanted
        if api.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        for row, (_, _, sequence, wanted) in enumerate(places):
            if wanted:
                answers[sequence].append(
                    api.llama_sampler_sample(self._sampler, self._context, row)
                )

    def close(self) -> None:
        """Free everything."""
        api = self._api
        api.llama_sampler_free(self._sampler)
        api.llama_batch_free(self._batch)
        api.llama_free(self._context)
        api.llama_model_free(self._model)
