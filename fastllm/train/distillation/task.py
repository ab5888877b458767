"""A student as the loop sees it: the divergence from its teacher, evaluation, files.

    loss = alpha T^2 D(teacher, student at temperature T) + (1 - alpha) cross entropy

summed over the learned tokens. D's gradient falls as 1 / T^2, so D is multiplied with T^2 as by
Hinton et al., 2015 (arXiv 1503.02531): alpha and the learning rate then mean the same at every T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastllm.models.tokenizer import Tokenizer
from fastllm.models.weights import WeightSource
from fastllm.ops.linear_cross_entropy import linear_cross_entropy
from fastllm.ops.linear_kl import linear_kl
from fastllm.quantize.packed import PackedWeight
from fastllm.train import distributed
from fastllm.train.data.batch import NO_LOSS, MicroBatch
from fastllm.train.data.examples import micro_batches
from fastllm.train.data.masks import Example
from fastllm.train.decoder_task import DecoderTask
from fastllm.train.distillation.teacher import StoredTeacher, Teacher
from fastllm.train.distillation.vocabulary import SharedVocabulary, narrowed
from fastllm.train.running_means import RunningMeans
from fastllm.train.task import Batches
from fastllm.train.tune_config import TuneConfig

Divergence = Literal["forward", "reverse", "js"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """What is minimized. Raises ValueError naming the field.

    divergence: "forward" KL(teacher || student) covers all that the teacher may say, "reverse"
    KL(student || teacher) seeks its likeliest, "js" is the generalized Jensen-Shannon divergence,
    between them: near forward for small beta, near reverse for beta near 1.
    """

    divergence: Divergence = "forward"
    beta: float = 0.5  # of js
    temperature: float = 1.0  # of both distributions
    alpha: float = 1.0  # weight of the divergence; 1 - alpha is that of the cross entropy

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if not 0 < self.beta < 1:
            raise ValueError(f"beta must be between 0 and 1, got {self.beta}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be from 0 to 1, got {self.alpha}")


# What is reported of held-out tokens, whatever is trained.
_MEASURE = LossConfig(alpha=0.5)


class DistillTask(DecoderTask):
    """A student with its teacher and data.

    shared: what `shared_vocabulary` says of the two. Raises what `DecoderTask` does.
    """

    name = "distill"

    def __init__(
        self,
        config: TuneConfig,
        source: WeightSource,
        tokenizer: Tokenizer,
        teacher: Teacher,
        losses: LossConfig,
        shared: SharedVocabulary,
        *,
        lr: float,
        end_ids: Sequence[int],
        template: str | None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(
            config, source, tokenizer, lr=lr, end_ids=end_ids, template=template, device=device
        )
        self.teacher = teacher
        self.shared = shared
        self.losses = losses
        self._measure = _MEASURE
        if isinstance(teacher, StoredTeacher):  # it knows one temperature
            self._measure = LossConfig(alpha=0.5, temperature=teacher.store.temperature)
        self._means = RunningMeans(("divergence", "cross_entropy"), self.device)

    def set_data(
        self,
        batches: Batches,
        train: Sequence[Example] | None,
        held_out: Sequence[Example],
        micro_tokens: int,
        lines: Sequence[str] = (),
    ) -> None:
        """What is learned from: `train` is what the sources of `batches` count, None if they count
        nothing; `lines` say so to people."""
        self.batches = batches
        self._train = train
        self._held_out = held_out
        self._micro_tokens = micro_tokens
        self._lines = tuple(lines)

    def describe(self) -> list[str]:
        """Teacher, data, what is minimized, what is trained."""
        losses = self.losses
        name = "Jensen-Shannon" if losses.divergence == "js" else f"{losses.divergence} KL"
        what = f"{name} divergence at temperature {losses.temperature:g}, weight {losses.alpha:g}"
        return [
            self.teacher.describe(), *self.shared.notes, *self._lines, what, *super().describe(),
        ]  # fmt: skip

    # what the loop calls

    def loss(self, micro: MicroBatch) -> Tensor:
        """The weighted sum of both losses over the targets that count."""
        loss, divergence, entropy = self._terms(micro, self._train, self.losses)
        self._means.add({"divergence": divergence, "cross_entropy": entropy}, micro.tokens)
        return loss

    def evaluate(self) -> dict[str, float]:
        """eval_kl: forward KL from the teacher per held-out token, at temperature 1 or that of a
        store; eval_loss: cross entropy."""
        found = self.held_out_losses()
        return {} if found is None else {"eval_kl": found[0], "eval_loss": found[1]}

    def numbers(self, *, whole: bool) -> dict[str, Any]:
        """Means per token since the line before, of the terms that have a weight."""
        found = self._means.read()
        unused = {"divergence": self.losses.alpha == 0, "cross_entropy": self.losses.alpha == 1}
        return {name: value for name, value in found.items() if not unused[name]}

    def after_update(self) -> None:
        """Adds up what is reported."""
        self._means.after_step()

    def state(self) -> dict[str, Tensor]:
        """What is reported so far."""
        return self._means.state()

    def flops(self, micro: MicroBatch) -> float:
        """Of the student's forward and backward."""
        return self.training_flops(len(micro.targets), micro.tokens)

    def identity(self) -> dict[str, Any]:
        """The student, and how many ids are compared."""
        return super().identity() | {"shared_vocabulary": self.shared.size}

    # beside the loop

    def held_out_losses(self) -> tuple[float, float] | None:
        """(forward KL, cross entropy) per held-out token; None without any."""
        if not self._held_out:
            return None
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        rank, world = distributed.rank(), distributed.world()
        chosen = range(len(self._held_out))
        with self.untrained():
            for micro in micro_batches(self._held_out, chosen, self._micro_tokens, rank, world):
                _, divergence, entropy = self._terms(micro, self._held_out, self._measure)
                sums += torch.stack([divergence, entropy, entropy.new_tensor(micro.tokens)])
        divergence, entropy, tokens = distributed.sum_(sums).tolist()
        return divergence / tokens, entropy / tokens

    def _terms(
        self, micro: MicroBatch, examples: Sequence[Example] | None, losses: LossConfig
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(what is minimized, divergence, cross entropy), sums over the targets; a term of weight 0
        is not computed. The teacher runs first: its activations are gone before the student's
        come."""
        micro = micro.to(self.device)
        places = micro.targets != NO_LOSS
        activation = self.decoder.activation
        wanted = losses.alpha > 0 and micro.tokens > 0
        teacher = self.teacher.targets(micro, examples, self.shared.size) if wanted else {}

        def use(x: Tensor, head: Tensor | PackedWeight) -> tuple[Tensor, Tensor, Tensor]:
            if not micro.tokens:  # zero, with gradients of zeros that other processes wait for
                nothing = linear_cross_entropy(
                    x, head, micro.targets, reduction="sum", activation=activation
                )
                return nothing, nothing, nothing
            x, targets = x[places], micro.targets[places]
            divergence = entropy = torch.zeros((), device=x.device)
            if wanted:
                divergence = linear_kl(
                    x, narrowed(head, self.shared.size), temperature=losses.temperature,
                    kind=losses.divergence, beta=losses.beta, activation=activation,
                    **teacher,
                ).sum()  # fmt: skip
            if losses.alpha < 1:
                entropy = linear_cross_entropy(
                    x, head, targets, reduction="sum", activation=activation
                )
            scaled = losses.alpha * losses.temperature**2 * divergence
            return scaled + (1 - losses.alpha) * entropy, divergence, entropy

        return self.decoder.with_head(micro.documents, use, checkpoint=self.checkpointing)
