"""Rollouts of TRL's GRPOTrainer by our engine, on the live weights of the model in training.

    trainer = GRPOTrainer(..., rollout_func=fastllm.integrations.trl.rollout_func())

Nothing is copied to the engine between steps: it reads the trainer's parameters (on a CPU through
packed caches, made again when weights have changed). `fuse_head` speeds up the other half of a step
where trainers score labels. Written against TRL 1.16.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch

from fastllm.engine.llm import LLM
from fastllm.engine.request import MAX_SAMPLES, SamplingParams
from fastllm.integrations.live_model import LiveModel
from fastllm.integrations.trl_head import fuse_head, unfuse_head

__all__ = ["Rollout", "fuse_head", "rollout_func", "sampling_params", "unfuse_head"]

# transformers' name of a generation option -> ours
_OPTIONS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
}

Trained = Any  # a trl.GRPOTrainer
RolloutFunc = Callable[[list[Any], Trained], dict[str, list[Any]]]


def rollout_func(
    *,
    max_model_len: int | None = None,
    max_num_seqs: int = 64,
    num_pages: int | None = None,
    kv_cache_dtype: str = "auto",
    enforce_eager: bool = False,
) -> RolloutFunc:
    """A `rollout_func` for `trl.GRPOTrainer`: completions and their log-probabilities.

    It follows the trainer's settings: temperature, top_p, top_k, min_p, repetition_penalty,
    max_completion_length, generation_kwargs, chat template and ends of sequence; draws depend on
    `args.seed`, process and step alone. Prompts are tokenized as the trainer does it, messages by
    the chat template. Equal neighbours (TRL repeats a prompt num_generations times) are samples of
    one request, whose prompt is computed once. Log-probabilities are at the sampling temperature,
    before top_k, top_p and min_p, as the trainer computes its own.

    The model may be fully trained or carry a PEFT LoRA adapter, which is not merged. TRL warns that
    rollout functions are experimental; the environment variable TRL_EXPERIMENTAL_SILENCE=1 stops
    that.

    Args:
        max_model_len: longest prompt and completion together; default the model's.
        max_num_seqs: samples that decode together; more wait.
        num_pages, kv_cache_dtype, enforce_eager: as of `fastllm.LLM`.

    The function raises ValueError for families, adapters or sharded weights that the engine cannot
    represent, for images and tools, and for generation_kwargs that it does not have.
    """
    return Rollout(
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        num_pages=num_pages,
        kv_cache_dtype=kv_cache_dtype,
        enforce_eager=enforce_eager,
    )


class Rollout:
    """What `rollout_func` gives: the engine of the model that was last rolled out, and its call."""

    def __init__(self, *, max_model_len: int | None, **engine: Any) -> None:
        self._max_model_len = max_model_len
        self._options = engine
        self._live: LiveModel | None = None
        self._llm: LLM | None = None
        self._calls: tuple[tuple[Any, ...], int] = ((), 0)  # (place in the run, calls there)

    @torch.no_grad()
    def __call__(self, prompts: list[Any], trainer: Trained) -> dict[str, list[Any]]:
        """One completion for each of `prompts`, as TRL's contract has it.

        Returns `{"prompt_ids", "completion_ids", "logprobs"}`, lists of lists in the order of
        prompts; a completion holds the end of sequence that ended it.
        """
        ids = _tokenized(prompts, trainer)
        llm = self._engine(trainer)
        params = sampling_params(trainer)
        runs = [(list(key), len(list(run))) for key, run in groupby(map(tuple, ids))]
        requests = [(p, min(MAX_SAMPLES, n - i)) for p, n in runs for i in range(0, n, MAX_SAMPLES)]
        if params["temperature"] == 0.0:  # greedy samples of a prompt are all equal
            requests = [(p, 1) for p, _ in runs]
        seed = self._seed(trainer)
        made, first = [], 0
        for _, n in requests:
            made.append(SamplingParams(n=n, seed=(seed + first) % 2**62, **params))
            first += n
        outputs = llm.generate([p for p, _ in requests], made)
        samples = [sample for output in outputs for sample in output.outputs]
        if params["temperature"] == 0.0:
            samples = [s for s, (_, n) in zip(samples, runs, strict=True) for _ in range(n)]
        return {
            "prompt_ids": ids,
            "completion_ids": [list(sample.token_ids) for sample in samples],
            "logprobs": [list(sample.sampled_logprobs) for sample in samples],
        }

    def _engine(self, trainer: Trained) -> LLM:
        """The engine on the trainer's weights as they are now."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        live = self._live
        if live is None or live.model is not model or not live.current:
            self._live = self._llm = None  # its cache is freed before the next is made
            live = LiveModel(model, self._max_model_len)
            self._llm = LLM.from_model(live.decoder, max_model_len=None, **self._options)
            self._live = live
        else:
            live.refresh()
        assert self._llm is not None, "made with the live model"
        return self._llm

    def _seed(self, trainer: Trained) -> int:
        """Of the first sample; another for each call, and the same when a run is repeated."""
        place = (
            trainer.args.seed,
            trainer.accelerator.process_index,
            trainer.state.global_step,
            trainer.model.training,
        )
        count = self._calls[1] + 1 if self._calls[0] == place else 0
        self._calls = (place, count)
        digest = hashlib.blake2b(repr((place, count)).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 2


def sampling_params(trainer: Trained) -> dict[str, Any]:
    """The fields of `SamplingParams` that a GRPOTrainer's settings mean.

    Raises ValueError naming an entry of generation_kwargs that the engine does not have.
    """
    given: dict[str, Any] = {
        "temperature": trainer.temperature,
        "top_p": trainer.top_p,
        "top_k": trainer.top_k,
        "min_p": trainer.min_p,
        "repetition_penalty": trainer.repetition_penalty,
        "max_new_tokens": trainer.max_completion_length,
    }
    given |= trainer.args.generation_kwargs or {}
    if given.pop("do_sample", True) is False:
        given["temperature"] = 0.0
    unknown = [name for name in given if name not in _OPTIONS]
    if unknown:
        raise ValueError(
            f"generation_kwargs holds {unknown[0]!r}, which the engine does not have; it has "
            f"{', '.join(_OPTIONS)} and do_sample"
        )
    values = {_OPTIONS[name]: value for name, value in given.items() if value is not None}
    values.setdefault("max_tokens", None)
    values["temperature"] = float(values.get("temperature", 1.0))
    ends = tuple(trainer.eos_token_ids)
    return values | {"stop_token_ids": ends, "ignore_eos": True, "detokenize": False}


def _tokenized(prompts: Sequence[Any], trainer: Trained) -> list[list[int]]:
    """Token ids of strings or conversations, by the trainer's own tokenization."""
    if getattr(trainer, "tools", None):
        raise ValueError(
            "tools: TRL generates the turns after a tool's answer by itself, so half of a "
            "conversation would not be the engine's. Train without rollout_func, or without tools"
        )
    tokenize = getattr(trainer, "_tokenize_prompts", None)
    if tokenize is None:
        raise TypeError(
            f"{type(trainer).__name__} is no GRPOTrainer of TRL 1.16, which rollouts are written "
            "for: pip install 'trl>=1.16,<1.17'"
        )
    ids, images, extra = tokenize(list(prompts))
    if images is not None or extra:
        raise ValueError("prompts hold images, which the engine cannot read")
    return [list(row) for row in ids]
