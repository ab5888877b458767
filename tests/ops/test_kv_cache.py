"""KV caches of every dtype: what is stored, what attention reads of it, and arguments that lie."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllm import _C
from fastllm.ops import KvCache, append_kv, new_cache, paged_attention, rope, rope_append_kv
from fastllm.ops.append_kv import append_kv_ref, rope_append_kv_ref
from fastllm.ops.paged_attention import paged_attention_ref
from fastllm.ops.paged_cache import (
    pack_page,
    quantize_rows,
    read_pages,
    read_scales,
    unpack_page,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CACHES = (*FLOATS, torch.int8)
ISAS = _C.isas()


def int32(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def input_dtypes(cache: torch.dtype) -> tuple[torch.dtype, ...]:
    return FLOATS if cache == torch.int8 else (cache,)


def pairs() -> list[tuple[torch.dtype, torch.dtype]]:
    return [(cache, dtype) for cache in CACHES for dtype in input_dtypes(cache)]


def copy(cache: KvCache) -> KvCache:
    return KvCache(*(None if t is None else t.clone() for t in cache))


def append(k: Tensor, v: Tensor, cache: KvCache, places: tuple[Tensor, ...]) -> None:
    append_kv(k, v, cache.k, cache.v, *places, cache.k_scales, cache.v_scales)


def same_bits(a: KvCache, b: KvCache) -> bool:
    return all(
        x is y or torch.equal(x.view(torch.uint8), y.view(torch.uint8))
        for x, y in zip(a, b, strict=True)
        if x is not None and y is not None
    )


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize("which", ["k", "v"])
def test_pages_unpack_to_what_was_packed(dtype: torch.dtype, which: Any) -> None:
    x = (torch.arange(2 * 64 * 24) % 251 - 125).view(1, 2, 64, 24).to(dtype)
    assert torch.equal(unpack_page(pack_page(x, which), which), x)
    if which == "k" or dtype != torch.float32:
        assert not torch.equal(pack_page(x, which), x)


def test_narrow_types_share_one_order_of_pages() -> None:
    x = (torch.arange(64 * 16) % 127).view(1, 64, 16)
    for which in ("k", "v"):
        packed = [pack_page(x.to(d), which) for d in (torch.int8, torch.bfloat16, torch.float16)]
        assert torch.equal(packed[0].float(), packed[1].float())
        assert torch.equal(packed[0].float(), packed[2].float())
    k = pack_page(x.to(torch.int8), "k").view(4, 8, 16, 2)
    assert k[1, 3, 5, 1] == x[0, 16 + 5, 2 * 3 + 1]
    v = pack_page(x.to(torch.int8), "v").view(32, 16, 2)
    assert v[9, 4, 1] == x[0, 2 * 9 + 1, 4]


def test_codes_are_at_most_half_a_scale_off_and_span_127() -> None:
    x = random(40, 3, 48) * torch.logspace(-6, 6, 40)[:, None, None]
    codes, scales = quantize_rows(x)
    assert codes.dtype == torch.int8 and scales.dtype == torch.float32
    assert (codes.abs().amax(-1) == 127).all() and codes.min() >= -127
    off = (codes.double() * scales.double()[..., None] - x.double()).abs()
    assert (off <= 0.5001 * scales.double()[..., None]).all()


def test_codes_round_half_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    codes, scales = quantize_rows(x)
    assert scales.item() == 1.0 and codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]


@pytest.mark.parametrize("value", [0.0, 1e-45, math.nan, math.inf, -math.inf])
def test_rows_without_a_scale_have_codes_of_zero(value: float) -> None:
    x = torch.zeros(1, 8)
    x[0, 3] = value
    codes, scales = quantize_rows(x)
    assert not codes.any()
    want = 0.0 if abs(value) < 1 else abs(value)
    assert scales.item() == want or (math.isnan(value) and math.isnan(scales.item()))


def test_the_smallest_normal_scales_still_quantize() -> None:
    x = torch.tensor([[1e-38, -6e-39, 0.0]])
    codes, scales = quantize_rows(x)
    assert codes.tolist() == [[127, -76, 0]] and scales.item() > 0


PLACES = (int32([[4, 1], [0, 2], [3, 5]]), int32([0, 5, 5, 9]), int32([70, 0, 66]))


@pytest.mark.parametrize(("cache_dtype", "dtype"), pairs())
def test_append_stores_the_rows_and_leaves_the_rest(
    cache_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    cache = new_cache(6, 2, 64, 24, cache_dtype, value_dim=40)
    for tensor in cache:
        if tensor is not None:
            tensor.fill_(9)
    k, v = random(9, 2, 24, dtype=dtype), random(9, 2, 40, dtype=dtype, seed=1)
    append(k, v, cache, PLACES)
    for new, pages, scales, which in (
        (k, cache.k, cache.k_scales, "k"),
        (v, cache.v, cache.v_scales, "v"),
    ):
        for s, begin, end, length in ((0, 0, 5, 70), (2, 5, 9, 66)):
            rows = read_pages(pages, PLACES[0][s], which)
            written = rows[:, length - (end - begin) : length].transpose(0, 1)
            if scales is None:
                assert torch.equal(written, new[begin:end])
            else:
                codes, want = quantize_rows(new[begin:end])
                assert torch.equal(written, codes)
                found = read_scales(scales, PLACES[0][s])
                assert torch.equal(found[:, length - (end - begin) : length].t(), want)
                assert (found[:, length:] == 9).all()
            assert (rows[:, length:] == 9).all() and (rows[:, : length - (end - begin)] == 9).all()
        assert (pages[PLACES[0][1].long()] == 9).all()  # a dead slot's


@pytest.mark.parametrize(("cache_dtype", "dtype"), pairs())
def test_every_isa_appends_the_bits_of_the_reference(
    cache_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(3)
    for dim, value_dim, heads in ((24, 24, 2), (64, 64, 3), (80, 40, 1), (130, 6, 2)):
        fused = torch.randn(9, (dim + value_dim) * heads, generator=g)
        fused *= torch.logspace(-4, 3, 9)[:, None]
        fused[3, 5:70] = 0
        fused[4] = 0
        fused[5, 7] = math.nan
        fused[6, 1] = math.inf
        fused[7, 11] = 1e-44
        fused = fused.to(dtype)
        k = fused[:, : dim * heads].unflatten(1, (heads, dim))
        v = fused[:, dim * heads :].unflatten(1, (heads, value_dim))
        blank = new_cache(6, heads, 64, dim, cache_dtype, value_dim=value_dim)
        q = random(9, 2 * heads, dim, dtype=dtype, seed=2)
        angles = random(80, dim // 4, seed=4)
        turns = (torch.arange(9).int() * 7, angles.cos(), angles.sin())
        want, want_turned = copy(blank), copy(blank)
        append_kv_ref(k, v, *want[:2], *PLACES, *want[2:])
        want_q = rope_append_kv_ref(q, k, v, *turns, *want_turned[:2], *PLACES, *want_turned[2:])
        for isa in ISAS:
            _C.set_isa(isa)
            for threads in (1, 2):
                torch.set_num_threads(threads)
                got, turned = copy(blank), copy(blank)
                append(k, v, got, PLACES)
                assert same_bits(canonical(got), canonical(want)), (isa, dim)
                got_q = rope_append_kv(q, k, v, *turns, *turned[:2], *PLACES, *turned[2:])
                assert same_bits(canonical(turned), canonical(want_turned)), (isa, dim)
                assert torch.equal(got_q, want_q) and torch.equal(got_q, rope(q, *turns))


def canonical(cache: KvCache) -> KvCache:
    """One NaN for all: which one a product of NaN and something gives is not defined."""
    return KvCache(
        *(t if t is None or t.dtype == torch.int8 else t.where(t == t, math.nan) for t in cache)
    )


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, softcap: float, sinks: Tensor | None
) -> Tensor:
    """float64; q [Tq, H, D], k [Hk, Tk, D], v [Hk, Tk, Dv]."""
    group = q.shape[1] // k.shape[0]
    k, v = (x.double().repeat_interleave(group, 0) for x in (k, v))
    scores = q.double().transpose(0, 1) @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    position = torch.arange(k.shape[1] - q.shape[0], k.shape[1])[:, None]
    key = torch.arange(k.shape[1])
    hidden = key > position
    if window >= 0:
        hidden |= key < position - window
    scores = scores.masked_fill(hidden, -math.inf)
    if sinks is not None:
        column = sinks.double()[:, None, None].expand(-1, q.shape[0], 1)
        scores = torch.cat((scores, column), -1)
    p = scores.softmax(-1)[..., : k.shape[1]]
    return (p @ v).transpose(0, 1)


OPTIONS = (
    {},
    {"softcap": 5.0},
    {"sinks": torch.tensor([-1.0, 3.0, 0.0, 100.0, -math.inf, 1.0])},
    {"window": 20, "softcap": 30.0, "sinks": torch.linspace(-2, 4, 6)},
)
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize(("cache_dtype", "dtype"), pairs())
@pytest.mark.parametrize("options", OPTIONS)
def test_attention_over_the_cache_is_that_over_its_values(
    cache_dtype: torch.dtype, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    options = dict(options)
    window = options.pop("window", -1)
    length, new = 131, 67
    cache = new_cache(4, 2, 64, 32, cache_dtype, value_dim=48)
    table = int32([[2, 0, 3]])
    k, v = random(length, 2, 32, dtype=dtype), random(length, 2, 48, dtype=dtype, seed=1)
    append(k, v, cache, (table, int32([0, length]), int32([length])))
    q = random(new, 6, 32, dtype=dtype, seed=2)
    values = [k.transpose(0, 1).double(), v.transpose(0, 1).double()]
    if cache_dtype == torch.int8:
        values = [
            read_pages(pages, table[0], which)[:, :length].double()
            * read_scales(scales, table[0])[:, :length, None].double()
            for pages, scales, which in (
                (cache.k, cache.k_scales, "k"),
                (cache.v, cache.v_scales, "v"),
            )
        ]
    sinks = options.get("sinks")
    softcap = options.get("softcap", 0.0)
    want = exact_attention(q, *values, window=window, softcap=softcap, sinks=sinks)
    places = (table, int32([0, new]), int32([length]))
    scales = {"k_scales": cache.k_scales, "v_scales": cache.v_scales}
    for isa in ISAS:
        _C.set_isa(isa)
        got = paged_attention(
            q, cache.k, cache.v, *places, window_size=(window, 0), **scales, **options
        )
        error = (got.double() - want).abs().max().item()
        assert error <= TOLERANCES[dtype] * max(1.0, want.abs().max().item()), isa


def test_a_sink_far_above_the_scores_takes_everything() -> None:
    cache = new_cache(1, 1, 64, 16, torch.float16)
    k = random(9, 1, 16, dtype=torch.float16)
    places = (int32([[0]]), int32([0, 9]), int32([9]))
    append(k, k, cache, places)
    o = paged_attention(k, cache.k, cache.v, *places, sinks=torch.tensor([1e4]))
    assert not o.any()


def attention_arguments(cache_dtype: torch.dtype = torch.int8) -> dict[str, Any]:
    cache = new_cache(3, 2, 64, 32, cache_dtype)
    return {
        "q": torch.ones(3, 4, 32),
        "k_cache": cache.k,
        "v_cache": cache.v,
        "block_table": int32([[0, 1]]),
        "cu_seqlens_q": int32([0, 3]),
        "cache_seqlens": int32([70]),
        "k_scales": cache.k_scales,
        "v_scales": cache.v_scales,
    }


META = torch.device("meta")
BAD_ATTENTION: dict[str, dict[str, Any]] = {
    "k_scales is for": {"k_scales": None},
    "v_scales is for": {"v_scales": None},
    "k_scales must be float32 of shape": {"k_scales": torch.ones(3, 2, 32)},
    "v_scales must be float32 of shape": {"v_scales": torch.ones(3, 2, 64).double()},
    "k_scales must be contiguous": {"k_scales": torch.ones(3, 64, 2).transpose(1, 2)},
    "k_scales must be on cpu": {"k_scales": torch.ones(3, 2, 64, device=META)},
    "v_cache must be on cpu": {"v_cache": torch.ones(3, 2, 64, 32, device=META).to(torch.int8)},
    "v_cache must be torch.int8": {"v_cache": torch.ones(3, 2, 64, 32)},
    "k_cache must be float32": {
        "q": torch.ones(3, 4, 32).double(), "k_cache": torch.ones(3, 2, 64, 32).double(),
        "k_scales": None, "v_scales": None
    },
    "k_cache and v_cache must be contiguous": {
        "v_cache": torch.ones(3, 2, 32, 64, dtype=torch.int8).transpose(2, 3)
    },
    "k_cache and v_cache must have shape": {"v_cache": torch.ones(2, 2, 64, 32, dtype=torch.int8)},
    "q must have shape": {"q": torch.ones(3, 4, 16)},
    "q must be float32": {"q": torch.ones(3, 4, 32).double()},
    "q must be on cpu": {"q": torch.ones(3, 4, 32, device=META)},
    "heads of q": {"q": torch.ones(3, 0, 32)},
    "block_table must be on": {"block_table": int32([[0, 1]]).to(META)},
    "cu_seqlens_q must be on": {"cu_seqlens_q": int32([0, 3]).to(META)},
    "cache_seqlens must be on": {"cache_seqlens": int32([70]).to(META)},
    "block_table must be int32": {"block_table": torch.tensor([[0, 1]])},
    r"block_table\[0\] names page 3": {"block_table": int32([[0, 3]])},
    r"block_table\[0\] names page -1": {"block_table": int32([[-1, 0]])},
    r"cache_seqlens\[0\] is 129": {"cache_seqlens": int32([129])},
    r"cache_seqlens\[0\] is -1": {"cache_seqlens": int32([-1])},
    r"cu_seqlens_q must rise": {"cu_seqlens_q": int32([0, 2])},
    "sinks must hold": {"sinks": torch.ones(3)},
    "sinks must hold a": {"sinks": torch.ones(4).int()},
    "sinks must be on": {"sinks": torch.ones(4, device=META)},
    "softcap": {"softcap": -1.0},
    "softcap must": {"softcap": math.nan},
    "window_size": {"window_size": (-2, 0)},
    "window_size must": {"window_size": (5, 1)},
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_ATTENTION)
def test_bad_arguments_of_attention_are_named(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paged_attention(**{**attention_arguments(), **BAD_ATTENTION[message]})


def test_scales_beside_a_float_cache_are_refused() -> None:
    arguments = attention_arguments(torch.float32)
    with pytest.raises(ValueError, match="k_scales is for an int8 cache"):
        paged_attention(**{**arguments, "k_scales": torch.ones(3, 2, 64)})


BAD_APPEND: dict[str, dict[str, Any]] = {
    "k must have shape": {"k": torch.ones(3, 2, 16)},
    "v must have shape": {"v": torch.ones(3, 1, 32)},
    "v must have the 3 tokens": {"v": torch.ones(2, 2, 32)},
    "k and v must be float32": {"k": torch.ones(3, 2, 32).double()},
    "both the same": {"v": torch.ones(3, 2, 32).half()},
    "v must be on cpu": {"v": torch.ones(3, 2, 32, device=META)},
    "v_scales is for": {"v_scales": None},
    "k_scales must be float32": {"k_scales": torch.ones(3, 2, 64).half()},
}


@pytest.mark.parametrize("message", BAD_APPEND)
def test_bad_arguments_of_append_are_named(message: str) -> None:
    good = attention_arguments()
    del good["q"]
    good |= {"k": torch.ones(3, 2, 32), "v": torch.ones(3, 2, 32)}
    with pytest.raises(ValueError, match=message):
        append_kv(**{**good, **BAD_APPEND[message]})
    turns = (int32([0, 1, 2]), torch.ones(4, 8), torch.ones(4, 8))
    names = dict(zip(("positions", "cos", "sin"), turns, strict=True))
    with pytest.raises(ValueError, match=message.split()[0]):
        rope_append_kv(q=torch.ones(3, 4, 32), **names, **{**good, **BAD_APPEND[message]})


HUGE = 2**31 - 1
HOSTILE = (
    ([[HUGE, -1, 3]], [0, 3], [190]),
    ([[0, 1, 2]], [0, 3], [HUGE]),
    ([[0, 1, 2]], [0, 3], [-5]),
    ([[0, 1, 2]], [0, HUGE], [HUGE]),
    ([[0, 1, 2], [2, 1, 0]], [0, 90, -4], [100, 190]),
)


@pytest.mark.parametrize("cache_dtype", [torch.float16, torch.int8])
@pytest.mark.parametrize(("table", "starts", "lengths"), HOSTILE)
def test_native_append_stays_inside_its_tensors_whatever_the_metadata_says(
    cache_dtype: torch.dtype, table: list[list[int]], starts: list[int], lengths: list[int]
) -> None:
    # The tensors are the middles of larger ones: canaries before and after must survive.
    dtype = torch.float32 if cache_dtype == torch.int8 else cache_dtype
    kv, places = torch.ones(3, 2, 32, dtype=dtype), (int32(table), int32(starts), int32(lengths))
    for isa in ISAS:
        _C.set_isa(isa)
        guarded = [t for t in new_cache(9, 2, 64, 32, cache_dtype) if t is not None]
        for tensor in guarded:
            tensor.fill_(7)
        pages = [tensor[3:6].zero_() for tensor in guarded]
        scales = pages[2:] or [None, None]
        _C.append_kv(kv, kv, *pages[:2], *places, *scales)
        for tensor in guarded:
            assert (tensor[:3] == 7).all() and (tensor[6:] == 7).all()


def test_the_native_door_refuses_what_would_leave_the_tensors() -> None:
    cache = new_cache(3, 2, 64, 32, torch.int8)
    places = (int32([[0, 1]]), int32([0, 3]), int32([70]))
    kv, scales = torch.ones(3, 2, 32), torch.ones(3, 2, 64)
    for given in (
        (None, None),
        (scales, None),
        (scales[:2], scales[:2]),
        (scales.half(), scales.half()),
        (torch.ones(3, 64, 2).transpose(1, 2), scales),
    ):
        with pytest.raises(ValueError, match="scales"):
            _C.append_kv(kv, kv, cache.k, cache.v, *places, *given)
    with pytest.raises(ValueError, match="v must be"):
        _C.append_kv(kv, kv.half(), cache.k, cache.v, *places, scales, scales)
    floats = new_cache(3, 2, 64, 32, torch.float32)
    with pytest.raises(ValueError, match="no others"):
        _C.append_kv(kv, kv, floats.k, floats.v, *places, scales, scales)
    with pytest.raises(ValueError, match="dtype"):
        _C.append_kv(kv.half(), kv.half(), floats.k, floats.v, *places, None, None)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("cache_dtype", CACHES)
def test_a_bad_query_stays_in_its_row(cache_dtype: torch.dtype, bad: float) -> None:
    dtype = torch.float32 if cache_dtype == torch.int8 else cache_dtype
    cache = new_cache(3, 2, 64, 32, cache_dtype)
    k = random(100, 2, 32, dtype=dtype)
    table = int32([[2, 0]])
    append(k, k, cache, (table, int32([0, 100]), int32([100])))
    q = random(3, 4, 32, dtype=dtype, seed=5)
    scales = {"k_scales": cache.k_scales, "v_scales": cache.v_scales}
    places = (table, int32([0, 3]), int32([100]))
    for isa in ISAS:
        _C.set_isa(isa)
        clean = paged_attention(q, cache.k, cache.v, *places, **scales)
        dirty = q.clone()
        dirty[1, 2, 5] = bad
        got = paged_attention(dirty, cache.k, cache.v, *places, **scales)
        assert got[1, 2].isnan().all()
        got[1, 2] = clean[1, 2]
        assert torch.equal(got, clean)


def test_a_sequence_over_codes_with_a_nan_scale_past_its_end_is_clean() -> None:
    cache = new_cache(3, 2, 64, 32, torch.int8)
    assert cache.k_scales is not None and cache.v_scales is not None
    k = random(69, 2, 32)
    table = int32([[2, 0]])
    places = (table, int32([0, 69]), int32([69]))
    append(k, k, cache, places)
    scales = {"k_scales": cache.k_scales, "v_scales": cache.v_scales}
    q = random(69, 4, 32, seed=5)
    want = paged_attention(q, cache.k, cache.v, *places, **scales)
    cache.k_scales[0, :, 5:], cache.v_scales[0, :, 5:] = math.nan, math.nan
    for isa in ISAS:
        _C.set_isa(isa)
        got = paged_attention(q, cache.k, cache.v, *places, **scales)
        assert got.isfinite().all()
        torch.testing.assert_close(got, want)


def test_the_reference_agrees_with_itself_paged_differently() -> None:
    cache = new_cache(4, 2, 64, 32, torch.int8)
    k = random(130, 2, 32)
    one, two = copy(cache), copy(cache)
    first, second = int32([[0, 1, 2]]), int32([[3, 0, 1]])
    lengths = (int32([0, 130]), int32([130]))
    append_kv_ref(k, k, *one[:2], first, *lengths, *one[2:])
    append_kv_ref(k, k, *two[:2], second, *lengths, *two[2:])
    q = random(130, 4, 32, seed=1)
    a, b = (
        paged_attention_ref(q, *c[:2], t, *lengths, *c[2:], None, 0.2)
        for c, t in ((one, first), (two, second))
    )
    assert torch.equal(a, b)
