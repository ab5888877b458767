"""The model of a reward run as the loop sees it: the ranking loss, the order of held-out pairs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastllm.models.scorer import Scorer, with_head
from fastllm.models.weights import WeightSource
from fastllm.train import distributed
from fastllm.train.data.examples import ExampleBatches
from fastllm.train.data.masks import ConversationEncoder
from fastllm.train.data.rankings import RankedExample, RankingMicro, ranking_batches
from fastllm.train.decoder_task import DecoderTask
from fastllm.train.ranking_loss import Ordering, ordering, ranking_loss
from fastllm.train.tune_config import TuneConfig


class Rate:
    """Things a second since the first was added, until they are taken."""

    def __init__(self) -> None:
        self._count, self._began = 0, 0.0

    def add(self, count: int) -> None:
        """So many begin now."""
        if not self._count:
            self._began = time.perf_counter()
        self._count += count

    def take(self) -> float:
        """The rate; the count begins anew."""
        rate = self._count / max(time.perf_counter() - self._began, 1e-9)
        self._count = 0
        return rate


class RewardTask(DecoderTask):
    """A scorer with its rankings. margin, center: see `ranking_loss`.

    Raises what `DecoderTask` does.
    """

    name = "reward"

    def __init__(
        self,
        config: TuneConfig,
        source: WeightSource,
        encoder: ConversationEncoder,
        *,
        lr: float,
        margin: float = 0.0,
        center: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(
            config,
            with_head(source, encoder.tokenizer),
            encoder.tokenizer,
            lr=lr,
            end_ids=(),
            template=encoder.template.source,
            device=device,
        )
        self.scorer = Scorer(self.decoder)
        self.margin = margin
        self.center = center
        self._rate = Rate()
        self._held_out: Sequence[RankedExample] = ()
        self._micro_tokens = 0
        self._lines: tuple[str, ...] = ()

    def set_data(
        self,
        batches: ExampleBatches,
        held_out: Sequence[RankedExample],
        micro_tokens: int,
        lines: Sequence[str] = (),
    ) -> None:
        """What is trained on and evaluated on; `lines` say so to people."""
        self.batches = batches
        self._held_out = held_out
        self._micro_tokens = micro_tokens
        self._lines = tuple(lines)

    def describe(self) -> list[str]:
        """What is trained, on what."""
        return [*self._lines, *super().describe()]

    def loss(self, micro: RankingMicro) -> Tensor:
        """The ranking loss, summed over rankings: one forward pass over all their answers."""
        micro = micro.to(self.device)
        self._rate.add(len(micro.documents.ids))
        scores = self.scorer.scores(micro.documents, rows=micro.ends, checkpoint=self.checkpointing)
        margins = micro.margins + self.margin
        loss = ranking_loss(scores, micro.better, micro.worse, micro.weights, margins, self.center)
        return loss + 0 * scores.sum()  # a batch without pairs has gradients too: zeros

    def flops(self, micro: RankingMicro) -> float:
        """Of forward and backward."""
        return self.training_flops(len(micro.documents.ids), 0)

    def numbers(self, *, whole: bool) -> dict[str, Any]:
        """Tokens a second: the loop counts rankings, which the loss is a mean of."""
        return {"tokens_per_second": self._rate.take() * distributed.world()}

    def evaluate(self) -> dict[str, float]:
        """How held-out pairs are ordered."""
        found = self.held_out()
        return {} if found is None else found.numbers()

    def held_out(self) -> Ordering | None:
        """The order of the held-out pairs; None without any."""
        if not self._held_out:
            return None
        margins: list[float] = []
        rank, world = distributed.rank(), distributed.world()
        chosen = range(len(self._held_out))
        with self.untrained():
            for micro in ranking_batches(self._held_out, chosen, self._micro_tokens, rank, world):
                moved = micro.to(self.device)
                scores = self.scorer.scores(moved.documents, rows=moved.ends)
                margins += (scores[moved.better] - scores[moved.worse]).tolist()
        every = [value for part in distributed.gather(margins) for value in part]
        return ordering(torch.tensor(every, dtype=torch.float64))
