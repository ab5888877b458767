"""Paged attention: one row, the same bits however it is computed; and metadata that lies."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllm import _C
from fastllm.graph import capture
from fastllm.ops import KvCache, append_kv, new_cache, paged_attention, rope, rope_append_kv
from fastllm.ops.paged_attention import paged_attention_ref
from fastllm.ops.paged_cache import pack_page, read_pages, unpack_page
from fastllm.ops.registry import OPS

DTYPES = (torch.float32, torch.bfloat16)
ISAS = _C.isas()


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def shuffled_table(sequences: int, width: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randperm(sequences * width, generator=g).view(sequences, width).int()


def append(k: Tensor, v: Tensor, cache: KvCache, places: Sequence[Tensor]) -> None:
    append_kv(k, v, cache.k, cache.v, *places, cache.k_scales, cache.v_scales)


def attend(q: Tensor, cache: KvCache, places: Sequence[Tensor], **options: Any) -> Tensor:
    scales = {"k_scales": cache.k_scales, "v_scales": cache.v_scales}
    return paged_attention(q, cache.k, cache.v, *places, **scales, **options)


class Prompts:
    """Random q, k, v of some sequences, run through a fresh cache in any chunks and batches."""

    def __init__(
        self, lengths: list[int], heads: int, kv_heads: int, dim: int, dtype: torch.dtype
    ) -> None:
        g = torch.Generator().manual_seed(sum(lengths) + dim)
        self.lengths, self.window = lengths, -1
        self.heads, self.kv_heads, self.dim, self.dtype = heads, kv_heads, dim, dtype
        self.q, self.k, self.v = (
            [torch.randn(n, h, dim, generator=g).to(dtype) for n in lengths]
            for h in (heads, kv_heads, kv_heads)
        )

    def run(self, which: list[int], chunk: int, seed: int = 0) -> list[Tensor]:
        """Outputs of the sequences `which`, prefilled together `chunk` tokens of each a step."""
        width = -(-max(self.lengths[s] for s in which) // 64)
        table = shuffled_table(len(which), width, seed)
        cache = new_cache(table.numel(), self.kv_heads, 64, self.dim, self.dtype)
        outs: list[list[Tensor]] = [[] for _ in which]
        done = 0
        while done < max(self.lengths[s] for s in which):
            new = [max(0, min(chunk, self.lengths[s] - done)) for s in which]
            at = [slice(done, done + n) for n in new]
            # A sequence that has ended is a dead slot of the steps that follow.
            lengths = [done + n if n else 0 for n in new]
            places = (table, int32([0, *accumulate(new)]), int32(lengths))
            step = [
                torch.cat([x[s][i] for s, i in zip(which, at, strict=True)])
                for x in (self.q, self.k, self.v)
            ]
            append(*step[1:], cache, places)
            o = attend(step[0], cache, places, window_size=(self.window, -1))
            for out, rows in zip(outs, o.split(new), strict=True):
                out.append(rows)
            done += chunk
        return [torch.cat(rows) for rows in outs]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "window"), [(9, 3, 64, -1), (4, 4, 24, 37)])
def test_token_by_token_chunks_and_whole_prompt_give_the_same_bits(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, window: int
) -> None:
    prompts = Prompts([549], heads, kv_heads, dim, dtype)
    prompts.window = window
    for isa in ISAS:
        _C.set_isa(isa)
        torch.set_num_threads(1)
        whole = prompts.run([0], 549)[0]
        for chunk, threads in ((1, 2), (7, 1), (64, 2), (200, 1), (549, 2)):
            torch.set_num_threads(threads)
            got = prompts.run([0], chunk, seed=chunk)[0]
            assert torch.equal(got, whole), f"{isa}, chunks of {chunk}, {threads} threads"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_alone_and_in_a_batch_of_eight_gives_the_same_bits(dtype: torch.dtype) -> None:
    prompts = Prompts([70, 3, 530, 1, 64, 65, 129, 17], 8, 2, 40, dtype)
    for isa in ISAS:
        _C.set_isa(isa)
        torch.set_num_threads(1)
        alone = [prompts.run([s], 1000)[0] for s in range(8)]
        for chunk, threads in ((1000, 2), (50, 1)):
            torch.set_num_threads(threads)
            batch = prompts.run(list(range(8)), chunk, seed=3)
            for s in range(8):
                assert torch.equal(batch[s], alone[s]), f"{isa}, sequence {s}, chunks of {chunk}"


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
@pytest.mark.parametrize(
    ("kv_heads", "group", "dim", "tokens"),
    [
        (13, 1, 32, 1),
        (3, 5, 136, 1),
        (8, 4, 128, 2),
        (2, 16, 16, 3),
        (5, 7, 256, 4),
        (1, 3, 200, 1),
    ],
)
@pytest.mark.parametrize("isa", ISAS)
def test_each_kv_head_alone_has_the_bits_of_all_together(
    isa: str, kv_heads: int, group: int, dim: int, tokens: int, dtype: torch.dtype
) -> None:
    """Tasks of few rows take several KV heads at once, as many as there is room for."""
    g = torch.Generator().manual_seed(dim)
    table = shuffled_table(3, 19)
    places = table, int32([tokens * s for s in range(4)]), int32([1200, 64, 700])
    q = torch.randn(3 * tokens, kv_heads * group, dim, generator=g)
    q = q.to(torch.bfloat16 if dtype == torch.int8 else dtype)
    shape = (table.numel(), kv_heads, 64, dim)
    cache = new_cache(*shape, dtype)
    for part in (cache.k, cache.v):
        values = torch.randn(shape, generator=g) * (40 if dtype == torch.int8 else 1)
        part.copy_(values.clamp(-128, 127))
    for scales in (cache.k_scales, cache.v_scales):
        if scales is not None:
            scales.copy_(torch.rand(scales.shape, generator=g) / 40)
    _C.set_isa(isa)
    alone = []
    for head in range(kv_heads):
        parts = (None if part is None else part[:, head : head + 1].contiguous() for part in cache)
        rows = q[:, head * group : (head + 1) * group].contiguous()
        alone.append(attend(rows, KvCache(*parts), places))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert torch.equal(attend(q, cache, places), torch.cat(alone, 1)), f"{threads} threads"


@pytest.mark.parametrize(
    ("kv_heads", "group", "dim"), [(3, 1, 64), (2, 3, 96), (2, 4, 128), (1, 7, 256), (2, 8, 80)]
)
@pytest.mark.parametrize("isa", ISAS)
def test_the_last_token_of_many_has_the_bits_of_one_over_int8_pages(
    isa: str, kv_heads: int, group: int, dim: int
) -> None:
    """Few rows widen codes as they multiply, many rows multiply a widened tile."""
    tokens, g = 14, torch.Generator().manual_seed(dim)
    table = shuffled_table(3, 12)
    lengths = int32([700, 64, 77])
    cache = new_cache(table.numel(), kv_heads, 64, dim, torch.int8)
    for part in (cache.k, cache.v):
        part.copy_(torch.randint(-128, 128, part.shape, generator=g))
        part[::2].clamp_(min=-127)  # -128 is rare and has a way of its own
    for scales in (cache.k_scales, cache.v_scales):
        scales.copy_(torch.rand(scales.shape, generator=g) / 40)
    q = torch.randn(3 * tokens, kv_heads * group, dim, generator=g).bfloat16()
    _C.set_isa(isa)
    many = attend(q, cache, (table, int32([tokens * s for s in range(4)]), lengths))
    one = attend(q[tokens - 1 :: tokens].contiguous(), cache, (table, int32([0, 1, 2, 3]), lengths))
    assert torch.equal(one, many[tokens - 1 :: tokens])


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_contexts_give_the_same_bits(dtype: torch.dtype) -> None:
    prompts = Prompts([2100, 1300], 12, 3, 128, dtype)
    for isa in ISAS:
        _C.set_isa(isa)
        whole = prompts.run([0, 1], 2100)
        for chunk in (1, 333, 512):
            got = prompts.run([0, 1], chunk, seed=chunk)
            assert all(torch.equal(a, b) for a, b in zip(got, whole, strict=True)), (isa, chunk)


def paged(
    length: int, dtype: torch.dtype, new: int = 1, heads: int = 4, dim: int = 32
) -> tuple[Tensor, ...]:
    """One sequence of `length` tokens over random pages, its last `new` ones as queries."""
    g = torch.Generator().manual_seed(length)
    width = -(-length // 64) + 1
    cache = [torch.randn(width, 2, 64, dim, generator=g).to(dtype) for _ in range(2)]
    q = torch.randn(new, heads, dim, generator=g).to(dtype)
    return q, *cache, shuffled_table(1, width), int32([0, new]), int32([length])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 7, 64, 65, 575])
def test_what_lies_past_the_end_of_a_sequence_does_not_matter(
    dtype: torch.dtype, length: int
) -> None:
    q, k_cache, v_cache, table, *lengths = paged(length, dtype)
    for isa in ISAS:
        _C.set_isa(isa)
        clean = paged_attention(q, k_cache, v_cache, table, *lengths)
        dirty = []
        for cache, which in ((k_cache, "k"), (v_cache, "v")):
            rows = read_pages(cache, table[0], which).clone()
            rows[:, length:] = float("nan")
            pages = rows.unflatten(1, (-1, 64)).transpose(0, 1)
            dirty.append(cache.clone().index_copy_(0, table[0].long(), pack_page(pages, which)))
        assert torch.equal(paged_attention(q, *dirty, table, *lengths), clean)


def test_a_nan_query_stays_in_its_row() -> None:
    args = list(paged(100, torch.float32, new=3))
    clean = paged_attention(*args)
    args[0] = args[0].clone()
    args[0][1, 2, 5] = float("nan")
    got = paged_attention(*args)
    assert got[1, 2].isnan().all()
    got[1, 2] = clean[1, 2]
    assert torch.equal(got, clean)


def test_scores_too_large_for_exp_are_right() -> None:
    args = list(paged(200, torch.float32, new=5))
    args[0] = args[0] * 1e6
    torch.testing.assert_close(
        paged_attention(*args), paged_attention_ref(*args, None, None, None, 32**-0.5)
    )


def test_a_negative_scale_is_a_scale() -> None:
    args = paged(200, torch.float32, new=5)
    got = paged_attention(*args, -0.5)
    torch.testing.assert_close(got, paged_attention_ref(*args, None, None, None, -0.5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dead_slots_give_zeros_and_write_nothing(dtype: torch.dtype) -> None:
    q, k_cache, v_cache, _, _, _ = paged(100, dtype, new=3)
    table, starts, lengths = shuffled_table(3, 1), int32([0, 1, 2, 3]), int32([0, 5, 0])
    o = paged_attention(q, k_cache, v_cache, table, starts, lengths)
    assert not o[0].any() and not o[2].any() and o[1].any()
    before = k_cache.clone(), v_cache.clone()
    kv = torch.ones(3, 2, 32, dtype=dtype)
    append_kv(kv, kv, k_cache, v_cache, table, starts, int32([0, 0, 0]))
    assert torch.equal(k_cache, before[0]) and torch.equal(v_cache, before[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_append_kv_gives_the_bits_of_the_three_ops(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    fused = torch.randn(9, 8 * 48, generator=g).to(dtype).unflatten(1, (8, 48))
    q, k, v = fused[:, :4], fused[:, 4:6], fused[:, 6:]
    angles = torch.randn(64, 20, generator=g)
    places = (torch.arange(9).int(), angles.cos(), angles.sin())
    paging = (shuffled_table(2, 2), int32([0, 8, 9]), int32([70, 1]))
    for isa in ISAS:
        _C.set_isa(isa)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            one, two = (new_cache(4, 2, 64, 48, dtype) for _ in range(2))
            rotated = rope_append_kv(q, k, v, *places, one.k, one.v, *paging)
            assert torch.equal(rotated, rope(q, *places))
            append(rope(k, *places), v, two, paging)
            assert torch.equal(one.k, two.k) and torch.equal(one.v, two.v)
            assert one.k.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["k", "v"])
def test_pages_unpack_to_what_was_packed(dtype: torch.dtype, which: str) -> None:
    x = torch.arange(2 * 64 * 24).view(1, 2, 64, 24).to(dtype)
    assert torch.equal(unpack_page(pack_page(x, which), which), x)
    if which == "k" or dtype == torch.bfloat16:
        assert not torch.equal(pack_page(x, which), x)


def test_a_recorded_step_reads_lengths_when_it_is_replayed() -> None:
    dtype = torch.bfloat16
    prompts = Prompts([600], 6, 2, 64, dtype)
    eager = prompts.run([0], 1)[0]
    table, lengths = shuffled_table(1, 10, seed=5), int32([1])
    cache = new_cache(10, 2, 64, 64, dtype)
    q, k, v = (x[0][:1].clone() for x in (prompts.q, prompts.k, prompts.v))
    graph = _C.Graph()
    graph.begin()
    try:
        append(k, v, cache, (table, int32([0, 1]), lengths))
        o = attend(q, cache, (table, int32([0, 1]), lengths))
    finally:
        graph.end()
    for step in range(600):
        for static, source in ((q, prompts.q), (k, prompts.k), (v, prompts.v)):
            static.copy_(source[0][step : step + 1])
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
    r"cu_seqlens_q must have shape \[2\]": {"starts": int32([0, 1, 3])},
    r"block_table must have shape \[1": {"table": int32([0, 1])},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_metadata_is_named(message: str) -> None:
    good = {"table": int32([0, 1]).view(1, 2), "starts": int32([0, 3]), "lengths": int32([70])}
    places = list({**good, **BAD[message]}.values())
    cache = new_cache(3, 2, 64, 32, torch.float32)
    with pytest.raises(ValueError, match=message):
        attend(torch.ones(3, 4, 32), cache, places)
    with pytest.raises(ValueError, match=message):
        append(torch.ones(3, 2, 32), torch.ones(3, 2, 32), cache, places)


def test_sequences_out_of_order_are_named() -> None:
    cache = new_cache(3, 2, 64, 32, torch.float32)
    with pytest.raises(ValueError, match="cu_seqlens_q must rise"):
        places = (int32([0, 1]).view(2, 1), int32([0, 5, 3]), int32([9, 9]))
        attend(torch.ones(3, 4, 32), cache, places)


@pytest.mark.parametrize(
    ("message", "q", "window"),
    [
        ("q must have shape", torch.ones(1, 4, 16), -1),
        ("q must be torch.float32", torch.ones(1, 4, 32).bfloat16(), -1),
        ("heads of q", torch.ones(1, 3, 32), -1),
        ("heads of q", torch.ones(1, 0, 32), -1),
        ("window_size", torch.ones(1, 4, 32), -2),
    ],
)
def test_bad_queries_are_named(message: str, q: Tensor, window: int) -> None:
    cache = new_cache(3, 2, 64, 32, torch.float32)
    with pytest.raises(ValueError, match=message):
        places = (int32([0]).view(1, 1), int32([0, 1]), int32([1]))
        attend(q, cache, places, window_size=(window, -1))


def test_a_cache_that_cannot_be_interleaved_is_refused() -> None:
    for name, shape, value_dim in (
        ("page_size", (1, 1, 60, 32), None),
        ("page_size", (1, 1, 16, 32), None),
        ("head_dim", (1, 1, 64, 31), None),
        ("num_pages", (-1, 1, 64, 32), None),
        ("kv_heads", (1, 0, 64, 32), None),
        ("value_dim", (1, 1, 64, 32), 0),
        ("value_dim", (1, 1, 64, 32), -1),
    ):
        with pytest.raises(ValueError, match=name):
            new_cache(*shape, torch.float32, value_dim=value_dim)


@pytest.mark.parametrize(
    ("message", "page_size", "dim"),
    [("page_size of k_cache", 16, 32), ("page_size of k_cache", 5, 32), ("head_dim", 64, 15)],
)
def test_a_cache_made_otherwise_is_refused(message: str, page_size: int, dim: int) -> None:
    places = (int32([0]).view(1, 1), int32([0, 1]), int32([1]))
    cache = KvCache(*torch.zeros(2, 2, 1, page_size, dim).bfloat16().unbind())
    new = torch.ones(1, 1, dim).bfloat16()
    with pytest.raises(ValueError, match=message):
        attend(new, cache, places)
    with pytest.raises(ValueError, match=message):
        append(new, new, cache, places)


@pytest.mark.parametrize("name", ["q", "block_table", "k_cache", "cu_seqlens_q", "sinks", "v"])
def test_what_is_no_tensor_is_named(name: str) -> None:
    cache = new_cache(3, 2, 64, 32, torch.float32)
    index = {"block_table": int32([0]).view(1, 1), "cu_seqlens_q": int32([0, 1])}
    index["cache_seqlens"] = int32([1])
    caches = {"k_cache": cache.k, "v_cache": cache.v}
    rows = torch.ones(1, 2, 32)
    calls: list[tuple[Any, dict[str, Any]]] = [
        (paged_attention, {"q": rows, **caches, **index, "sinks": None}),
        (append_kv, {"k": rows, "v": rows, **caches, **index}),
    ]
    for call, arguments in calls:
        if name in arguments:
            with pytest.raises(TypeError, match=f"{name} must be a tensor, got list"):
                call(**{**arguments, name: [[0]]})


def test_sparse_queries_are_named() -> None:
    cache = new_cache(3, 2, 64, 32, torch.float32)
    with pytest.raises(ValueError, match="q must be a strided tensor"):
        places = (int32([0]).view(1, 1), int32([0, 1]), int32([1]))
        attend(torch.ones(1, 4, 32).to_sparse(), cache, places)


def strided(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


@pytest.mark.parametrize("dtype", (*DTYPES, torch.int8), ids=str)
def test_any_strides_give_the_same_bits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("paged_attention", "append_kv", "rope_append_kv"):
        monkeypatch.setattr(OPS[name], "ref", None)  # the kernels serve all
    g = torch.Generator().manual_seed(3)
    table, starts, lengths = int32([3, 1, 5, 0]).view(2, 2), int32([0, 70, 75]), int32([70, 5])
    q, k, v = (
        torch.randn(75, h, 32, generator=g).to(torch.float32 if dtype == torch.int8 else dtype)
        for h in (4, 2, 2)
    )
    turns = (torch.arange(75).int(), torch.randn(75, 16), torch.randn(75, 16))
    sinks = torch.randn(8, generator=g)[::2]
    runs = []
    for lay in (torch.clone, strided):
        one, two = (new_cache(6, 2, 64, 32, dtype) for _ in range(2))
        places = (lay(table), starts, lengths)
        append(lay(k), lay(v), one, places)
        scales = () if two.k_scales is None else (two.k_scales, two.v_scales)
        rotated = rope_append_kv(lay(q), lay(k), lay(v), *turns, two.k, two.v, *places, *scales)
        o = attend(lay(q), one, places, sinks=sinks if lay is strided else sinks.clone())
        runs.append([o, rotated, one.k, one.v, two.k, two.v])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_recording_names_what_it_would_have_to_copy() -> None:
    cache = new_cache(6, 2, 64, 32, torch.float32)
    table, starts, lengths = int32([3, 1, 5, 0]).view(2, 2), int32([0, 1, 2]), int32([70, 5])
    q, k = torch.ones(2, 4, 32), torch.ones(2, 2, 32)
    apart, columns = (strided(q), strided(k)), strided(table)
    for name, call in {
        "q": lambda: attend(apart[0], cache, (table, starts, lengths)),
        "block_table": lambda: attend(q, cache, (columns, starts, lengths)),
        "k": lambda: append(apart[1], k, cache, (table, starts, lengths)),
    }.items():
        with pytest.raises(ValueError, match=f"{name} must have .* graph capture"), capture():
            call()


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
    shape, tokens = (3, 2, 64, 32), 3
    places = (torch.tensor(table, dtype=torch.int32), int32(starts), int32(lengths))
    q, kv = torch.ones(tokens, 4, 32, dtype=dtype), torch.ones(tokens, 2, 32, dtype=dtype)
    for isa in ISAS:
        _C.set_isa(isa)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            guarded = [torch.full((9, *shape[1:]), 7.0, dtype=dtype) for _ in range(2)]
            cache = [g[3:6].zero_() for g in guarded]
            _C.append_kv(kv, kv, *cache, *places, None, None)
            out = torch.full((3 * tokens, 4, 32), 7.0, dtype=dtype)
            partials = torch.empty(tokens * 4 * 48)
            for scratch in (None, partials):
                _C.paged_attention(
                    out[tokens : 2 * tokens], q, *cache, *places, None, None, None, scratch,
                    1.0, -1, 0.0,
                )  # fmt: skip
            for g in guarded:
                assert (g[:3] == 7).all() and (g[6:] == 7).all()
            assert (out[:tokens] == 7).all() and (out[2 * tokens :] == 7).all()
