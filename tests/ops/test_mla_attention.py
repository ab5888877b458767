"""Attention over compressed pages: the same bits however it is computed; metadata that lies."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from fastllm import _C
from fastllm.ops import append_mla, mla_attention, new_mla_cache
from fastllm.ops.mla_attention import mla_attention_ref
from fastllm.ops.registry import OPS

DTYPES = (torch.float32, torch.bfloat16)
ISAS = _C.isas()
SCALE = 0.2


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def shuffled_table(sequences: int, width: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randperm(sequences * width, generator=g).view(sequences, width).int()


class Prompts:
    """Random queries and rows of some sequences, run through a fresh cache in any chunks."""

    def __init__(
        self, lengths: list[int], heads: int, dims: tuple[int, int], dtype: torch.dtype
    ) -> None:
        g = torch.Generator().manual_seed(sum(lengths) + heads)
        self.lengths, self.dims, self.dtype = lengths, dims, dtype
        self.q = [torch.randn(n, heads, sum(dims), generator=g).to(dtype) for n in lengths]
        self.rows = [torch.randn(n, sum(dims), generator=g).to(dtype) for n in lengths]

    def run(self, which: list[int], chunk: int, seed: int = 0, first: int = 0) -> list[Tensor]:
        """Outputs of the sequences `which`, prefilled together: `first` tokens of each in one step,
        then `chunk` tokens a step."""
        longest = max(self.lengths[s] for s in which)
        table = shuffled_table(len(which), -(-longest // 64), seed)
        cache = new_mla_cache(table.numel(), 64, sum(self.dims), self.dtype)
        outs: list[list[Tensor]] = [[] for _ in which]
        steps = [0, *range(first, longest, chunk)] if first else list(range(0, longest, chunk))
        for done, end in zip(steps, [*steps[1:], longest], strict=True):
            new = [max(0, min(end, self.lengths[s]) - done) for s in which]
            at = [slice(done, done + n) for n in new]
            # A sequence that has ended is a dead slot of the steps that follow.
            lengths = [done + n if n else 0 for n in new]
            places = (table, int32([0, *accumulate(new)]), int32(lengths))
            q, rows = (
                torch.cat([x[s][i] for s, i in zip(which, at, strict=True)])
                for x in (self.q, self.rows)
            )
            append_mla(*rows.split(self.dims, dim=1), cache, *places)
            o = mla_attention(q, cache, *places, self.dims[0], SCALE)
            for out, part in zip(outs, o.split(new), strict=True):
                out.append(part)
        return [torch.cat(parts) for parts in outs]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dims"), [(5, (32, 16)), (16, (64, 16))])
def test_token_by_token_chunks_and_whole_prompt_give_the_same_bits(
    dtype: torch.dtype, heads: int, dims: tuple[int, int]
) -> None:
    prompts = Prompts([549], heads, dims, dtype)
    for isa in ISAS:
        _C.set_isa(isa)
        torch.set_num_threads(1)
        whole = prompts.run([0], 549)[0]
        for first, chunk, threads in ((500, 1, 1), (540, 1, 2), (0, 37, 1), (0, 200, 2)):
            torch.set_num_threads(threads)
            got = prompts.run([0], chunk, seed=chunk, first=first)[0]
            assert torch.equal(got, whole), f"{isa}, chunks of {chunk}, {threads} threads"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_alone_and_in_a_batch_gives_the_same_bits(dtype: torch.dtype) -> None:
    prompts = Prompts([70, 3, 530, 64, 65], 3, (48, 8), dtype)
    for isa in ISAS:
        _C.set_isa(isa)
        torch.set_num_threads(1)
        alone = [prompts.run([s], 1000)[0] for s in range(5)]
        for chunk, threads in ((1000, 2), (50, 1)):
            torch.set_num_threads(threads)
            batch = prompts.run(list(range(5)), chunk, seed=3)
            for s in range(5):
                assert torch.equal(batch[s], alone[s]), f"{isa}, sequence {s}, chunks of {chunk}"


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_contexts_of_published_widths_give_the_same_bits(dtype: torch.dtype) -> None:
    prompts = Prompts([1300, 700], 16, (512, 64), dtype)
    for isa in ISAS:
        _C.set_isa(isa)
        whole = prompts.run([0, 1], 1300)
        for chunk in (1, 333, 512):
            got = prompts.run([0, 1], chunk, seed=chunk)
            assert all(torch.equal(a, b) for a, b in zip(got, whole, strict=True)), (isa, chunk)


def paged(length: int, dtype: torch.dtype, new: int = 1, heads: int = 4) -> tuple[Tensor, ...]:
    """One sequence of `length` tokens over random pages, its last `new` ones as queries."""
    g = torch.Generator().manual_seed(length)
    width = -(-length // 64) + 1
    cache = torch.randn(width, 64, 48, generator=g).to(dtype)
    q = torch.randn(new, heads, 48, generator=g).to(dtype)
    return q, cache, shuffled_table(1, width), int32([0, new]), int32([length])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 7, 64, 65, 575])
def test_what_lies_past_the_end_of_a_sequence_does_not_matter(
    dtype: torch.dtype, length: int
) -> None:
    q, cache, table, *lengths = paged(length, dtype)
    dirty = cache.clone()
    rows = dirty[table[0].long()].flatten(0, 1)
    rows[length:] = float("nan")
    dirty[table[0].long()] = rows.unflatten(0, (-1, 64))
    for isa in ISAS:
        _C.set_isa(isa)
        clean = mla_attention(q, cache, table, *lengths, 32, SCALE)
        assert clean.isfinite().all()
        assert torch.equal(mla_attention(q, dirty, table, *lengths, 32, SCALE), clean)


def test_a_nan_query_stays_in_its_row() -> None:
    q, *rest = paged(100, torch.float32, new=3)
    clean = mla_attention(q, *rest, 32, SCALE)
    q[1, 2, 5] = float("nan")
    got = mla_attention(q, *rest, 32, SCALE)
    assert got[1, 2].isnan().all()
    got[1, 2] = clean[1, 2]
    assert torch.equal(got, clean)


@pytest.mark.parametrize(("factor", "scale"), [(1e6, 1.0), (1.0, -0.5), (1.0, 0.0)])
def test_large_scores_and_any_scale_are_right(factor: float, scale: float) -> None:
    q, *rest = paged(200, torch.float32, new=5)
    got = mla_attention(q * factor, *rest, 32, scale)
    torch.testing.assert_close(got, mla_attention_ref(q * factor, *rest, 32, scale))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dead_slots_give_zeros_and_write_nothing(dtype: torch.dtype) -> None:
    q, cache, _, _, _ = paged(100, dtype, new=3)
    table, starts, lengths = shuffled_table(3, 1), int32([0, 1, 2, 3]), int32([0, 5, 0])
    o = mla_attention(q, cache, table, starts, lengths, 32, SCALE)
    assert not o[0].any() and not o[2].any() and o[1].any()
    before = cache.clone()
    ones = torch.ones(3, 48, dtype=dtype)
    append_mla(*ones.split((32, 16), 1), cache, table, starts, int32([0, 0, 0]))
    assert torch.equal(cache, before)


def test_a_recorded_step_reads_lengths_when_it_is_replayed() -> None:
    prompts = Prompts([530], 3, (32, 16), torch.bfloat16)
    eager = prompts.run([0], 530)[0]
    table, lengths = shuffled_table(1, 9, seed=5), int32([1])
    cache = new_mla_cache(9, 64, 48, torch.bfloat16)
    q, rows = prompts.q[0][:1].clone(), prompts.rows[0][:1].clone()
    places = (table, int32([0, 1]), lengths)
    graph = _C.Graph()
    graph.begin()
    try:
        append_mla(*rows.split((32, 16), 1), cache, *places)
        o = mla_attention(q, cache, *places, 32, SCALE)
    finally:
        graph.end()
    for step in range(530):
        q.copy_(prompts.q[0][step : step + 1])
        rows.copy_(prompts.rows[0][step : step + 1])
        lengths.fill_(step + 1)
        graph.replay()
        assert torch.equal(o[0], eager[step]), step


BAD = {
    "block_table": {"table": int32([0, 9]).view(1, 2)},
    r"block_table\[0\]": {"table": int32([-1, 0]).view(1, 2)},
    "cache_seqlens": {"lengths": int32([129])},
    r"cache_seqlens\[0\] is 2": {"lengths": int32([2])},
    "cache_seqlens must": {"lengths": torch.tensor([70])},
    "cu_seqlens_q": {"starts": int32([0, 4])},
    "cu_seqlens_q must rise": {"starts": int32([1, 3])},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_metadata_is_named(message: str) -> None:
    good = {"table": int32([0, 1]).view(1, 2), "starts": int32([0, 3]), "lengths": int32([70])}
    places = list({**good, **BAD[message]}.values())
    cache = new_mla_cache(3, 64, 48, torch.float32)
    with pytest.raises(ValueError, match=message):
        mla_attention(torch.ones(3, 4, 48), cache, *places, 32, SCALE)
    with pytest.raises(ValueError, match=message):
        append_mla(torch.ones(3, 32), torch.ones(3, 16), cache, *places)


ONE = (int32([0]).view(1, 1), int32([0, 1]), int32([1]))


@pytest.mark.parametrize(
    ("message", "q", "value_dim"),
    [
        ("q must have shape", torch.ones(1, 4, 40), 32),
        ("q must have shape", torch.ones(1, 0, 48), 32),
        ("q must be torch.float32", torch.ones(1, 4, 48).bfloat16(), 32),
        ("value_dim must be from 1 to the 48", torch.ones(1, 4, 48), 49),
        ("value_dim must be from 1", torch.ones(1, 4, 48), 0),
    ],
)
def test_bad_queries_are_named(message: str, q: Tensor, value_dim: int) -> None:
    cache = new_mla_cache(3, 64, 48, torch.float32)
    with pytest.raises(ValueError, match=message):
        mla_attention(q, cache, *ONE, value_dim, SCALE)


@pytest.mark.parametrize(
    ("message", "latent", "rope_key"),
    [
        ("latent must have shape", torch.ones(1, 1, 32), torch.ones(1, 16)),
        ("rope_key must be torch.float32", torch.ones(1, 32), torch.ones(1, 16).bfloat16()),
        ("rope_key must have the 1 tokens", torch.ones(1, 32), torch.ones(2, 16)),
        ("must fill the 48 columns", torch.ones(1, 32), torch.ones(1, 8)),
    ],
)
def test_bad_rows_are_named(message: str, latent: Tensor, rope_key: Tensor) -> None:
    with pytest.raises(ValueError, match=message):
        append_mla(latent, rope_key, new_mla_cache(3, 64, 48, torch.float32), *ONE)


def test_a_cache_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="page_size must be a positive multiple of 64"):
        new_mla_cache(1, 16, 48, torch.float32)
    with pytest.raises(ValueError, match="num_pages"):
        new_mla_cache(-1, 64, 48, torch.float32)
    with pytest.raises(ValueError, match="the page_size of cache"):
        mla_attention(torch.ones(1, 4, 48), torch.ones(2, 16, 48), *ONE, 32, SCALE)
    with pytest.raises(ValueError, match="width must be positive"):
        new_mla_cache(1, 64, 0, torch.float32)
    cache = new_mla_cache(2, 64, 48, torch.float32).transpose(1, 2)
    with pytest.raises(ValueError, match="cache must be contiguous"):
        mla_attention(torch.ones(1, 4, 64), cache, *ONE, 32, SCALE)


def test_any_strides_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mla_attention", "append_mla"):
        monkeypatch.setattr(OPS[name], "ref", None)  # the kernels serve all
    table, starts, lengths = int32([3, 1, 5, 0]).view(2, 2), int32([0, 70, 75]), int32([70, 5])
    rows, q = torch.randn(75, 48), torch.randn(75, 4, 48)
    runs = []
    for strided in (False, True):
        where = table.t().contiguous().t() if strided else table
        new, asked = (x.mT.contiguous().mT if strided else x for x in (rows, q))
        cache = new_mla_cache(6, 64, 48, torch.float32)
        append_mla(*new.split((32, 16), dim=1), cache, where, starts, lengths)
        runs.append(mla_attention(asked, cache, where, starts, lengths, 32, SCALE))
    assert torch.equal(*runs)


HUGE = 2**31 - 1
HOSTILE = (
    ([[HUGE, -1, 3]], [0, 3], [190]),
    ([[-HUGE - 1, 7, 9]], [0, 3], [130]),
    ([[0, 1, 2]], [0, 3], [HUGE]),
    ([[0, 1, 2]], [0, 3], [-5]),
    ([[0, 1, 2]], [0, 3], [2]),
    ([[0, 1, 2]], [0, HUGE], [HUGE]),
    ([[0, 1, 2]], [-HUGE, 2], [100]),
    ([[0, 1, 2]], [3, 0], [100]),
    ([[0, 1, 2], [2, 1, 0]], [0, 90, -4], [100, 190]),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("table", "starts", "lengths"), HOSTILE)
def test_kernels_stay_inside_their_tensors_whatever_the_metadata_says(
    dtype: torch.dtype, table: list[list[int]], starts: list[int], lengths: list[int]
) -> None:
    # The tensors are the middles of larger ones: canaries before and after must survive.
    tokens = 3
    places = (torch.tensor(table, dtype=torch.int32), int32(starts), int32(lengths))
    q, rows = torch.ones(tokens, 4, 48, dtype=dtype), torch.ones(tokens, 48, dtype=dtype)
    for isa in ISAS:
        _C.set_isa(isa)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            guarded = torch.full((9, 64, 48), 7.0, dtype=dtype)
            cache = guarded[3:6].zero_()
            _C.append_mla(*rows.split((32, 16), 1), cache, *places)
            out = torch.full((3 * tokens, 4, 32), 7.0, dtype=dtype)
            partials = torch.empty(tokens * 4 * 48)
            for scratch in (None, partials):
                inner = out[tokens : 2 * tokens]
                _C.mla_attention(inner, q, cache, *places, scratch, 32, 1.0)
            assert (guarded[:3] == 7).all() and (guarded[6:] == 7).all()
            assert (out[:tokens] == 7).all() and (out[2 * tokens :] == 7).all()
