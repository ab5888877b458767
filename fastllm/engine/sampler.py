"""Sampling parameters of every slot, in static buffers that the captured step reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastllm.engine.request import MAX_BANNED, SamplingParams
from fastllm.engine.static import StaticArrays
from fastllm.ops.pages import lazy_zeros
from fastllm.ops.sampling import GREEDY_BELOW, sampling

_KINDS = {
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "min_p": np.float32,
    "repetition": np.float32,
    "presence": np.float32,
    "frequency": np.float32,
    "seed": np.int64,
    "penalized": np.uint8,
    "changed": np.uint8,  # logits are penalized or banned before the draw
}


class Sampler:
    """Row i of every buffer belongs to slot i."""

    def __init__(self, slots: int, vocab_size: int, device: torch.device) -> None:
        fields = {name: ((slots,), kind) for name, kind in _KINDS.items()}
        self.static = StaticArrays({**fields, "banned": ((slots, MAX_BANNED), np.int32)}, device)
        self._arrays = self.static.arrays
        self._arrays["banned"][:] = -1
        # Large, and touched for penalized slots only: they take no memory until then.
        self.counts = lazy_zeros((slots, vocab_size), torch.int32, device)
        self.in_prompt = lazy_zeros((slots, vocab_size), torch.uint8, device)

    def set(
        self, slot: int, params: SamplingParams, seed: int, prompt_ids: Sequence[int],
        token_ids: Sequence[int], banned: Sequence[int],
    ) -> None:  # fmt: skip
        """Give a slot to a sample that has drawn `token_ids` so far; `banned` ids cannot be drawn
        until `unban`."""
        penalized = (
            params.repetition_penalty != 1
            or params.presence_penalty != 0
            or params.frequency_penalty != 0
        )
        values = {
            "temperature": params.temperature,
            "top_k": max(params.top_k, 0),
            "top_p": params.top_p,
            "min_p": params.min_p,
            "repetition": params.repetition_penalty,
            "presence": params.presence_penalty,
            "frequency": params.frequency_penalty,
            "seed": seed,
            "penalized": penalized,
            "changed": penalized or len(banned) > 0,
        }
        for name, value in values.items():
            self._arrays[name][slot] = value
        self._arrays["banned"][slot] = -1
        self._arrays["banned"][slot, : len(banned)] = banned
        if penalized:
            self.counts[slot].zero_()
            self.in_prompt[slot].zero_()
            device = self.counts.device
            self.in_prompt[slot, torch.tensor(prompt_ids, device=device)] = 1
            if token_ids:
                drawn = torch.tensor(token_ids, device=device)
                self.counts[slot].index_add_(0, drawn, torch.ones_like(drawn, dtype=torch.int32))

    def unban(self, slot: int) -> None:
        """Let every id be drawn."""
        self._arrays["banned"][slot] = -1
        self._arrays["changed"][slot] = self._arrays["penalized"][slot]

    def move(self, source: int, target: int) -> None:
        """Make `target` what `source` is."""
        for array in self._arrays.values():
            array[target] = array[source]
        if self._arrays["penalized"][source]:
            self.counts[target] = self.counts[source]
            self.in_prompt[target] = self.in_prompt[source]

    def clear(self, slot: int) -> None:
        """Leave a slot in the cheapest state: greedy, without penalties."""
        self._arrays["temperature"][slot] = 0
        self._arrays["penalized"][slot] = 0
        self._arrays["changed"][slot] = 0

    def changed_slots(self, count: int) -> np.ndarray:
        """Those of the first `count` slots whose logits are not drawn from as the model gave them,
        temperature aside."""
        return np.flatnonzero(self._arrays["changed"][:count])

    def inverse_temperatures(self, slots: np.ndarray) -> np.ndarray:
        """What their logits are multiplied with, float32 [len(slots), 1]; greedy: 1."""
        temperatures = self._arrays["temperature"][slots, None]
        return np.float32(1) / np.where(temperatures < GREEDY_BELOW, np.float32(1), temperatures)

    def __call__(self, logits: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draw for the first slots: (ids, log-probabilities, log-probabilities at temperature)."""
        rows = logits.shape[0]
        t = {name: tensor[:rows] for name, tensor in self.static.tensors.items()}
        return sampling(
            logits, t["temperature"], t["top_k"], t["top_p"], t["min_p"], t["repetition"],
            t["presence"], t["frequency"], t["seed"], positions, t["penalized"],
            self.counts[:rows], self.in_prompt[:rows], t["banned"],
        )  # fmt: skip
