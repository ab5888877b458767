"""The model of a preference run as the loop sees it: losses of pairs against a fixed reference.

The reference is the model as the run finds it, before its first step: its log-probabilities of all
answers are computed once, and no second model is in memory. With an adapter it is the base (the
adapter switched off); with full training the weights that were loaded, which a resumed run reads
anew from the model's files before it reads its checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastllm.models.disk import sync
from fastllm.models.weights import WeightSource
from fastllm.nn.lora import adapters_disabled
from fastllm.train import distributed
from fastllm.train.data.examples import ExampleBatches
from fastllm.train.data.masks import ConversationEncoder
from fastllm.train.decoder_task import DecoderTask
from fastllm.train.preference.loss import MEASURES, PreferenceConfig, measures, preference_loss
from fastllm.train.preference.pairs import Pair, PairMicro, fingerprint, pair_batches
from fastllm.train.running_means import RunningMeans
from fastllm.train.tune_config import TuneConfig

REFERENCE = "reference.safetensors"
Say = Callable[[str], None]


class DpoTask(DecoderTask):
    """A model with its pairs. Raises what `DecoderTask` does."""

    name = "dpo"

    def __init__(
        self,
        config: TuneConfig,
        source: WeightSource,
        encoder: ConversationEncoder,
        losses: PreferenceConfig,
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
        self.losses = losses
        self._means = RunningMeans(MEASURES, self.device)

    def set_data(
        self,
        batches: ExampleBatches,
        train: Sequence[Pair],
        held_out: Sequence[Pair],
        micro_tokens: int,
        lines: Sequence[str] = (),
    ) -> None:
        """What is trained on and evaluated on; `lines` say so to people."""
        self.batches = batches
        self._train, self._held_out = train, held_out
        self._micro_tokens = micro_tokens
        self._lines = tuple(lines)

    def set_reference(self, folder: Path, say: Say, *, resumed: bool) -> None:
        """Compute the reference's log-probabilities, before anything is trained.

        resumed: the run goes on from a checkpoint: those that it wrote (`reference.safetensors`)
        are read, if they are of the same data and model.
        """
        data = fingerprint([*self._train, *self._held_out])
        name = f"{data} {self.base_name} {self.decoder.dtype} {self.identity().get('quant')}"
        read = _read(folder / REFERENCE, name) if resumed and distributed.rank() == 0 else None
        found = distributed.gather(read)[0]
        if found is None:
            say(f"reference: log-probabilities of {len(self._train) + len(self._held_out)} pairs")
            found = {
                "train": self.answer_logps(self._train, reference=True),
                "held_out": self.answer_logps(self._held_out, reference=True),
            }
            if distributed.rank() == 0:
                _write(folder / REFERENCE, found, name)
        self._reference = {name: values.to(self.device) for name, values in found.items()}

    def describe(self) -> list[str]:
        """What is trained, on what."""
        losses = self.losses
        kind = f"{losses.kind} loss, beta {losses.beta:g}"
        return [*self._lines, kind, *super().describe()]

    # what the loop calls

    def loss(self, micro: PairMicro) -> Tensor:
        """The losses of the pairs, summed."""
        micro = micro.to(self.device)
        logps = self._logps(micro)
        reference = self._reference["train"][list(micro.numbers)]
        self._means.add(measures(logps.detach(), reference, self.losses.beta), micro.tokens)
        return preference_loss(logps, reference, micro.lengths, self.losses).sum()

    def evaluate(self) -> dict[str, float]:
        """Loss and measures of the held-out pairs."""
        return self.held_out() or {}

    def numbers(self, *, whole: bool) -> dict[str, Any]:
        """Means over the pairs since the line before, under TRL's names."""
        return self._means.read()

    def after_update(self) -> None:
        """Adds up what is reported."""
        self._means.after_step()

    def state(self) -> dict[str, Tensor]:
        """What is reported so far."""
        return self._means.state()

    def flops(self, micro: PairMicro) -> float:
        """Of forward and backward."""
        return self.training_flops(len(micro.documents.ids), int(micro.lengths.sum()))

    # beside the loop

    def held_out(self) -> dict[str, float] | None:
        """Loss and measures per held-out pair, as eval_*; None without any."""
        if not self._held_out:
            return None
        logps = self.answer_logps(self._held_out).to(self.device)
        reference = self._reference["held_out"]
        lengths = torch.tensor([p.lengths for p in self._held_out], dtype=torch.float64)
        loss = preference_loss(logps, reference, lengths.to(self.device), self.losses).sum()
        found = {"loss": loss} | measures(logps, reference, self.losses.beta)
        return {f"eval_{name}": float(v) / len(logps) for name, v in found.items()}

    def answer_logps(self, pairs: Sequence[Pair], *, reference: bool = False) -> Tensor:
        """Log-probabilities of the answers, float64 `[pairs, 2]` in host memory, without
        gradients. reference: of the model without its adapter."""
        found: dict[int, list[float]] = {}
        rank, world = distributed.rank(), distributed.world()
        off = adapters_disabled(self.decoder) if reference else nullcontext()
        most = max([self._micro_tokens, *(pair.places for pair in pairs)])
        with self.untrained(), off:
            for micro in pair_batches(pairs, range(len(pairs)), most, rank, world) if pairs else ():
                logps = self._logps(micro.to(self.device))
                found |= dict(zip(micro.numbers, logps.tolist(), strict=True))
        every = {k: v for part in distributed.gather(found) for k, v in part.items()}
        rows = [every[number] for number in range(len(pairs))]
        return torch.tensor(rows, dtype=torch.float64).reshape(-1, 2)

    def _logps(self, micro: PairMicro) -> Tensor:
        """Sums over the answers' tokens, float64 `[P, 2]`: differences of large sums count."""
        logp, _ = self.decoder.log_probs(
            micro.documents, micro.targets, rows=micro.rows, checkpoint=self.checkpointing
        )
        if not micro.sizes:  # a process that has none left goes backward too
            return logp.double()[:0].reshape(-1, 2)
        sums = torch.stack([part.sum() for part in logp.double().split(micro.sizes)])
        return sums.reshape(-1, 2)


def _read(path: Path, name: str) -> dict[str, Tensor] | None:
    """What is stored there for the data of that name."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("data") != name:
                return None
            return {key: file.get_tensor(key) for key in ("train", "held_out")}
    except SafetensorError:
        return None  # a torn file: it is computed again


def _write(path: Path, values: dict[str, Tensor], name: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    save_file(values, aside, metadata={"data": name})
    aside.chmod(path.parent.stat().st_mode & 0o666)  # the library makes it private
    sync(aside)
    os.replace(aside, path)
