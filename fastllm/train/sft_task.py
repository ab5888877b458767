"""The model of a fine-tuning run as the loop sees it: loss, evaluation, answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastllm.engine.llm import LLM
from fastllm.engine.request import SamplingParams
from fastllm.models.weights import WeightSource
from fastllm.train import distributed
from fastllm.train.data.batch import MicroBatch
from fastllm.train.data.conversations import Conversation
from fastllm.train.data.examples import ExampleBatches, micro_batches
from fastllm.train.data.masks import ConversationEncoder, Example
from fastllm.train.decoder_task import DecoderTask
from fastllm.train.tune_config import TuneConfig

MAX_ANSWER = 128  # tokens of a sample


class SftTask(DecoderTask):
    """A model with its conversations. Raises what `DecoderTask` does."""

    name = "sft"

    def __init__(
        self,
        config: TuneConfig,
        source: WeightSource,
        encoder: ConversationEncoder,
        *,
        lr: float,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(
            config,
            source,
            encoder.tokenizer,
            lr=lr,
            end_ids=sorted(encoder.end_ids),
            template=encoder.template.source,
            device=device,
        )
        self.encoder = encoder
        self._held_out: Sequence[Example] = ()
        self._micro_tokens = 0
        self.asked: Sequence[Conversation] = ()
        self._lines: tuple[str, ...] = ()

    def set_data(
        self,
        batches: ExampleBatches,
        held_out: Sequence[Example],
        micro_tokens: int,
        asked: Sequence[Conversation] = (),
        lines: Sequence[str] = (),
    ) -> None:
        """What is trained on, evaluated on and asked; `lines` say so to people."""
        self.asked = asked
        self.batches = batches
        self._lines = tuple(lines)
        self._held_out = held_out
        self._micro_tokens = micro_tokens

    def describe(self) -> list[str]:
        """What is trained, on what."""
        return [*self._lines, *super().describe()]

    # what the loop calls

    def loss(self, micro: MicroBatch) -> Tensor:
        """The summed cross entropy of the targets that count."""
        micro = micro.to(self.device)
        return self.decoder.loss(
            micro.documents, micro.targets, "sum", checkpoint=self.checkpointing
        )

    def evaluate(self) -> dict[str, float]:
        """Loss per target of the held-out examples."""
        loss = self.held_out_loss()
        return {} if loss is None else {"eval_loss": loss}

    def flops(self, micro: MicroBatch) -> float:
        """Of forward and backward."""
        return self.training_flops(len(micro.targets), micro.tokens)

    # beside the loop

    def held_out_loss(self) -> float | None:
        """Loss per target of the held-out examples; None without any."""
        if not self._held_out:
            return None
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        rank, world = distributed.rank(), distributed.world()
        chosen = range(len(self._held_out))
        with self.untrained():
            for micro in micro_batches(self._held_out, chosen, self._micro_tokens, rank, world):
                sums[0] += self.loss(micro)
                sums[1] += micro.tokens
        total, tokens = distributed.sum_(sums).tolist()
        return total / tokens

    def sample(self) -> list[tuple[str, str]]:
        """The questions and what the live weights answer."""
        return [(question(c)[0], a) for c, a in zip(self.asked, self.answers(), strict=True) if a]

    def answers(self) -> list[str]:
        """What the live weights answer to the first question of each conversation, greedily."""
        if not self.asked or distributed.world() > 1:
            return ["" for _ in self.asked]  # sharded weights do not generate
        prompts = [self._prompt(conversation) for conversation in self.asked]
        params = SamplingParams(
            temperature=0.0, max_tokens=MAX_ANSWER, stop_token_ids=sorted(self.encoder.end_ids)
        )
        with self.untrained():
            outputs = self._llm.generate(prompts, params)
        return [output.outputs[0].text.strip() for output in outputs]

    def _prompt(self, conversation: Conversation) -> list[int]:
        turn = next(turn for turn in conversation.answers if turn)
        text = self.encoder.prompt(conversation, turn)
        room = max(self._llm.max_model_len - MAX_ANSWER, self._llm.max_model_len // 2)
        return self.tokenizer.encode(text, add_special_tokens=False)[-room:]

    @cached_property
    def _llm(self) -> LLM:
        longest = min(self.decoder.max_positions, 4096)
        return LLM.from_model(self.decoder, self.tokenizer, max_model_len=longest, max_num_seqs=4)


def question(conversation: Conversation) -> tuple[str, str]:
    """The first question that is answered, and the answer."""
    turn = next(turn for turn in conversation.answers if turn)
    return _text(conversation.messages[turn - 1]), _text(conversation.messages[turn])


def _text(message: Mapping[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
