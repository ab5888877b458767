"""`LLM`: a model that answers. The names and meanings are vLLM's."""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastllm.engine.arguments import (
    Params,
    Prompt,
    as_list,
    batched_tokens,
    cache_budget,
    cache_dtype,
    check_count,
    check_head_dims,
    context_length,
    params_of,
)
from fastllm.engine.cache import PagedCache, page_bytes, pages_for
from fastllm.engine.core import Engine
from fastllm.engine.request import MAX_BANNED, RequestOutput, SamplingParams
from fastllm.engine.sequence import Request
from fastllm.models.adapters import load_adapter
from fastllm.models.chat_template import CHATML, ChatTemplate
from fastllm.models.config import ModelConfig
from fastllm.models.decoder import Decoder
from fastllm.models.loader import check_device, choose_compute, load_model, read_tokenizer
from fastllm.models.names import resolve
from fastllm.models.tokenizer import Tokenizer
from fastllm.models.weights import open_weights


class LLM:
    """Loads a model and generates.

    Args:
        model: a GGUF file, a Hugging Face directory, a short name ("smollm2") or a Hugging Face id.
        dtype: "bfloat16" or "float32", what the model computes in; default see `load_model`.
        device: "cpu" (default) or "cuda".
        activation: "int8", "bf16" or "fp32": how inputs meet quantized weights. Default: see
            `load_model`; with an adapter that of training, the compute dtype.
        max_model_len: longest prompt and answer together; default the model's, or what fits in
            memory.
        kv_cache_dtype: "auto": the compute dtype; "int8": codes with a scale per token and head, in
            about half of bfloat16's memory. Names of the compute dtype ("bf16", "fp32") work too.
            Scores and sums are not rounded further, but log-probabilities over int8 keys are not
            those of training.
        max_num_seqs: how many samples decode together; more wait.
        max_num_batched_tokens: prompt tokens in one forward pass.
        enforce_eager: run decode steps op by op, without captured graphs (same bits, slower).
        adapter: directory of a LoRA adapter in PEFT's format: put on the model, not merged.
        quantization: round the layers' matrices to this format as they are loaded ("int4", "nf4",
            "q4_k", "fp8", ...: `fastllm.ops.quant_format`). An adapter that was trained with
            `fastllm sft --quant` wants the same one. `llm.model.quantization` is the report.

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
        adapter: str | os.PathLike[str] | None = None,
        quantization: str | None = None,
    ) -> None:
        where = check_device(device)
        batched = batched_tokens(max_num_batched_tokens, where)
        check_count("max_num_seqs", max_num_seqs, 4096)
        source = open_weights(resolve(model))
        if where.type == "cpu" and not enforce_eager:
            check_head_dims(source.config, source.path)
        compute, mode = choose_compute(source, dtype, where, activation, quantization is not None)
        if adapter is not None and activation is None:
            mode = "bf16" if compute == torch.bfloat16 else "fp32"
        stored = cache_dtype(kv_cache_dtype, compute, source.config)
        budget = cache_budget(where, source.path)
        longest = context_length(source.config, max_model_len, stored, budget)
        model_of_file = load_model(source, compute, where, mode, longest, quantization)
        if adapter is not None:
            load_adapter(model_of_file, adapter)
            model_of_file.requires_grad_(False)
        self._serve(
            model_of_file, longest, stored, budget, max_num_seqs, batched, not enforce_eager
        )
        self._tokenizer: Callable[[], Tokenizer] = partial(read_tokenizer, source)

    @classmethod
    def from_model(
        cls,
        model: Decoder,
        tokenizer: Tokenizer | None = None,
        *,
        max_model_len: int | None = None,
        max_num_seqs: int = 32,
        kv_cache_dtype: str = "auto",
        max_num_batched_tokens: int | None = None,
        enforce_eager: bool = False,
    ) -> LLM:
        """Generation on the live weights of a model in training.

        Weights are not copied: every call of `generate`, `chat` or `logits` uses the parameters as
        they are when it begins. (On the CPU through packed caches, made again when the weights have
        changed: see `Decoder.weights_changed`.) Log-probabilities are those of
        `Decoder.log_probs` bit for bit.

        Args:
            model: from `initialize`, `load_trainable` or `load_model`.
            tokenizer: None: prompts are token ids, and sampling parameters say detokenize=False.
            max_model_len: longest prompt and answer together; default the model's rotary tables,
                or what fits in memory.

        The other arguments are those of `LLM`. Raises ValueError naming the argument.
        """
        where = model.device
        batched = batched_tokens(max_num_batched_tokens, where)
        check_count("max_num_seqs", max_num_seqs, 4096)
        if where.type == "cpu" and not enforce_eager:
            check_head_dims(model.config, "the model's configuration")
        stored = cache_dtype(kv_cache_dtype, model.dtype, model.config)
        budget = cache_budget(where, None)
        known = replace(
            model.config,
            max_position_embeddings=min(model.config.max_position_embeddings, model.max_positions),
        )
        longest = context_length(known, max_model_len, stored, budget)
        llm = cls.__new__(cls)
        llm._serve(model, longest, stored, budget, max_num_seqs, batched, not enforce_eager)
        llm._tokenizer = partial(_given_tokenizer, tokenizer)
        if any(p.requires_grad for p in model.parameters()):
            model.pack_()
        return llm

    def _serve(
        self, model: Decoder, max_model_len: int, cache_dtype: torch.dtype, budget: float,
        max_num_seqs: int, batched_tokens: int, graphs: bool,
    ) -> None:  # fmt: skip
        if model.config.scalar_head:
            raise ValueError(
                "a model with a scalar head gives scores, not text: it is a reward (model:DIR)"
            )
        self.model = model
        self.config: ModelConfig = model.config
        self.max_model_len = max_model_len
        max_pages = pages_for(max_model_len)
        affordable = int(budget // page_bytes(self.config, cache_dtype))
        pages = min(max_num_seqs * max_pages, max(affordable, max_pages)) + 1
        self._engine = Engine(
            model,
            PagedCache(self.config, pages, cache_dtype, model.device),
            max_seqs=max_num_seqs,
            max_pages=max_pages,
            max_batched_tokens=batched_tokens,
            graphs=graphs,
        )
        self._numbers = itertools.count()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises ModelFileError if the model's files have none, ValueError if `from_model` got none.
        """
        return self._tokenizer()

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
        return self._run(self._requests(as_list(prompts), sampling_params, True), stream)

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
        self._engine.refresh()
        return self._engine.logits(self._check_ids(ids, "ids", self.max_model_len))

    def _requests(
        self, prompts: Sequence[Prompt], sampling_params: Params, add_special_tokens: bool
    ) -> list[Request]:
        params = params_of(sampling_params, len(prompts))
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
        self._engine.refresh()
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


def _given_tokenizer(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise ValueError(
            "this LLM was made without a tokenizer: give prompts as token ids and "
            "SamplingParams(detokenize=False), or pass a tokenizer to LLM.from_model"
        )
    return tokenizer
