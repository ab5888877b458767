"""`LLM`: a model that answers. The names and meanings are vLLM's."""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastllm.engine.cache import PAGE_SIZE, PagedCache, page_bytes, pages_for
from fastllm.engine.core import Engine
from fastllm.engine.request import MAX_BANNED, RequestOutput, SamplingParams
from fastllm.engine.sequence import Request
from fastllm.errors import ModelFileError
from fastllm.models.chat_template import CHATML, ChatTemplate
from fastllm.models.config import ModelConfig
from fastllm.models.loader import DTYPES, check_device, choose_compute, load_model
from fastllm.models.names import resolve
from fastllm.models.tokenizer import Tokenizer
from fastllm.models.weights import GGUFWeights, open_weights

Prompt = str | Sequence[int]
Params = SamplingParams | Sequence[SamplingParams] | None

_CACHE_DTYPES = DTYPES | {
    "float16": torch.float16,
    "fp16": torch.float16,
    "f16": torch.float16,
    "int8": torch.int8,
}
_BATCHED_TOKENS = {"cpu": 512, "cuda": 8192}  # in one forward: enough to be compute-bound


class LLM:
    """Loads a model and generates.

    Args:
        model: a GGUF file, a Hugging Face directory, a short name ("smollm2") or a Hugging Face id.
        dtype: "bfloat16" or "float32", what the model computes in; default see `load_model`.
        device: "cpu" (default) or "cuda".
        activation: "int8", "bf16" or "fp32": how inputs meet quantized weights.
        max_model_len: longest prompt and answer together; default the model's, or what fits in
            memory.
        kv_cache_dtype: "auto": the compute dtype; "int8": codes with a scale per token and head, in
            about half of bfloat16's memory. Names of the compute dtype ("bf16", "fp32") work too.
            Scores and sums are not rounded further, but log-probabilities over int8 keys are not
            those of training.
        max_num_seqs: how many samples decode together; more wait.
        max_num_batched_tokens: prompt tokens in one forward pass.
        enforce_eager: run decode steps op by op, without captured graphs (same bits, slower).

    Raises ModelNotFoundError, ModelFileError or ValueError naming the culprit and the remedy.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        activation: str | None = None,
        max_model_len: int | None = None,
        kv_cache_dtype: str = "auto",
        *,
        max_num_seqs: int = 32,
        max_num_batched_tokens: int | None = None,
        enforce_eager: bool = False,
    ) -> None:
        where = check_device(device)
        batched = max_num_batched_tokens
        if batched is None:
            batched = _BATCHED_TOKENS[where.type]
        _check_count("max_num_seqs", max_num_seqs, 4096)
        _check_count("max_num_batched_tokens", batched, 1 << 20)
        source = open_weights(resolve(model))
        if where.type == "cpu" and not enforce_eager:
            _check_head_dims(source.config, source.path)
        compute, mode = choose_compute(source, dtype, where, activation)
        stored = _cache_dtype(kv_cache_dtype, compute, source.config)
        self.config: ModelConfig = source.config
        self._source = source
        budget = _cache_budget(where, source.path)
        self.max_model_len = _context(self.config, max_model_len, stored, budget)
        max_pages = pages_for(self.max_model_len)
        affordable = int(budget // page_bytes(self.config, stored))
        pages = min(max_num_seqs * max_pages, max(affordable, max_pages)) + 1
        self.model = load_model(source, compute, where, mode, self.max_model_len)
        self._engine = Engine(
            self.model,
            PagedCache(self.config, pages, stored, where),
            max_seqs=max_num_seqs,
            max_pages=max_pages,
            max_batched_tokens=batched,
            graphs=not enforce_eager,
        )
        self._numbers = itertools.count()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises ModelFileError if the model's files have none."""
        if isinstance(self._source, GGUFWeights):
            return Tokenizer.from_gguf(self._source.file.metadata, file=self._source.path)
        return Tokenizer.from_hf(self._source.path)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The model's chat template, ChatML if it has none."""
        return ChatTemplate(
            self.tokenizer.chat_template or CHATML, special_tokens=self.tokenizer.special_tokens
        )

    @overload
    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None, *,
        stream: Literal[False] = False,
    ) -> list[RequestOutput]: ...  # fmt: skip
    @overload
    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None, *,
        stream: Literal[True],
    ) -> Iterator[RequestOutput]: ...  # fmt: skip
    @overload
    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None, *, stream: bool
    ) -> list[RequestOutput] | Iterator[RequestOutput]: ...
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        stream: bool = False,
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        """Continue prompts: a string, a list of token ids, or a list of those.

        sampling_params: one for all or one for each prompt. Returns a RequestOutput per prompt, in
        order; with stream=True an iterator that gives a RequestOutput each time a prompt's samples
        have grown (`outputs[i].delta` is what is new); closing it stops the generation.
        Raises TypeError or ValueError, naming the prompt, before anything runs.
        """
        return self._run(self._requests(_as_list(prompts), sampling_params, True), stream)

    @overload
    def chat(
        self, messages: Sequence[Any], sampling_params: Params = None, *,
        stream: Literal[False] = False, tools: Sequence[Mapping[str, Any]] | None = None,
        **template_variables: Any,
    ) -> list[RequestOutput]: ...  # fmt: skip
    @overload
    def chat(
        self, messages: Sequence[Any], sampling_params: Params = None, *, stream: Literal[True],
        tools: Sequence[Mapping[str, Any]] | None = None, **template_variables: Any,
    ) -> Iterator[RequestOutput]: ...  # fmt: skip
    @overload
    def chat(
        self, messages: Sequence[Any], sampling_params: Params = None, *, stream: bool,
        tools: Sequence[Mapping[str, Any]] | None = None, **template_variables: Any,
    ) -> list[RequestOutput] | Iterator[RequestOutput]: ...  # fmt: skip
    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: Params = None,
        *,
        stream: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_variables: Any,
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        """Answer a conversation, a list of {"role": ..., "content": ...}, or several of those.

        The prompt is made by the model's chat template; `tools` and further keywords are its
        variables. Otherwise as `generate`.
        """
        several = bool(messages) and not isinstance(messages[0], Mapping)
        prompts = [
            self.chat_template.render(conversation, tools=tools, **template_variables)
            for conversation in (messages if several else [messages])
        ]
        return self._run(self._requests(prompts, sampling_params, False), stream)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits of every position of a token sequence, float32 `[len(ids), vocab]`."""
        return self._engine.logits(self._check_ids(ids, "ids", self.max_model_len))

    def _requests(
        self, prompts: Sequence[Prompt], sampling_params: Params, add_special_tokens: bool
    ) -> list[Request]:
        params = _params_of(sampling_params, len(prompts))
        return [
            self._request(prompt, p, f"prompt {i}", add_special_tokens)
            for i, (prompt, p) in enumerate(zip(prompts, params, strict=True))
        ]

    def _request(
        self, prompt: Prompt, params: SamplingParams, name: str, add_special_tokens: bool
    ) -> Request:
        text = prompt if isinstance(prompt, str) else None
        if text is not None:
            ids = self._encode(text, name, add_special_tokens)
        else:
            ids = list(prompt)  # type: ignore[arg-type]
        ids = self._check_ids(ids, name, self.max_model_len - 1)
        tokenizer = self.tokenizer if params.detokenize else None
        ends = {*self.config.eos_token_ids, *(tokenizer.eos_token_ids if tokenizer else ())}
        ends = set() if params.ignore_eos else {end for end in ends if end < self.config.vocab_size}
        room = self.max_model_len - len(ids)
        self._check_params(params, len(ends), name)
        return Request(
            request_id=str(next(self._numbers)),
            prompt=text,
            prompt_ids=ids,
            params=params,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            end_ids=frozenset(ends),
            tokenizer=tokenizer,
        )

    def _encode(self, text: str, name: str, add_special_tokens: bool) -> list[int]:
        try:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def _check_params(self, params: SamplingParams, ends: int, name: str) -> None:
        stops = tuple(params.stop_token_ids or ())
        if params.min_tokens and ends + len(stops) > MAX_BANNED:
            raise ValueError(
                f"{name}: min_tokens can hold back {MAX_BANNED} ids that end an answer, and this "
                f"model's {ends} and the {len(stops)} of stop_token_ids are more: give fewer"
            )
        for token in stops:
            if token >= self.config.vocab_size:
                raise ValueError(
                    f"{name}: stop_token_ids holds {token}; the model's ids end at "
                    f"{self.config.vocab_size - 1}"
                )

    def _check_ids(self, ids: Sequence[int], name: str, longest: int) -> list[int]:
        if isinstance(ids, Tensor):
            ids = ids.tolist()
        ids = list(ids)
        if not ids:
            raise ValueError(f"{name} is empty: give at least one token, such as the bos token")
        if len(ids) > longest:
            raise ValueError(
                f"{name} has {len(ids)} tokens, more than the {longest} that fit in a context of "
                f"{self.max_model_len}: shorten it, or load with a larger max_model_len"
            )
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int):
                raise TypeError(f"{name} must hold integer token ids, got {token!r:.80}")
            if not 0 <= token < self.config.vocab_size:
                raise ValueError(
                    f"{name}: token id {token} is outside [0, {self.config.vocab_size})"
                )
        return ids

    def _run(
        self, requests: list[Request], stream: bool
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        if stream:
            return self._increments(requests)
        for _ in self._steps(requests):
            pass
        return [self._engine.output(request) for request in requests]

    def _increments(self, requests: list[Request]) -> Iterator[RequestOutput]:
        lengths = [0] * len(requests)

        def grown() -> Iterator[RequestOutput]:
            for i, request in enumerate(requests):
                length = sum(len(sample.token_ids) for sample in request.samples)
                if length != lengths[i]:
                    lengths[i] = length
                    yield self._engine.output(request)

        steps = self._steps(requests)
        try:
            for _ in steps:
                yield from grown()
            yield from grown()  # what steps for other callers have added
        finally:
            steps.close()

    def _steps(self, requests: list[Request]) -> Generator[None]:
        """Step the engine until all requests are finished; yields after each step."""
        self._engine.add(requests)
        pending = requests
        try:
            while pending:
                self._engine.step()
                for request in pending:
                    if request.error is not None:
                        raise request.error
                yield
                pending = [request for request in pending if not request.finished]
        finally:
            for request in pending:
                self._engine.abort(request)


def _as_list(prompts: Any) -> list[Prompt]:
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


def _params_of(params: Params, count: int) -> list[SamplingParams]:
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


def _check_head_dims(config: ModelConfig, path: str | os.PathLike[str]) -> None:
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


def _check_count(name: str, value: Any, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r:.80}")
    if not 1 <= value <= most:
        raise ValueError(f"{name} must be from 1 to {most}, got {value}")


def _cache_dtype(name: str, compute: torch.dtype, config: ModelConfig) -> torch.dtype:
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


def _cache_budget(device: torch.device, path: str | os.PathLike[str]) -> float:
    """Bytes that the KV cache may come to take."""
    if device.type == "cuda":
        files = [path] if os.path.isfile(path) else [e.path for e in os.scandir(path)]
        weights = sum(os.path.getsize(file) for file in files)
        return 0.8 * (torch.cuda.mem_get_info(device)[0] - weights)
    return 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # mapped when written


def _context(config: ModelConfig, asked: int | None, dtype: torch.dtype, budget: float) -> int:
    """max_model_len: what was asked for, or the model's own length as far as memory allows."""
    affordable = (int(budget // page_bytes(config, dtype)) - 1) * PAGE_SIZE
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
