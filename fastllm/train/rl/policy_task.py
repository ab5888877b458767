"""The policy of an RL run as the loop sees it: its loss, its evaluation, its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastllm.engine.llm import LLM
from fastllm.models.decoder import Decoder
from fastllm.models.loader import load_model
from fastllm.models.tokenizer import Tokenizer
from fastllm.models.weights import WeightSource
from fastllm.nn.lora import adapters_disabled
from fastllm.train.data.prompts import EncodedPrompt
from fastllm.train.decoder_task import DecoderTask
from fastllm.train.rl.algorithms import Algorithm
from fastllm.train.rl.batches import RlMicro, Sample, micro_batch, stretches
from fastllm.train.rl.groups import Score
from fastllm.train.rl.metrics import RlMetrics
from fastllm.train.rl.objective import kl_estimate, policy_loss
from fastllm.train.rl.rollout import Rollouts
from fastllm.train.tune_config import TuneConfig


class PolicyTask(DecoderTask):
    """A decoder that learns from its own samples.

    algorithm: see `Algorithm`. temperature: that completions are sampled at; the policy is the
    distribution at this temperature. Other arguments and errors are those of `DecoderTask`.
    """

    name = "rl"
    evaluates_first = True

    def __init__(
        self,
        config: TuneConfig,
        source: WeightSource,
        tokenizer: Tokenizer,
        algorithm: Algorithm,
        *,
        temperature: float,
        lr: float,
        end_ids: Sequence[int],
        template: str | None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(
            config, source, tokenizer, lr=lr, end_ids=end_ids, template=template, device=device
        )
        self.algorithm = algorithm
        self.temperature = temperature
        self.micro_tokens = config.micro_tokens or 2048
        self.metrics = RlMetrics()
        self._source = source
        self._reference: Decoder | None = None
        self._asked: Sequence[EncodedPrompt] = ()
        self._shown = 0
        self.first_evaluation: dict[str, float] = {}  # of a new run, before its first step
        self._updated = False

    def serve(self, **options: Any) -> LLM:
        """An engine on the live weights; options are those of `LLM.from_model`."""
        return LLM.from_model(self.decoder, self.tokenizer, **options)

    def set_evaluation(
        self, rollouts: Rollouts, score: Score, names: Sequence[str],
        weights: Sequence[float], asked: Sequence[EncodedPrompt], shown: int,
    ) -> None:  # fmt: skip
        """What is answered greedily and scored; the first `shown` are also shown."""
        self._rollouts, self._score = rollouts, score
        self._names, self._weights = list(names), torch.tensor(list(weights))
        self._asked, self._shown = asked, shown

    def describe(self) -> list[str]:
        """What is trained, on what."""
        lines = super().describe()
        if self.decoder.config.mla is not None:
            lines.append(
                "latent attention trains in its expanded form: logprob_difference is of the size "
                "of rounding, not 0"
            )
        return lines

    # what the loop calls

    def loss(self, micro: RlMicro) -> Tensor:
        """The weighted sum of the tokens' losses."""
        self.metrics.update_begins()
        algorithm, micro = self.algorithm, micro.to(self.device)
        logp, entropy = self.decoder.log_probs(
            micro.documents, micro.targets, rows=micro.places, temperature=self.temperature,
            checkpoint=self.checkpointing,
        )  # fmt: skip
        surrogate = policy_loss(
            logp, micro.old, micro.advantages, micro.lengths, ratio=algorithm.ratio,
            clip_low=algorithm.clip_low, clip_high=algorithm.clip_high,
        )  # fmt: skip
        loss = surrogate.loss
        if "reference" in micro.extra:
            kl = kl_estimate(logp, micro.extra["reference"], algorithm.kl)
            if algorithm.kl_in == "loss":
                loss = loss + algorithm.beta * kl
            self.metrics.mean("kl", kl.detach().mean(), micro.tokens)
        self._note(micro, logp.detach(), entropy.detach().mean())
        self._note_clip(micro, surrogate.low.float().mean(), surrogate.high.float().mean())
        return (loss * micro.weights).sum()

    def _note(self, micro: RlMicro, logp: Tensor, entropy: Tensor) -> None:
        self.metrics.mean("entropy", entropy, micro.tokens)
        if micro.fresh:
            self.metrics.largest("logprob_difference", (logp - micro.old).abs().max())

    def _note_clip(self, micro: RlMicro, low: Tensor, high: Tensor) -> None:
        metrics, tokens = self.metrics, micro.tokens
        metrics.mean("clip_ratio/low_mean", low, tokens)
        metrics.smallest("clip_ratio/low_min", low)
        metrics.mean("clip_ratio/high_mean", high, tokens)
        metrics.largest("clip_ratio/high_max", high)
        metrics.mean("clip_ratio/region_mean", low + high, tokens)

    def flops(self, micro: RlMicro) -> float:
        """Of forward and backward; neither rollouts nor the reference count."""
        return self.training_flops(len(micro.documents.ids), micro.tokens)

    def numbers(self, *, whole: bool) -> dict[str, Any]:
        """Since the line before."""
        return self.metrics.numbers()

    def after_update(self) -> None:
        """The step is done."""
        self._updated = True
        self.metrics.update_ends()

    def evaluate(self) -> dict[str, float]:
        """Mean rewards of greedy answers to the held-out prompts: `eval_accuracy` and so on."""
        if not self._asked:
            return {}
        with self.untrained():
            answers = self._rollouts.greedy(self._asked)
        means = self._score(answers).mean(0)
        found = {f"eval_{n}": float(m) for n, m in zip(self._names, means, strict=True)}
        found["eval_reward"] = float(means @ self._weights)
        if not self._updated:
            self.first_evaluation = dict(found)
        return found

    def sample(self) -> list[tuple[str, str]]:
        """Some held-out prompts and what the live weights answer, greedily."""
        asked = self._asked[: self._shown]
        if not asked:
            return []
        with self.untrained():
            answers = self._rollouts.greedy(asked)
        return [(answer.record.text, answer.text.strip()) for answer in answers]

    # the reference policy

    def reference_log_probs(self, samples: Sequence[Sample]) -> list[list[float]]:
        """Log-probabilities of completion tokens by the policy that the run began with.

        An adapter is switched off for it; a model that is trained in full has a frozen copy beside
        it: see `load_reference`.
        """
        with self.untrained():
            if self.lora is not None:
                with adapters_disabled(self.decoder):
                    return log_probs(self.decoder, samples, self.temperature, self.micro_tokens)
            self.load_reference()
            assert self._reference is not None
            return log_probs(self._reference, samples, self.temperature, self.micro_tokens)

    def load_reference(self) -> None:
        """Load the frozen copy that training in full needs, unless it is there.

        Before `serve`: the engine makes its cache of the memory that is left.
        """
        if self.lora is None and self._reference is None:
            self._reference = load_model(
                self._source, self.decoder.dtype, self.device, self.decoder.activation,
                self.decoder.max_positions,
            )  # fmt: skip


@torch.no_grad()
def log_probs(
    decoder: Decoder, samples: Sequence[Sample], temperature: float, micro_tokens: int
) -> list[list[float]]:
    """Log-probabilities of the samples' completion tokens by `decoder`, for each sample."""
    found: list[list[float]] = []
    for unit in stretches(samples, micro_tokens):
        micro = micro_batch(unit, [1.0] * len(unit)).to(decoder.device)
        logp, _ = decoder.log_probs(
            micro.documents, micro.targets, rows=micro.places, temperature=temperature
        )
        found += [part.tolist() for part in logp.cpu().split(micro.lengths.tolist())]
    return found
