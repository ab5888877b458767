"""The critic of PPO: what reward is still to come, judged before every token of a completion.

It is a scorer (`fastllm.models.scorer`): a decoder with a scalar head, in one of two forms.

- On the policy's frozen base, with an adapter and a head of its own: tensors of the base are there
  once. Beyond the policy it takes the adapter, the head, and their optimizer state.
- A whole model beside the policy, trained in full, or a reward model that it starts from: the
  weights once more, and in full training float32 masters and two moments of each (14 bytes a
  value in bfloat16).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastllm.models.decoder import Decoder
from fastllm.models.scorer import Scorer, load_scorer, with_head
from fastllm.models.tokenizer import Tokenizer
from fastllm.models.trainable import load_trainable
from fastllm.models.weights import WeightSource
from fastllm.nn.linear import ParallelLinear
from fastllm.nn.lora import LoraConfig, add_lora, remove_lora
from fastllm.nn.scalar_head import ScalarHead, scalar_head
from fastllm.quantize.packed import PackedWeight
from fastllm.quantize.packed_experts import PackedExperts
from fastllm.train.rl.batches import RlMicro, Sample, micro_batch, stretches


class Critic:
    """Values of tokens, by a scorer that is trained beside the policy.

    shares: its base is the policy's.
    """

    def __init__(self, scorer: Scorer, *, shares: bool) -> None:
        self.scorer = scorer
        self.shares = shares

    @property
    def decoder(self) -> Decoder:
        """The model with its head."""
        return self.scorer.decoder

    def trained(self) -> dict[str, nn.Parameter]:
        """What training changes, by name."""
        return {n: p for n, p in self.decoder.named_parameters() if p.requires_grad}

    def values(self, micro: RlMicro, *, checkpoint: bool = False) -> Tensor:
        """The value before each completion token, float32 [N], differentiable."""
        return self.scorer.scores(micro.documents, rows=micro.places, checkpoint=checkpoint)

    @torch.no_grad()
    def values_of(self, samples: Sequence[Sample], micro_tokens: int) -> list[list[float]]:
        """The values of the completion tokens of each sample."""
        found: list[list[float]] = []
        for unit in stretches(samples, micro_tokens):
            micro = micro_batch(unit, [1.0] * len(unit)).to(self.decoder.device)
            values = self.values(micro).cpu()
            found += [part.tolist() for part in values.split(micro.lengths.tolist())]
        return found

    def line(self) -> str:
        """What it is and takes, for people."""
        count = sum(p.numel() for p in self.trained().values())
        if self.shares:
            return (
                f"critic: an adapter and a head on the policy's frozen base, {count:,} parameters"
            )
        size = self.decoder.nbytes / 1e6
        return f"critic: a model of its own, {size:,.0f} MB, {count:,} parameters trained"


class ActorCritic(nn.Module):
    """Policy and critic as the one model that the training loop sees."""

    def __init__(self, actor: Decoder, critic: Decoder) -> None:
        super().__init__()
        self.actor = actor
        self.critic = critic

    @property
    def dtype(self) -> torch.dtype:
        """What products are made in."""
        return self.actor.dtype

    def weights_changed(self) -> None:
        """Both drop what they computed from the old weights."""
        self.actor.weights_changed()
        self.critic.weights_changed()


def make_critic(
    actor: Decoder, source: WeightSource, lora: LoraConfig | None, *, start: str | None = None,
    tokenizer: Tokenizer | None = None, seed: int = 0,
) -> Critic:  # fmt: skip
    """The critic of a policy.

    Args:
        actor: the policy, before it has served.
        source: what the policy was loaded from.
        lora: the policy's adapter; None: all weights are trained.
        start: directory of a reward model to start from; None: from the policy, with a head of
            zeros, so that every value is 0 at first.
        tokenizer: the policy's; a reward model must have the same.
        seed: of the critic's adapter.

    Raises ValueError if the reward model has another tokenizer, and what loading raises.
    """
    if start is not None:
        scorer = load_scorer(start, actor.dtype, actor.device, trainable=True)
        if tokenizer is not None and scorer.tokenizer.fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"critic: {start} has another tokenizer than the policy, so it cannot judge its "
                "tokens: start from a reward model of the same family, or leave critic out"
            )
        _train_part(scorer.decoder, lora, seed)
        return Critic(scorer, shares=False)
    if lora is None:
        decoder = load_trainable(with_head(source), actor.dtype, actor.device, actor.max_positions)
        return Critic(Scorer(decoder), shares=False)
    decoder = share_base(actor)
    add_lora(decoder, lora, seed)
    return Critic(Scorer(decoder), shares=True)


def _train_part(decoder: Decoder, lora: LoraConfig | None, seed: int) -> None:
    """Of a reward model: its own adapter, or a new one, or all of it."""
    whole = all(p.requires_grad for p in decoder.parameters())
    if whole and lora is not None:
        add_lora(decoder, lora, seed)


def share_base(model: Decoder) -> Decoder:
    """A decoder of the same tensors without the adapter, and with a scalar head of zeros.

    Parameters, buffers and packed weights are the model's own, not copies: the base must stay
    frozen. What is changed about the one (adapters) is not seen by the other.
    """
    memo = {id(tensor): tensor for tensor in _base_tensors(model)}
    decoder: Decoder = copy.deepcopy(model, memo)
    remove_lora(decoder)
    decoder.config = replace(model.config, scalar_head=True, tie_word_embeddings=True)
    if scalar_head(decoder) is None:
        decoder.score = ScalarHead(model.config.hidden_size)
    weight = torch.zeros(1, model.config.hidden_size, dtype=model.dtype, device=model.device)
    decoder.score.weight = nn.Parameter(weight, requires_grad=False)
    return decoder.train(model.training)


def _base_tensors(model: Decoder) -> Iterator[object]:
    """Whatever holds weights: tensors, and the packed forms of modules and of fused products."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, PackedWeight | PackedExperts):
                yield value
            elif isinstance(value, ParallelLinear):
                yield from (part for part in (value.packed, value.bias) if part is not None)


def value_loss(
    values: Tensor, old: Tensor, returns: Tensor, clip: float | None = 0.2
) -> tuple[Tensor, Tensor]:
    """(loss of every token, whether it was clipped), `[N]`, float32 and bool.

    0.5 max((V - R)^2, (clip(V, old - c, old + c) - R)^2): a value gains nothing by moving further
    than c from what it was in the rollout (Schulman's PPO code; None: no clip).
    """
    plain = (values - returns).square()
    if clip is None:
        return 0.5 * plain, torch.zeros_like(plain, dtype=torch.bool)
    near = torch.clamp(values, old - clip, old + clip)
    cut = (near - returns).square()
    return 0.5 * torch.maximum(plain, cut), cut > plain
