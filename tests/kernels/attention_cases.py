"""Attention over dense, packed and paged keys under the interpreter, against float64.

Runs as interpreter_cases.py does. Dense and packed problems are those of the op's own cases
(fastllm.testing.infos.attention).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import accumulate, product
from typing import Any

import torch
from interpreter_cases import BF16, F32, NAMES, Case, excess, main, randn, same
from torch import Tensor

from fastllm.testing.infos.attention import (
    FULL_PROBLEMS,
    PROBLEMS,
    Problem,
    dense_attention,
    exact_attention,
    make_arguments,
)

F16 = torch.float16
DTYPES = (F32, BF16, F16)


def starts(lengths: list[int] | tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def lse_excess(lse: Tensor, ref: Tensor) -> float:
    """As `excess`; infinities must be equal."""
    if not torch.equal(lse.isinf(), ref.isinf()):
        return math.inf
    return excess(lse.masked_fill(lse.isinf(), 0.0), ref.masked_fill(ref.isinf(), 0.0), F32)


# --- dense and packed ---------------------------------------------------------------------------


def run_dense(*args: Any, batch_invariant: bool = True) -> tuple[Tensor, Tensor]:
    from fastllm.kernels.attention import attention

    return attention(*args, batch_invariant=batch_invariant)


def dense_case(problem: Problem, dtype: torch.dtype, batch_invariant: bool) -> float:
    args = make_arguments(torch.Generator().manual_seed(1), problem, dtype)
    o, lse = run_dense(*args, batch_invariant=batch_invariant)
    ref, ref_lse = exact_attention(*args)
    assert o.is_contiguous()
    return max(excess(o, ref, dtype), lse_excess(lse, ref_lse))


def rows_past_the_documents() -> float:
    """Rows of q past cu_seqlens_q[S] give 0 and -inf, with sinks too; keys past the end are NaN."""
    q, k = randn(140, 4, 16), randn(90, 2, 16)
    k[75:] = math.nan
    cu_q, cu_k = starts((3, 0, 70)), starts((9, 4, 62))
    o, lse = run_dense(q, k, k, cu_q, cu_k, None, torch.zeros(4), 0.25, -1, 0, 0.0)
    ref, ref_lse = exact_attention(
        q[:73], k[:75], k[:75], cu_q, cu_k, None, torch.zeros(4), 0.25, -1, 0, 0.0
    )
    ref = torch.cat((ref, ref.new_zeros(67, 4, 16)))
    ref_lse = torch.cat((ref_lse, ref_lse.new_full((4, 67), -math.inf)), 1)
    return max(excess(o, ref), lse_excess(lse, ref_lse))


HUGE = 2**31 - 1
# cu_seqlens of 20 rows that lie outside of them or run backwards, and what they are cut to.
HOSTILE = (((-7, 8, HUGE), (0, 8, 20)), ((3, -4, 20), (0, 0, 20)), ((HUGE, -HUGE, 25), (0, 0, 20)))


def hostile_starts() -> float:
    """Sequences are cut to the rows that exist: the bits are those of the sequences cut before."""
    q, k = randn(20, 2, 16), randn(20, 1, 16)
    worst = 0.0
    for rows, cut in HOSTILE:
        bad, good = (torch.tensor(x, dtype=torch.int32) for x in (rows, cut))
        found, expected = (
            run_dense(q, k, k, cu, cu, None, None, 0.25, -1, 0, 0.0) for cu in (bad, good)
        )
        worst = max(worst, *map(same, found, expected))
        caches = []
        for cu in (bad, good):
            cache = Cache(Paged((0, 0), (20, 20)))
            rows_k, rows_v = cache.rows[0][0], cache.rows[1][0]
            lens = torch.tensor([20, 20], dtype=torch.int32)
            append_rows(cache, rows_k, rows_v, cu, lens)
            caches.append([*cache.pages, cache.attend(q, cu, lens)])
        worst = max(
            worst,
            *(same(a.nan_to_num(9.0), b.nan_to_num(9.0)) for a, b in zip(*caches, strict=True)),
        )
    return worst


def append_rows(cache: Cache, k: Tensor, v: Tensor, cu_seqlens: Tensor, lens: Tensor) -> None:
    """Appends rows of k and v by the kernel."""
    from fastllm.kernels.append_kv import append_kv

    append_kv(k, v, *cache.pages, cache.block_table, cu_seqlens, lens, *cache.scales)


def hidden_keys_do_not_leak(dtype: torch.dtype) -> float:
    """NaN in masked keys, outside all windows and in another document changes no bit."""
    q, k, v = randn(80, 2, 16, dtype=dtype), randn(230, 1, 16, dtype=dtype), randn(230, 1, 24)
    mask = torch.arange(230) % 7 != 3
    hidden = ~mask
    hidden[:40] = True  # the first query stands at 70 and sees 30 back
    hidden[150:] = True  # the second document, of rows that are not compared
    v = v.to(dtype)
    bad_k, bad_v = (x.masked_fill(hidden[:, None, None], math.nan) for x in (k, v))
    numbers = (mask, None, 0.3, 30, 0, 0.0)
    cu_q, cu_k = starts((78, 2)), starts((148, 82))
    o, lse = run_dense(q, k, v, cu_q, cu_k, *numbers)
    bad_o, bad_lse = run_dense(q, bad_k, bad_v, cu_q, cu_k, *numbers)
    return max(same(o[:78], bad_o[:78]), same(lse[:, :78], bad_lse[:, :78]))


def nan_rows_stay_alone() -> float:
    q, k = randn(1, 70, 2, 16), randn(1, 70, 1, 16)
    numbers = (None, None, None, None, 0.25, -1, 0, 0.0)
    o, lse = run_dense(q, k, k, *numbers)
    bad = q.clone()
    bad[0, 5, 1], bad[0, 66, 0] = math.nan, math.inf
    bad_o, bad_lse = run_dense(bad, k, k, *numbers)
    rows = torch.ones(1, 70, 2, dtype=torch.bool)
    rows[0, 5, 1] = rows[0, 66, 0] = False
    spread = bad_o[~rows].isfinite().any() or bad_lse.mT[~rows].isfinite().any()
    right = max(same(o[rows], bad_o[rows]), same(lse.mT[rows], bad_lse.mT[rows]))
    return math.inf if spread else right


def unaligned_strides(dtype: torch.dtype) -> float:
    """Odd distances between rows: no access may be wider than an element."""
    q, k = randn(20, 3, 17, dtype=dtype)[..., 1:], randn(33, 1, 19, dtype=dtype)[..., :16]
    args = (starts((20,)), starts((33,)), None, None, 0.25, -1, 0, 0.0)
    o, lse = run_dense(q, k, k, *args)
    ref, ref_lse = exact_attention(q, k, k, *args)
    return max(excess(o, ref, dtype), lse_excess(lse, ref_lse))


def scale_case(scale: float, softcap: float = 0.0) -> float:
    """Scales that are negative, zero, or so large that logits are far apart."""
    q, k = randn(1, 40, 2, 16), randn(1, 70, 1, 16)
    args = (None, None, None, None, scale, -1, 0, softcap)
    o, lse = run_dense(q, k, k, *args)
    ref, ref_lse = exact_attention(q, k, k, *args)
    return max(excess(o, ref), lse_excess(lse, ref_lse)) / max(1.0, abs(scale))


# --- paged --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paged:
    """Sequences that append tokens begin..end of theirs, and a variant."""

    begin: tuple[int, ...]
    end: tuple[int, ...]
    dtype: torch.dtype = F32
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (16, 16)
    window: int = -1
    softcap: float = 0.0
    sinks: bool = False
    int8: bool = False
    page: int = 64
    mode: dict[str, bool] = field(default_factory=dict)

    @property
    def name(self) -> str:
        text = f"paged_attention {NAMES[self.dtype]} {self.begin}-{self.end} {self.heads}"
        text += f" {self.dims}" + f" window {self.window}" * (self.window >= 0)
        text += f" cap {self.softcap}" * (self.softcap > 0) + " sinks" * self.sinks
        text += " int8" * self.int8 + f" page {self.page}" * (self.page != 64)
        return text + " fast" * (self.mode.get("batch_invariant") is False)


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales) of rows in int8: scale amax / 127, codes rounded to even."""
    x = x.float()
    scale = x.abs().amax(-1) / torch.tensor(127.0)
    divisor = torch.where(scale > 0, scale, 1.0)[..., None]
    return (x / divisor).round().clamp(-127, 127).to(torch.int8), scale


class Cache:
    """A paged cache of shuffled pages, NaN where nothing was written, and its sequences."""

    def __init__(self, p: Paged) -> None:
        self.p = p
        self.rows = [
            [
                randn(n, p.heads[1], dim, dtype=p.dtype, seed=90 * which + i)
                for i, n in enumerate(p.end)
            ]
            for which, dim in enumerate(p.dims)
        ]
        width = max(1, *(math.ceil(n / p.page) for n in p.end))
        n_pages = len(p.end) * width + 1
        order = torch.randperm(n_pages, generator=torch.Generator().manual_seed(0))
        self.block_table = order[: len(p.end) * width].to(torch.int32).view(-1, width)
        shape = (n_pages, p.heads[1], p.page)
        self.scales: list[Tensor | None] = [None, None]
        if p.int8:
            self.scales = [torch.full(shape, math.nan) for _ in p.dims]
            self.pages = [torch.full((*shape, dim), 99, dtype=torch.int8) for dim in p.dims]
        else:
            self.pages = [torch.full((*shape, dim), math.nan, dtype=p.dtype) for dim in p.dims]

    def fill(self, end: tuple[int, ...]) -> None:
        """Writes tokens 0..end of every sequence, as the definition has it."""
        for which, (pages, scales) in enumerate(zip(self.pages, self.scales, strict=True)):
            for seq, n in enumerate(end):
                x = self.rows[which][seq][:n]
                scale = None
                if scales is not None:
                    x, scale = quantized(x)
                for i in range(n):
                    at = (
                        self.block_table[seq, i // self.p.page].item(),
                        slice(None),
                        i % self.p.page,
                    )
                    pages[at] = x[i]
                    if scales is not None and scale is not None:
                        scales[at] = scale[i]

    def lengths(self) -> tuple[Tensor, Tensor]:
        """(cu_seqlens_q, cache_seqlens) of a step that adds tokens begin..end."""
        new = [e - b for b, e in zip(self.p.begin, self.p.end, strict=True)]
        return starts(new), torch.tensor(self.p.end, dtype=torch.int32)

    def append(self) -> None:
        """Appends tokens begin.. of every sequence by the kernel."""
        from fastllm.kernels.append_kv import append_kv

        k, v = (
            torch.cat([x[b:] for x, b in zip(rows, self.p.begin, strict=True)])
            for rows in self.rows
        )
        append_kv(k, v, *self.pages, self.block_table, *self.lengths(), *self.scales)

    def values(self, which: int, seq: int) -> Tensor:
        """What the cache stands for, in float64: [tokens, Hk, D]."""
        x = self.rows[which][seq]
        if self.p.int8:
            codes, scale = quantized(x)
            return codes.double() * scale.double()[..., None]
        return x.double()

    def attend(self, q: Tensor, cu_seqlens: Tensor, lens: Tensor) -> Tensor:
        from fastllm.kernels.paged_attention import paged_attention

        p = self.p
        sinks = randn(p.heads[0], seed=3) if p.sinks else None
        numbers = (p.dims[0] ** -0.5, p.window, p.softcap)
        table = (self.block_table, cu_seqlens, lens)
        return paged_attention(q, *self.pages, *table, *self.scales, sinks, *numbers, **p.mode)

    def exact(self, q: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The same in float64."""
        p, found = self.p, []
        for seq, n in enumerate(p.end):
            rows = q[cu_seqlens[seq] : cu_seqlens[seq + 1]].double()
            position = torch.arange(n - len(rows), n)[:, None]
            visible = torch.arange(n) <= position
            if p.window >= 0:
                visible &= torch.arange(n) >= position - p.window
            sinks = randn(p.heads[0], seed=3).double() if p.sinks else None
            keys = self.values(0, seq), self.values(1, seq)
            scale = p.dims[0] ** -0.5
            found.append(dense_attention(rows, *keys, visible, sinks, scale, p.softcap)[0])
        return torch.cat(found)


def paged_case(p: Paged, append: bool = False) -> float:
    """Tokens begin..end of each sequence attend to 0..end of it."""
    cache = Cache(p)
    cache.fill(p.begin if append else p.end)
    if append:
        cache.append()
    cu_seqlens, lens = cache.lengths()
    q = randn(int(cu_seqlens[-1]), p.heads[0] + 1, p.dims[0], dtype=p.dtype, seed=7)[:, 1:]
    return excess(cache.attend(q, cu_seqlens, lens), cache.exact(q, cu_seqlens), p.dtype)


def append_codes(dtype: torch.dtype) -> float:
    """int8 codes and scales equal the definition bit for bit, rows of zeros and ties included."""
    p = Paged((0, 115), (9, 130), dtype, dims=(24, 40), int8=True)
    cache, expected = Cache(p), Cache(p)
    for c in (cache, expected):
        c.rows[0][0][2] = 0
        c.rows[1][1][118:] = torch.arange(40, dtype=dtype) * 0.5 - 3.0  # amax 16.5
        c.rows[1][1][120, :, 3] = 63.5  # codes are doubles of values: ties at quarters
    cache.fill(p.begin)
    cache.append()
    expected.fill(p.end)
    pairs = zip((*cache.pages, *cache.scales), (*expected.pages, *expected.scales), strict=True)
    return max(same(a.nan_to_num(-1.0), b.nan_to_num(-1.0)) for a, b in pairs)  # type: ignore[union-attr]


def dead_slots() -> float:
    """A slot of cache length 0 writes nothing to the cache and gets zeros; so do rows past all."""
    from fastllm.kernels.append_kv import append_kv

    cache = Cache(Paged((4, 0, 69), (5, 1, 70), heads=(2, 1)))
    cache.fill((4, 0, 69))
    before = cache.pages[0][cache.block_table[1].long()].clone()
    cu_seqlens, lens = starts((1, 1, 1)), torch.tensor([5, 0, 70], dtype=torch.int32)
    k, v = (torch.cat([x[-1:] for x in rows]) for rows in cache.rows)
    append_kv(k, v, *cache.pages, cache.block_table, cu_seqlens, lens)
    untouched = torch.equal(before.isnan(), cache.pages[0][cache.block_table[1].long()].isnan())
    q = randn(7, 2, 16, seed=8)
    ref = cache.exact(q, cu_seqlens)
    ref[1] = 0
    ref = torch.cat((ref, ref.new_zeros(4, 2, 16)))
    return excess(cache.attend(q, cu_seqlens, lens), ref) if untouched else math.inf


def strange_pages(p: Paged) -> float:
    """Positions of pages that the cache has not, and past the table, are neither read nor written.

    The cache lies between pages of infinities, which reading a next page would meet. The last
    sequence fills its row of the table and claims to be longer.
    """
    from fastllm.kernels.append_kv import append_kv

    cache = Cache(p)
    cache.fill(p.end)
    around = [torch.full((len(x) + 2, *x.shape[1:]), math.inf, dtype=p.dtype) for x in cache.pages]
    for i, pages in enumerate(cache.pages):
        around[i][1:-1] = pages.nan_to_num(7.0)
        cache.pages[i] = around[i][1:-1]
    table, n_pages = cache.block_table, len(cache.pages[0])
    hidden = torch.zeros(table.shape, dtype=torch.bool)
    for i, page in zip(
        range(0, table.numel(), 2), (-1, n_pages, -(2**31), 2**31 - 1), strict=False
    ):
        table.view(-1)[i], hidden.view(-1)[i] = page, True
    width = table.shape[1] * p.page
    cu_seqlens, lens = cache.lengths()
    lens[-1] = width + 9
    q = randn(int(cu_seqlens[-1]), p.heads[0], p.dims[0], dtype=p.dtype, seed=7)
    ref = []
    for seq, pages in enumerate(table.where(~hidden, 0).long()):
        rows = q[cu_seqlens[seq] : cu_seqlens[seq + 1]].double()
        k, v = (x[pages].transpose(1, 2).flatten(0, 1).double() for x in cache.pages)
        position = torch.arange(int(lens[seq]) - len(rows), int(lens[seq]))[:, None]
        visible = (torch.arange(width) <= position) & ~hidden[seq].repeat_interleave(p.page)
        ref.append(dense_attention(rows, k, v, visible, None, p.dims[0] ** -0.5, 0.0)[0])
    worst = excess(cache.attend(q, cu_seqlens, lens), torch.cat(ref), p.dtype)
    before = [x.clone() for x in around]
    table[~hidden] = n_pages
    k, v = (randn(len(q), p.heads[1], dim, dtype=p.dtype) for dim in p.dims)
    append_kv(k, v, *cache.pages, table, *cache.lengths())
    return max(worst, *(same(a, b) for a, b in zip(around, before, strict=True)))


# --- the same bits ------------------------------------------------------------------------------


def same_bits(p: Paged, dense: bool = True) -> float:
    """Rows of a prompt, its chunks, single tokens by parallel splits, packed and dense keys."""
    (first,), (length,) = p.begin, p.end
    cache = Cache(p)
    q = randn(length, p.heads[0], p.dims[0], dtype=p.dtype, seed=9)
    cache.fill(p.end)
    whole = cache.attend(q[first:], *cache.lengths())
    worst = 0.0
    for begin, end in ((first, first + 37), (511, 512), (512, 513), (length - 1, length)):
        lens = torch.tensor([end], dtype=torch.int32)
        part = cache.attend(q[begin:end], starts((end - begin,)), lens)
        worst = max(worst, same(part, whole[begin - first : end - first]))
    if dense:
        sinks = randn(p.heads[0], seed=3) if p.sinks else None
        numbers = (None, sinks, p.dims[0] ** -0.5, p.window, 0, p.softcap)
        k, v = (rows[0] for rows in cache.rows)
        batch, _ = run_dense(q[None, first:], k[None], v[None], None, None, *numbers)
        one, _ = run_dense(q[None, -1:], k[None], v[None], None, None, *numbers)
        others = (randn(9, *k.shape[1:], dtype=p.dtype), randn(9, *v.shape[1:], dtype=p.dtype))
        packed, _ = run_dense(
            torch.cat((q[:3], q[first:])),
            *(torch.cat(x) for x in zip(others, (k, v), strict=True)),
            starts((3, length - first)),
            starts((9, length)),
            *numbers,
        )
        worst = max(worst, same(batch[0], whole), same(packed[3:], whole), same(one[0], whole[-1:]))
    return worst


# --- the tables ---------------------------------------------------------------------------------


def quick_cases() -> dict[str, Case]:
    """Cases of the normal run: every variant, each dtype, both modes, spread over one another."""
    cases: dict[str, Case] = {}

    def add(name: str, run: Callable[..., float], *args: object, **kwargs: object) -> None:
        cases[name] = lambda: run(*args, **kwargs)

    for i, problem in enumerate(PROBLEMS):
        dtype, invariant = DTYPES[(i + 1) % 3], i % 2 == 0
        name = f"attention {NAMES[dtype]} {problem.label}" + " fast" * (not invariant)
        if i not in (3, 7, 16):  # of their kind others remain
            add(name, dense_case, problem, dtype, invariant)
    add("attention rows past the documents", rows_past_the_documents)
    add("attention hostile starts", hostile_starts)
    add("attention hidden keys", hidden_keys_do_not_leak, BF16)
    add("attention NaN rows", nan_rows_stay_alone)
    add("attention unaligned", unaligned_strides, BF16)
    add("attention scale -0.7", scale_case, -0.7)
    add("attention scale 0", scale_case, 0.0)
    for p in (
        Paged((60, 0, 5), (70, 3, 9)),
        Paged((125, 5), (130, 12), BF16, sinks=True),
    ):
        add(p.name + " appended", paged_case, p, True)
    for p in (
        Paged((0, 0, 0), (70, 3, 40), BF16),
        Paged((599, 20, 511), (600, 21, 512), BF16, softcap=2.0, sinks=True),
        Paged((0, 600), (150, 601), window=40),
        Paged((0, 5), (70, 6), BF16, mode={"batch_invariant": False}),
        Paged((30, 129), (70, 130), F16, dims=(96, 40), page=16, window=50),
        Paged((0, 20), (70, 21), BF16, int8=True, sinks=True, mode={"batch_invariant": False}),
        Paged((599, 20), (600, 21), F16, dims=(24, 40), int8=True, window=530),
        Paged((10,), (70,), dims=(40, 24), int8=True, softcap=2.0, page=32),
    ):
        add(p.name, paged_case, p)
    add("append_kv int8 bf16", append_codes, BF16)
    add("paged_attention dead slots", dead_slots)
    for p in (
        Paged((127, 60, 127), (128, 64, 128)),
        Paged((560,), (576,), BF16),
        Paged((60, 90), (96, 96), page=16),
        Paged((511, 1087), (512, 1088), mode={"batch_invariant": False}),
    ):
        add(p.name + " of strange pages", strange_pages, p)
    bits = Paged((490,), (560,), BF16, heads=(2, 1))
    add("attention same bits f32", same_bits, replace(bits, dtype=F32))
    add("attention same bits bf16", same_bits, replace(bits, window=100, sinks=True, softcap=2.0))
    add("attention same bits int8", same_bits, replace(bits, int8=True), False)
    return cases


def full_cases() -> dict[str, Case]:
    """Every variant x head dim x dtype, and the tables' modes."""
    cases: dict[str, Case] = {}
    for problem, dtype, invariant in product(PROBLEMS, DTYPES, (True, False)):
        name = f"attention {NAMES[dtype]} {problem.label}" + " fast" * (not invariant)
        cases[name] = lambda a=(problem, dtype, invariant): dense_case(*a)
    for i, problem in enumerate(FULL_PROBLEMS):
        dtype, invariant = DTYPES[i // 2 % 3], i % 2 == 0
        name = f"attention {NAMES[dtype]} {problem.label}" + " fast" * (not invariant)
        cases[name] = lambda a=(problem, dtype, invariant): dense_case(*a)
    plain = Paged((3, 0, 520), (40, 66, 523))
    paged = [
        replace(plain, dtype=dtype, heads=heads, dims=dims, int8=int8)
        for dtype, heads, dims, int8 in product(
            DTYPES, ((2, 1), (7, 1), (2, 2)), ((64, 64), (96, 80), (192, 128)), (True, False)
        )
    ]
    paged += [
        replace(plain, dtype=dtype, window=window, softcap=softcap, sinks=sinks, page=page)
        for dtype, window, softcap, sinks, page in product(
            DTYPES, (-1, 63), (0.0, 1.5), (False, True), (32, 256)
        )
    ]
    paged += [
        Paged((0,), (1,), BF16),
        Paged((0,), (9,), F16, heads=(3, 3), dims=(20, 20)),
        Paged((30, 299), (70, 300), dims=(24, 16), page=128, softcap=1.0),
    ]
    cases |= {p.name: lambda p=p: paged_case(p) for p in paged}
    cases |= {f"append_kv int8 {NAMES[d]}": lambda d=d: append_codes(d) for d in (F32, F16)}
    cases["attention scale -9 softcap"] = lambda: scale_case(-9.0, 2.0)
    for dtype, window, softcap, dims in product(
        DTYPES, (-1, 0, 63, 511), (0.0, 2.0), ((16, 16), (80, 24))
    ):
        p = Paged((490,), (600,), dtype, dims=dims, window=window, softcap=softcap, sinks=True)
        cases[f"{p.name} same bits"] = lambda p=p: same_bits(p)
    return cases


if __name__ == "__main__":
    sys.exit(main(quick_cases, full_cases))
