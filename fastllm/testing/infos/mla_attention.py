"""Cases of append_mla and mla_attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ops.mla_attention import append_mla_ref
from ..opinfo import Args, Case, OpInfo

PAGE = 64


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences of a step: new tokens and cached tokens (new ones included, 0 is a dead slot)."""

    new: tuple[int, ...]
    cached: tuple[int, ...]
    heads: int = 16
    width: int = 576
    value_dim: int = 512
    page_size: int = PAGE

    @property
    def label(self) -> str:
        lengths = "+".join(f"{n}of{c}" for n, c in zip(self.new, self.cached, strict=True))
        text = f"{lengths}-{self.heads}h-d{self.width}v{self.value_dim}"
        return text + (f"-p{self.page_size}" if self.page_size != PAGE else "")


# Together: T 0, 1, 3, 17, 65; one head, odd, a tile and more of them; the shape of DeepSeek and
# small ones; chunks of longer contexts; several splits of 512; dead slots.
BATCHES = (
    Batch(new=(1,), cached=(1,), heads=1, width=80, value_dim=64),
    Batch(new=(3, 17, 0, 5), cached=(3, 80, 0, 0), heads=3, width=80, value_dim=64),
    Batch(new=(1, 1, 1), cached=(700, 0, 513), heads=16),
    Batch(new=(65,), cached=(65,), heads=3, width=48, value_dim=32),
    Batch(new=(17, 1), cached=(600, 1100), heads=5, width=80, value_dim=64),
    Batch(new=(1,), cached=(130,), heads=16, width=96, value_dim=96),
    Batch(new=(0,), cached=(10,), heads=4, width=80, value_dim=64),
    Batch(new=(5, 1), cached=(300, 129), heads=4, width=80, value_dim=64, page_size=128),
)
FULL_BATCHES = tuple(
    replace(batch, heads=heads, width=width, value_dim=value_dim)
    for batch in (
        Batch(new=(1, 3, 17), cached=(65, 3, 1041)),
        Batch(new=(65, 130), cached=(65, 640)),
    )
    for heads in (1, 3, 16, 128)
    for width, value_dim in ((576, 512), (320, 256), (80, 64), (40, 24))
)
BENCH = (
    Batch(new=(512,), cached=(512,), heads=16),
    Batch(new=(1,), cached=(4096,), heads=16),
    Batch(new=(1,), cached=(16384,), heads=128),
)


def make_mla_cache(g: torch.Generator, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """`(cache, block_table, cu_seqlens_q, cache_seqlens)`: random, pages shuffled."""
    table_width = max(1, -(-max(batch.cached) // batch.page_size))
    sequences = len(batch.cached)
    pages = sequences * table_width + 1
    cache = torch.randn(pages, batch.page_size, batch.width, generator=g).to(dtype)
    table = torch.randperm(pages, generator=g)[: sequences * table_width]
    starts = torch.tensor([0, *accumulate(batch.new)], dtype=torch.int32)
    lengths = torch.tensor(batch.cached, dtype=torch.int32)
    return cache, table.view(sequences, table_width).int(), starts, lengths


def _append_cases(dtype: torch.dtype) -> Iterator[Case]:
    for batch in BATCHES:

        def make(g: torch.Generator, batch: Batch = batch) -> Args:
            cache = make_mla_cache(g, batch, dtype)
            # as the projection gives them: beside each other, and behind the query's latent
            rows = torch.randn(sum(batch.new), 24 + batch.width, generator=g).to(dtype)[:, 24:]
            return rows[:, : batch.value_dim], rows[:, batch.value_dim :], *cache

        yield Case(label=batch.label, make=make)


def _case(batch: Batch, dtype: torch.dtype, full: bool = False) -> Case:
    def make(g: torch.Generator) -> Args:
        cache = make_mla_cache(g, batch, dtype)
        q = torch.randn(sum(batch.new), batch.heads, batch.width, generator=g).to(dtype)
        return q, *cache, batch.value_dim, batch.width**-0.5

    return Case(label=batch.label, make=make, full=full)


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    for batch in BATCHES:
        yield _case(batch, dtype)
    for batch in FULL_BATCHES:
        yield _case(batch, dtype, full=True)


def _dense(sdpa: Callable[..., Tensor], dtype: torch.dtype | None) -> Callable[..., Tensor]:
    """Attention of each sequence over its gathered rows by `sdpa(q, k, v, visible, scale)`."""

    def attention(
        q: Tensor, cache: Tensor, block_table: Tensor, cu_seqlens_q: Tensor, cache_seqlens: Tensor,
        value_dim: int, scale: float,
    ) -> Tensor:  # fmt: skip
        out = torch.zeros(*q.shape[:2], value_dim, dtype=dtype or q.dtype)
        starts = cu_seqlens_q.tolist()
        for s, length in enumerate(cache_seqlens.tolist()):
            at = slice(starts[s], starts[s + 1])
            new = at.stop - at.start
            if length == 0 or new == 0:
                continue
            pages = block_table[s, : -(-length // cache.shape[1])].long()
            k = cache[pages].flatten(0, 1)[:length].expand(q.shape[1], -1, -1)
            key, query = torch.arange(length), torch.arange(length - new, length)[:, None]
            v = k[..., :value_dim]
            out[at] = sdpa(q[at].transpose(0, 1), k, v, key <= query, scale).transpose(0, 1)
        return out

    return attention


def _exact_sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    scores = q.double() @ k.double().transpose(-1, -2) * scale
    return scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v.double()


def _torch_sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=visible, scale=scale)
    return out[0]


def _dense_inputs(
    q: Tensor, cache: Tensor, table: Tensor, starts: Tensor, lengths: Tensor, value_dim: int,
    scale: float,
) -> Args:  # fmt: skip
    """One sequence gathered. A single token's heads are rows of one head, as torch likes it best:
    it would copy the keys for each of them."""
    length = int(lengths[0])
    rows = cache[table[0].long()].flatten(0, 1)[None, None, :length].contiguous()
    if q.shape[0] > 1:
        rows = rows.expand(-1, q.shape[1], -1, -1).contiguous()
        q = q.transpose(0, 1)
    return q[None].contiguous(), rows, rows[..., :value_dim].contiguous(), scale


def _causal_sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=k.shape[1] > 1, scale=scale)


def _flops(
    q: Tensor, cache: Tensor, table: Tensor, starts: Tensor, lengths: Tensor, value_dim: int,
    scale: float,
) -> int:  # fmt: skip
    new = (starts[1:] - starts[:-1]).double()
    seen = (new * lengths - new * (new - 1) / 2).sum().item()  # scores of one head
    return int(2 * seen * q.shape[1] * (q.shape[2] + value_dim))


def _bytes(q: Tensor, cache: Tensor, table: Tensor, starts: Tensor, lengths: Tensor, value_dim: int,
           scale: float) -> int:  # fmt: skip
    o = q.nbytes // max(q.shape[2], 1) * value_dim
    return int(lengths.sum()) * cache.shape[2] * cache.element_size() + q.nbytes + o


INFOS = [
    OpInfo(name="append_mla", cases=_append_cases, exact=append_mla_ref, bitwise=True),
    OpInfo(
        name="mla_attention",
        cases=_cases,
        exact=_dense(_exact_sdpa, torch.float64),
        peer=_dense(_torch_sdpa, None),
        bench_cases=lambda dtype: (_case(batch, dtype) for batch in BENCH),
        bench_peer=(_dense_inputs, _causal_sdpa),
        flops=_flops,
        bytes_moved=_bytes,
    ),
]
