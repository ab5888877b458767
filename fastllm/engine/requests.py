"""Makes requests of prompts and parameters: encoded, checked, numbered."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Sequence

from torch import Tensor

from fastllm.engine.arguments import Params, Prompt, params_of
from fastllm.engine.request import MAX_BANNED, SamplingParams
from fastllm.engine.sequence import Request
from fastllm.models.config import ModelConfig
from fastllm.models.tokenizer import Tokenizer


class Requests:
    """What is asked of a model with `config`, of at most `max_model_len` tokens.

    tokenizer: gives it, or raises; asked for when text is read or made.
    """

    def __init__(
        self, config: ModelConfig, max_model_len: int, tokenizer: Callable[[], Tokenizer]
    ) -> None:
        self.config = config
        self.max_model_len = max_model_len
        self._tokenizer = tokenizer
        self._numbers = itertools.count()

    def make(
        self, prompts: Sequence[Prompt], sampling_params: Params, *, add_special_tokens: bool = True
    ) -> list[Request]:
        """A request for each prompt. Raises TypeError or ValueError naming the prompt."""
        params = params_of(sampling_params, len(prompts))
        return [
            self.make_one(prompt, p, f"prompt {i}", add_special_tokens=add_special_tokens)
            for i, (prompt, p) in enumerate(zip(prompts, params, strict=True))
        ]

    def make_one(
        self, prompt: Prompt, params: SamplingParams, name: str, *,
        add_special_tokens: bool = True, request_id: str | None = None,
    ) -> Request:  # fmt: skip
        """The request of one prompt, `name` in messages."""
        text = prompt if isinstance(prompt, str) else None
        if text is not None:
            ids = self._encode(text, name, add_special_tokens)
        else:
            ids = list(prompt)  # type: ignore[arg-type]
        ids = self.check_ids(ids, name, self.max_model_len - 1)
        tokenizer = self._tokenizer() if params.detokenize else None
        ends = {*self.config.eos_token_ids, *(tokenizer.eos_token_ids if tokenizer else ())}
        ends = set() if params.ignore_eos else {end for end in ends if end < self.config.vocab_size}
        room = self.max_model_len - len(ids)
        self._check_params(params, len(ends), name)
        return Request(
            request_id=str(next(self._numbers)) if request_id is None else request_id,
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
            return self._tokenizer().encode(text, add_special_tokens=add_special_tokens)
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

    def check_ids(self, ids: Sequence[int], name: str, longest: int) -> list[int]:
        """Token ids as a list. Raises TypeError or ValueError, naming them, unless the model can
        read them and they are at most `longest`."""
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
