"""A reward model as a reward: `model:DIR`, scores of answers to prompts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastllm.models.scorer import Scorer, load_scorer
from fastllm.nn.batch import Documents
from fastllm.train.data.conversations import Conversation
from fastllm.train.data.masks import ConversationEncoder
from fastllm.train.data.packing import pack_rows
from fastllm.train.data.rankings import without_end

Prompt = str | Sequence[Mapping[str, Any]]


class RewardModel:
    """A trained scorer with its tokenizer and chat template.

    A plain reward function: `model(prompts, completions)` gives a float each. A prompt is the
    user's message, or a list of messages; a completion is the assistant's, rendered with the token
    that ends it, as in training, unless its finish_reason is "length": then it was cut, and what it
    has is scored. A special token that a completion spells is a row of characters: no completion
    can end itself or begin another turn. What is longer than the context loses its beginning.

    Raises what `load_scorer` does.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, device: torch.device | str = "cpu",
        quantization: str | None = None, micro_tokens: int = 4096,
    ) -> None:  # fmt: skip
        self.scorer: Scorer = load_scorer(path, device=device, quantization=quantization)
        self.encoder = ConversationEncoder(self.scorer.tokenizer, literal=True)
        self.micro_tokens = micro_tokens
        self.__name__ = f"model:{os.fspath(path)}"

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[str],
        finish_reasons: Sequence[str] | None = None, **columns: Any,
    ) -> list[float]:  # fmt: skip
        """A score for each pair. finish_reasons: of the completions; default: "stop".

        Raises DataError if the template refuses a message."""
        conversations = [
            _conversation(prompt, completion, number)
            for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        examples = self.encoder.encode(conversations)
        reasons = finish_reasons or ["stop"] * len(conversations)
        whole = [
            without_end(example) if reason == "length" else example
            for example, reason in zip(examples, reasons, strict=True)
        ]
        most = self.scorer.decoder.max_positions
        return self.scores([torch.from_numpy(example.ids[-most:]) for example in whole])

    @torch.no_grad()
    def scores(self, documents: Sequence[Sequence[int] | Tensor]) -> list[float]:
        """The score of each document of token ids."""
        found = [0.0] * len(documents)
        lengths = [len(document) for document in documents]
        for row in pack_rows(lengths, max([self.micro_tokens, *lengths])):
            packed = Documents.pack([documents[i] for i in row], self.scorer.device)
            for i, score in zip(row, self.scorer.last_scores(packed).tolist(), strict=True):
                found[i] = score
        return found


def _conversation(prompt: Prompt, completion: str, number: int) -> Conversation:
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    messages = [*map(dict, before), {"role": "assistant", "content": completion}]
    return Conversation(
        messages=messages, answers=(len(messages) - 1,), file="reward model",
        record=f"sample {number}",
    )  # fmt: skip
