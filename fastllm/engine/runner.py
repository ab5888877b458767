"""Runs the model: prompts eagerly, decode steps as captured graphs over static buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastllm.engine.cache import PagedCache, pages_for
from fastllm.engine.sampler import Sampler
from fastllm.engine.static import StaticArrays
from fastllm.graph import record
from fastllm.models.decoder import Decoder
from fastllm.nn.batch import Batch
from fastllm.nn.lora import adapted
from fastllm.ops.log_probs import log_probs

_Outputs = tuple[Tensor, Tensor, Tensor, Tensor]  # the sampler's three results, logits
LOGITS_ROWS = 64  # rows of logits made at once where many are wanted: 12 MB for 49,152 tokens


class Runner:
    """`inputs` and `sampler` hold what a decode step reads; row i belongs to slot i.

    A step is captured once for each `bucket` of slots, when it is first needed, and serves every
    number of sequences up to that: slots without a sequence have `cache_seqlens` 0.
    """

    def __init__(
        self, model: Decoder, cache: PagedCache, *, slots: int, max_pages: int, graphs: bool
    ) -> None:
        self.model = model
        self.cache = cache
        self.slots = slots
        self.graphs = graphs
        self.sampler = Sampler(slots, model.config.vocab_size, model.device)
        self.inputs = StaticArrays(
            {
                "ids": ((slots,), np.int32),
                "positions": ((slots,), np.int32),
                "cache_seqlens": ((slots,), np.int32),
                "cu_seqlens_q": ((slots + 1,), np.int32),
                "block_table": ((slots, max_pages), np.int32),
            },
            model.device,
        )
        self.inputs.arrays["cu_seqlens_q"][:] = np.arange(slots + 1)
        self._steps: dict[int, _Step] = {}
        self._read_weights()

    @property
    def stale(self) -> bool:
        """Whether somebody has said, since the last `refresh`, that weights have changed."""
        return self.model.caches_stale or self.model.weight_changes != self._changes

    def refresh(self) -> bool:
        """Make stale packed caches again; forget captured steps whose weights lie elsewhere now, or
        whose adapters are on that were off. Returns whether any weight has changed.

        Weights that changed where they are need no new capture: a step reads them as it runs.
        """
        self.model.refresh_caches()
        places, versions = self._places, self._versions
        self._read_weights()
        if places != self._places:
            self._steps.clear()
        return places != self._places or versions != self._versions

    def _read_weights(self) -> None:
        """Note where the weights lie, which adapters are on, and how often each has changed."""
        model = self.model
        tensors = list(model.served_tensors())
        self._places = [tensor.data_ptr() for tensor in tensors]
        for _, layer in adapted(model):
            assert layer.low_rank is not None, "adapted yields such layers"
            self._places.append(int(layer.low_rank.enabled))
        self._changes = model.weight_changes
        # writes through torch count themselves; tensors made for inference alone do not
        self._versions = [self._changes]
        self._versions += [tensor._version for tensor in tensors if not tensor.is_inference()]

    # Slots

    def set_slot(self, slot: int, token: int, position: int, pages: Sequence[int]) -> None:
        """Make a slot continue a sequence with `token` at `position`."""
        arrays = self.inputs.arrays
        arrays["ids"][slot] = token
        arrays["positions"][slot] = position
        arrays["cache_seqlens"][slot] = position + 1
        arrays["block_table"][slot, : len(pages)] = pages

    def add_page(self, slot: int, place: int, page: int) -> None:
        """Give a slot's sequence its page number `place`."""
        self.inputs.arrays["block_table"][slot, place] = page

    def free_slot(self, hole: int, last: int) -> None:
        """Move slot `last` into `hole` and make `last` a dead one."""
        arrays = self.inputs.arrays
        names = ("ids", "positions", "cache_seqlens", "block_table")
        if hole != last:
            for name in names:
                arrays[name][hole] = arrays[name][last]
            self.sampler.move(last, hole)
        for name in names:
            arrays[name][last] = 0
        self.sampler.clear(last)

    # Decode

    def decode(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One token for each of the first `count` slots: ids, and their log-probabilities, raw and
        at the temperature (of what the model says, before penalties and bans).

        The slots then stand at the next position, with the new token as input. The arrays are
        overwritten by the next step. An id of -1 says that the logits had NaN or no finite value.
        """
        step = self._step(count)
        self.inputs.upload()
        self.sampler.static.upload()
        ids, logprobs, sampled = (array[:count] for array in step())
        changed = self.sampler.changed_slots(count)
        if changed.size:
            sampled = sampled.copy()
            sampled[changed] = self._unchanged_logprobs(step.logits, changed, ids[changed])
        arrays = self.inputs.arrays
        arrays["ids"][:count] = ids
        arrays["positions"][:count] += 1
        arrays["cache_seqlens"][:count] += 1
        return ids, logprobs, sampled

    def _unchanged_logprobs(self, logits: Tensor, slots: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Log-probabilities at the temperature without penalties and bans, float32 [len(slots)]."""
        inverse = torch.from_numpy(self.sampler.inverse_temperatures(slots)).to(logits.device)
        rows = logits[torch.from_numpy(slots).to(logits.device)] * inverse
        return log_probs(rows, self._tensor(ids[:, None]))[:, 0].cpu().numpy()

    def last_logits(self, count: int) -> Tensor:
        """Logits [count, vocab] of the last `decode(count)`."""
        return self._step(count).logits[:count]

    def _step(self, count: int) -> _Step:
        size = min(bucket(count), self.slots)
        if size not in self._steps:
            self._steps[size] = self._make_step(size)
        return self._steps[size]

    def _make_step(self, size: int) -> _Step:
        t = self.inputs.tensors
        batch = Batch(
            ids=t["ids"][:size],
            positions=t["positions"][:size],
            cu_seqlens_q=t["cu_seqlens_q"][: size + 1],
            cache_seqlens=t["cache_seqlens"][:size],
            block_table=t["block_table"][:size],
        )

        def run() -> _Outputs:
            logits = self.model(batch, self.cache.layers)
            # the drawn token's place in its sequence is the number of tokens before it
            return (*self.sampler(logits, batch.cache_seqlens), logits)

        if not self.graphs:
            return _Step(run, None)
        # Capturing runs the step: with every slot dead it changes neither cache nor penalties.
        lengths = self.inputs.arrays["cache_seqlens"]
        penalized = self.sampler.static.arrays["penalized"]
        kept = lengths.copy(), penalized.copy()
        lengths[:], penalized[:] = 0, 0
        self.inputs.upload()
        self.sampler.static.upload()
        try:
            graph, outputs = record(run, self.model.device)
        finally:
            if self.model.device.type == "cuda":
                torch.cuda.synchronize(self.model.device)  # uploads read the arrays until they end
            lengths[:], penalized[:] = kept
        return _Step(graph.replay, outputs)

    # Prompts

    @torch.no_grad()
    def prefill(
        self, ids: Sequence[Sequence[int]], starts: Sequence[int], pages: Sequence[Sequence[int]]
    ) -> Tensor:
        """Write stretches of prompts to the cache: ids[i] stand at positions starts[i], ... of the
        sequence whose pages are pages[i]. Returns the final norm's output, [tokens, hidden]."""
        lengths = [len(part) for part in ids]
        stops = [start + n for start, n in zip(starts, lengths, strict=True)]
        table = np.zeros((len(ids), pages_for(max(stops))), np.int32)
        for row, (own, stop) in enumerate(zip(pages, stops, strict=True)):
            used = pages_for(stop)
            table[row, :used] = own[:used]
        positions = [np.arange(a, b) for a, b in zip(starts, stops, strict=True)]
        batch = Batch(
            ids=self._tensor(np.concatenate([np.asarray(part, np.int32) for part in ids])),
            positions=self._tensor(np.concatenate(positions)),
            cu_seqlens_q=self._tensor(np.concatenate([[0], np.cumsum(lengths)])),
            cache_seqlens=self._tensor(np.asarray(stops)),
            block_table=self._tensor(table),
            fresh=not any(starts),
        )
        return self.model.hidden(batch, self.cache.layers)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [rows, vocab] for rows of `prefill`'s result."""
        return self.model.logits(hidden)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.astype(np.int32, copy=False)).to(self.model.device)


class _Step:
    """A decode step, captured or eager; returns what the sampler does, as arrays."""

    def __init__(self, run: Callable[[], _Outputs | None], outputs: _Outputs | None) -> None:
        self._run = run
        self._eager = outputs is None
        if outputs is not None:
            self._keep(outputs)

    def _keep(self, outputs: _Outputs) -> None:
        *self._drawn, self.logits = outputs
        if self.logits.device.type == "cpu":  # views: replays change what they show
            self._arrays = [tensor.numpy() for tensor in self._drawn]

    def __call__(self) -> list[np.ndarray]:
        if self._eager:
            with torch.no_grad():
                outputs = self._run()
            assert outputs is not None, "an eager step returns its outputs"
            self._keep(outputs)
        else:
            self._run()
        if self.logits.device.type != "cpu":
            return on_host(*self._drawn)
        return self._arrays


def bucket(count: int) -> int:
    """How many slots the step for `count` sequences has: 1, 2, 4, 8, then two sizes an octave.

    Rows without a sequence cost what others do where products are bound by compute, from about 8
    rows on a CPU; every size keeps its own logits.
    """
    size = 1 << (count - 1).bit_length()
    return size * 3 // 4 if size >= 16 and count <= size * 3 // 4 else size


def on_host(ids: Tensor, *values: Tensor) -> list[np.ndarray]:
    """int32 ids and float32 values `[S]` as arrays, in one transfer: each one waits for the GPU."""
    first, *others = torch.stack([ids.view(torch.float32), *values]).cpu().numpy()
    return [first.view(np.int32), *others]
