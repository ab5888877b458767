"""Attention over compressed pages, and head_linear, under the interpreter, against float64.

Runs as interpreter_cases.py does. Every slot of the cache that no token was written to is NaN.
"""

from __future__ import annotations

import math
import sys
from itertools import accumulate

import torch
from interpreter_cases import BF16, F32, NAMES, Case, excess, main, randn, same
from torch import Tensor

F16 = torch.float16


class Cache:
    """Sequences of random rows on shuffled pages: `fill` writes them, `append` by the kernel."""

    def __init__(
        self, lengths: list[int], dims: tuple[int, int], dtype: torch.dtype, page: int
    ) -> None:
        self.rows = [randn(n, sum(dims), dtype=dtype, seed=i) for i, n in enumerate(lengths)]
        self.dims, self.page = dims, page
        width = max(-(-n // page) for n in lengths) + 1
        generator = torch.Generator().manual_seed(1)
        pages = torch.randperm(len(lengths) * width, generator=generator)
        self.block_table = pages.view(len(lengths), width).int()
        self.cache = torch.full((len(pages), page, sum(dims)), math.nan, dtype=dtype)

    def fill(self, end: list[int]) -> None:
        for rows, pages, n in zip(self.rows, self.block_table, end, strict=True):
            at = torch.arange(n)
            self.cache[pages[at // self.page].long(), at % self.page] = rows[:n]

    def append(self, begin: list[int], end: list[int]) -> tuple[Tensor, Tensor]:
        """Writes rows begin..end of each sequence: (cu_seqlens_q, cache_seqlens)."""
        from fastllm.kernels.mla_attention import append_mla

        parts = [rows[b:e] for rows, b, e in zip(self.rows, begin, end, strict=True)]
        starts = torch.tensor([0, *accumulate(len(p) for p in parts)], dtype=torch.int32)
        lengths = torch.tensor(end, dtype=torch.int32)
        latent, rope_key = torch.cat(parts).split(self.dims, dim=1)
        append_mla(latent, rope_key, self.cache, self.block_table, starts, lengths)
        return starts, lengths

    def attend(self, q: Tensor, starts: Tensor, lengths: Tensor, **mode: bool) -> Tensor:
        from fastllm.kernels.mla_attention import mla_attention

        places = (self.block_table, starts, lengths)
        return mla_attention(q, self.cache, *places, self.dims[0], 0.2, **mode)


def mla_ref(q: Tensor, rows: Tensor, value_dim: int) -> Tensor:
    """q[Tq, H, D] as the last tokens of rows[Tk, D], in float64."""
    q, rows = q.double(), rows.double()
    scores = torch.einsum("thd,kd->htk", q, rows) * 0.2
    key = torch.arange(rows.shape[0])
    hidden = key > key[rows.shape[0] - q.shape[0] :, None]
    p = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return torch.einsum("htk,kd->thd", p, rows[:, :value_dim])


def mla_case(
    dtype: torch.dtype,
    begin: list[int],
    end: list[int],
    heads: int = 3,
    dims: tuple[int, int] = (32, 16),
    page: int = 64,
    **mode: bool,
) -> float:
    """Tokens begin..end of each sequence attend to 0..end of it."""
    cache = Cache(end, dims, dtype, page)
    cache.fill(end)
    new = [e - b for b, e in zip(begin, end, strict=True)]
    starts = torch.tensor([0, *accumulate(new)], dtype=torch.int32)
    lengths = torch.tensor(end, dtype=torch.int32)
    q = randn(int(starts[-1]), heads + 1, sum(dims), dtype=dtype, seed=7)[:, 1:]
    o = cache.attend(q, starts, lengths, **mode)
    pairs = zip(q.split(new), cache.rows, strict=True)
    ref = [mla_ref(part, rows, dims[0]) for part, rows in pairs]
    return excess(o, torch.cat(ref), dtype)


def append_case(dtype: torch.dtype) -> float:
    """The pages hold the rows, bit for bit, and nothing else was written."""
    cache = Cache([20, 1, 37], (24, 8), dtype, 16)
    cache.append([0, 0, 0], [15, 0, 16])
    cache.append([15, 0, 16], [20, 1, 37])
    worst = 0.0
    for rows, pages in zip(cache.rows, cache.block_table, strict=True):
        found = cache.cache[pages.long()].flatten(0, 1)
        worst = max(worst, same(found[: len(rows)], rows))
        worst = max(worst, 0.0 if found[len(rows) :].isnan().all() else math.inf)
    return worst


def dead_slots() -> float:
    """A slot of cache length 0 writes nothing and gets zeros, as do rows of no sequence."""
    cache = Cache([5, 1, 70], (32, 16), F32, 64)
    cache.fill([5, 0, 70])
    starts, lengths = (torch.tensor(x, dtype=torch.int32) for x in ([0, 1, 2, 3], [5, 0, 70]))
    from fastllm.kernels.mla_attention import append_mla

    rows = torch.stack((cache.rows[0][4], cache.rows[1][0], cache.rows[2][69]))
    append_mla(*rows.split((32, 16), 1), cache.cache, cache.block_table, starts, lengths)
    untouched = cache.cache[cache.block_table[1].long()].isnan().all()
    q = randn(5, 2, 48, seed=8)
    o = cache.attend(q, starts, lengths)
    ref = torch.zeros(5, 2, 32, dtype=torch.float64)
    for i in (0, 2):
        ref[i] = mla_ref(q[i : i + 1], cache.rows[i], 32)[0]
    return excess(o, ref) if untouched else math.inf


def strange_pages(**mode: bool) -> float:
    """Positions of pages that the cache has not, and past the table, are neither read nor written.

    The cache lies between pages of infinities, which reading a next page would meet. The second
    sequence fills its row of the table and claims to be longer.
    """
    cache = Cache([70, 576], (32, 16), F32, 64)
    cache.block_table = cache.block_table[:, :9].contiguous()
    cache.fill([70, 576])
    around = torch.full((len(cache.cache) + 2, *cache.cache.shape[1:]), math.inf)
    around[1:-1] = cache.cache.nan_to_num(7.0)
    cache.cache = around[1:-1]
    table, n_pages = cache.block_table, len(cache.cache)
    for seq, entry, page in ((0, 1, -1), (1, 0, 2**31 - 1), (1, 4, n_pages), (1, 8, -(2**31))):
        table[seq, entry] = page
    starts = torch.tensor([0, 1, 2], dtype=torch.int32)
    q = randn(2, 2, 48, seed=8)
    o = cache.attend(q, starts, torch.tensor([70, 585], dtype=torch.int32), **mode)
    known = torch.ones(576, dtype=torch.bool).view(9, 64)
    known[[0, 4, 8]] = False
    # mla_ref's last token sees all rows; the others than the hidden ones are left to it
    rows = cache.rows[0][:64], cache.rows[1][known.flatten()]
    ref = [mla_ref(q[i : i + 1], x, 32) for i, x in enumerate(rows)]
    before = around.clone()
    table.fill_(n_pages)
    cache.append([60, 570], [70, 576])
    return max(excess(o, torch.cat(ref)), same(around, before))


def same_bits(dtype: torch.dtype) -> float:
    """A long stretch, a chunk of it, single tokens by parallel splits: the same bits."""
    cache = Cache([560], (32, 16), dtype, 64)
    cache.fill([560])
    q = randn(560, 2, 48, dtype=dtype, seed=9)

    def part_of(begin: int, end: int) -> Tensor:
        starts = torch.tensor([0, end - begin], dtype=torch.int32)
        return cache.attend(q[begin:end], starts, torch.tensor([end], dtype=torch.int32))

    whole = part_of(480, 560)
    worst = 0.0
    for begin, end in ((495, 530), (511, 512), (512, 513), (559, 560)):
        worst = max(worst, same(part_of(begin, end), whole[begin - 480 : end - 480]))
    return worst


def head_linear_case(dtype: torch.dtype, sizes: tuple[int, ...], transposed: bool) -> float:
    from fastllm.kernels.head_linear import head_linear

    tokens, heads, n, k, tail_dim = sizes
    x = randn(tokens, heads, k + 5, dtype=dtype)[..., 5:]
    weight = randn(heads, n, k, dtype=dtype, seed=1)
    tail = randn(tokens, heads, tail_dim, dtype=dtype, seed=2) if tail_dim else None
    ref = torch.einsum("thk,hnk->thn", x.double(), weight.double())
    if tail is not None:
        ref = torch.cat((ref, tail.double()), -1)
    if transposed:
        weight = weight.mT.contiguous().mT
    return excess(head_linear(x, weight, tail), ref, dtype)


def quick_cases() -> dict[str, Case]:
    """Cases of the normal run."""
    cases: dict[str, Case] = {}
    for dtype in (F32, BF16):
        d = NAMES[dtype]
        cases[f"append_mla {d}"] = lambda t=dtype: append_case(t)
        cases[f"mla {d} one token"] = lambda t=dtype: mla_case(t, [0], [1], 1)
        cases[f"mla {d} prompts"] = lambda t=dtype: mla_case(t, [0, 0, 0], [70, 3, 40])
        cases[f"mla {d} decode"] = lambda t=dtype: mla_case(t, [599, 20], [600, 21], 16)
        cases[f"mla {d} odd dims"] = lambda t=dtype: mla_case(t, [5], [30], dims=(24, 8), page=16)
        cases[f"mla {d} same bits"] = lambda t=dtype: same_bits(t)
        for sizes, transposed in (((1, 3, 70, 40, 16), True), ((19, 2, 20, 33, 0), False)):
            name = f"head_linear {d} {sizes}" + " transposed" * transposed
            cases[name] = lambda a=(dtype, sizes, transposed): head_linear_case(*a)
    cases["mla f16 chunks"] = lambda: mla_case(F16, [64, 5], [130, 30], page=128)
    cases["mla bf16 fast"] = lambda: mla_case(BF16, [500, 5], [520, 6], 16, batch_invariant=False)
    cases["mla f32 dead slots"] = dead_slots
    cases["mla f32 strange pages"] = strange_pages
    cases["mla f32 strange pages fast"] = lambda: strange_pages(batch_invariant=False)
    return cases


def full_cases() -> dict[str, Case]:
    """Further shapes, the widths of published models among them."""
    cases: dict[str, Case] = {}
    for dtype in (F32, BF16, F16):
        for heads, dims in ((128, (64, 16)), (16, (512, 64)), (5, (256, 64)), (1, (40, 24))):
            name = f"mla {NAMES[dtype]} {heads} heads of {dims}"
            cases[name] = lambda a=(dtype, [64, 0, 520], [66, 20, 523], heads, dims): mla_case(*a)
    return cases


if __name__ == "__main__":
    sys.exit(main(quick_cases, full_cases))
