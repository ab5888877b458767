"""`LLM`: a model that answers. The names and meanings are vLLM's."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastllm.engine.arguments import (
    CachePlan,
    Params,
    Prompt,
    as_list,
    batched_tokens,
    check_count,
    check_head_dims,
    plan_cache,
)
from fastllm.engine.cache import PagedCache, pages_for
from fastllm.engine.core import Engine
from fastllm.engine.inbox import Inbox
from fastllm.engine.request import RequestOutput
from fastllm.engine.requests import Requests
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
        enable_prefix_caching: keep the pages of prompts and answers for later requests that begin
            with the same tokens, until the pages are needed or the weights change. The samples of
            one prompt share its pages in any case. It changes no bit of an answer (on a GPU: in
            batch-invariant mode).
        num_pages: of the KV cache, each of 64 tokens; default what all samples may need, as far as
            memory allows. With fewer the youngest samples give way to older ones and go on later.
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
        enable_prefix_caching: bool = True,
        num_pages: int | None = None,
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
        plan = plan_cache(
            source.config, compute, where, kv_cache_dtype=kv_cache_dtype,
            max_model_len=max_model_len, max_num_seqs=max_num_seqs, num_pages=num_pages,
            path=source.path,
        )  # fmt: skip
        loaded = load_model(source, compute, where, mode, plan.max_model_len, quantization)
        if adapter is not None:
            load_adapter(loaded, adapter)
            loaded.requires_grad_(False)
        self._serve(loaded, plan, max_num_seqs, batched, not enforce_eager, enable_prefix_caching)
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
        enable_prefix_caching: bool = True,
        num_pages: int | None = None,
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
        known = replace(
            model.config,
            max_position_embeddings=min(model.config.max_position_embeddings, model.max_positions),
        )
        plan = plan_cache(
            known, model.dtype, where, kv_cache_dtype=kv_cache_dtype, max_model_len=max_model_len,
            max_num_seqs=max_num_seqs, num_pages=num_pages, path=None,
        )  # fmt: skip
        llm = cls.__new__(cls)
        llm._serve(model, plan, max_num_seqs, batched, not enforce_eager, enable_prefix_caching)
        llm._tokenizer = partial(_given_tokenizer, tokenizer)
        if any(p.requires_grad for p in model.parameters()):
            model.pack_()
        return llm

    def _serve(
        self, model: Decoder, plan: CachePlan, max_num_seqs: int, batched_tokens: int,
        graphs: bool, prefix_caching: bool,
    ) -> None:  # fmt: skip
        if model.config.scalar_head:
            raise ValueError(
                "a model with a scalar head gives scores, not text: it is a reward (model:DIR)"
            )
        self.model = model
        self.config: ModelConfig = model.config
        self.max_model_len = plan.max_model_len
        self._engine = Engine(
            model,
            PagedCache(self.config, plan.pages, plan.dtype, model.device, plan.most_kept),
            max_seqs=max_num_seqs,
            max_pages=pages_for(plan.max_model_len),
            max_batched_tokens=batched_tokens,
            graphs=graphs,
            prefix_caching=prefix_caching,
        )
        self._requests = Requests(self.config, plan.max_model_len, lambda: self.tokenizer)

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
        return self._run(self._requests.make(as_list(prompts), sampling_params), stream)

    def generate_until(
        self, stopping: Callable[[], bool], prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
    ) -> list[RequestOutput]:  # fmt: skip
        """As `generate`, asking `stopping` after every step: once it is true, samples that have not
        ended are given as they are, with the finish_reason "abort".

        A stream could be stopped too, but makes the outputs of all samples anew at every token.
        """
        requests = self._requests.make(as_list(prompts), sampling_params)
        steps = self._steps(requests, Inbox())
        try:
            for _ in steps:
                if stopping():
                    break
        finally:
            steps.close()
        return self._engine.outputs(requests)

    def generate_as_finished(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None
    ) -> Iterator[tuple[int, RequestOutput]]:
        """As `generate`, giving (number of the prompt, its output) once all of its samples have
        ended, in the order in which prompts end; closing the iterator stops the generation.
        """
        return self._endings(self._requests.make(as_list(prompts), sampling_params))

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
        requests = self._requests.make(prompts, sampling_params, add_special_tokens=False)
        return self._run(requests, stream)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits of every position of a token sequence, float32 `[len(ids), vocab]`."""
        self._engine.refresh()
        return self._engine.logits(self._requests.check_ids(ids, "ids", self.max_model_len))

    def reset_prefix_cache(self) -> None:
        """Forget the pages that are kept for later requests.

        Changed weights do so by themselves: those of an optimizer step, `load_state_dict`, adapters
        and whatever else torch counts. After other writes, to `parameter.data` for example, call
        `Decoder.weights_changed`.
        """
        self._engine.reset_prefix_cache()

    def _run(
        self, requests: list[Request], stream: bool
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        if stream:
            return self._increments(requests)
        for _ in self._steps(requests, Inbox()):
            pass
        return self._engine.outputs(requests)

    def _increments(self, requests: list[Request]) -> Iterator[RequestOutput]:
        inbox = Inbox()
        steps = self._steps(requests, inbox)
        try:
            for _ in steps:
                yield from self._engine.news(inbox)
            yield from self._engine.news(inbox)  # what steps for other callers have added
        finally:
            steps.close()

    def _endings(self, requests: list[Request]) -> Iterator[tuple[int, RequestOutput]]:
        numbers = {request: number for number, request in enumerate(requests)}
        inbox = Inbox()
        steps = self._steps(requests, inbox)
        try:
            for _ in chain(steps, [None]):  # steps for other callers may have ended the last ones
                for request, output in self._engine.ended(inbox):
                    yield numbers[request], output
        finally:
            steps.close()

    def _steps(self, requests: list[Request], inbox: Inbox) -> Generator[None]:
        """Step the engine until all requests are finished; yields after each step."""
        self._engine.refresh()
        self._engine.add(requests, inbox)
        try:
            while inbox.unfinished:
                self._engine.step()
                if inbox.error is not None:
                    raise inbox.error
                yield
        finally:
            for request in requests:
                self._engine.abort(request)


def _given_tokenizer(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise ValueError(
            "this LLM was made without a tokenizer: give prompts as token ids and "
            "SamplingParams(detokenize=False), or pass a tokenizer to LLM.from_model"
        )
    return tokenizer
