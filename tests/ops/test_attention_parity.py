"""One row of attention, the same bits in a batch, packed, paged and token by token, on the CPU."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllm import _C
from fastllm.ops import append_kv, attention, new_cache, paged_attention
from fastllm.ops.attention_ref import lse_shape

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = _C.isas()
NAN = float("nan")


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def qkv(
    tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype,
    value_dim: int | None = None, seed: int = 0, queries: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q `[queries or tokens, H, D]`, k, v `[tokens, Hk, D]`."""
    g = torch.Generator().manual_seed(tokens + dim + seed)
    shapes = (
        (tokens if queries is None else queries, heads, dim),
        (tokens, kv_heads, dim),
        (tokens, kv_heads, value_dim or dim),
    )
    q, k, v = (torch.randn(shape, generator=g).to(dtype) for shape in shapes)
    return q, k, v


def dense(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    out = attention(q[None], k[None], v[None], causal=True, **how)
    assert isinstance(out, Tensor)
    return out[0]


def between_others(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    """The document as the second of three packed ones; its neighbours are of NaN."""
    before, after = 33, 70
    padded = []
    for x in (q, k, v):
        others = (x.new_full((n, *x.shape[1:]), NAN) for n in (before, after))
        padded.append(torch.cat((next(others), x, next(others))))
    starts, key_starts = (int32([0, *accumulate((before, len(x), after))]) for x in (q, k))
    out = attention(*padded, cu_seqlens_q=starts, cu_seqlens_k=key_starts, causal=True, **how)
    assert isinstance(out, Tensor)
    return out[before : before + len(q)]


def paged(q: Tensor, k: Tensor, v: Tensor, chunks: list[int], **how: Any) -> Tensor:
    """The same through a cache whose pages are shuffled, `chunks` new tokens a step."""
    pages = -(-len(k) // 64)
    g = torch.Generator().manual_seed(pages)
    table = torch.randperm(pages + 1, generator=g)[:pages].view(1, -1).int()
    k_cache, v_cache, *_ = new_cache(
        pages + 1, k.shape[1], 64, k.shape[2], k.dtype, value_dim=v.shape[2]
    )
    outs, done = [], 0
    for n in chunks:
        rows = slice(done, done + n)
        places = (table, int32([0, n]), int32([done + n]))
        append_kv(k[rows], v[rows], k_cache, v_cache, *places)
        outs.append(paged_attention(q[rows], k_cache, v_cache, *places, **how))
        done += n
    assert done == len(k)
    return torch.cat(outs)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window_size": (37, -1)},
    "softcap, sinks": {"softcap": 7.0, "sinks": torch.linspace(-1, 2, 6)},
    "all": {"window_size": (301, -1), "softcap": 3.0, "sinks": torch.linspace(3, -2, 6)},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_batch_packed_prompt_chunks_and_tokens_give_the_same_bits(
    dtype: torch.dtype, variant: str
) -> None:
    how = VARIANTS[variant]
    length, dim, value_dim = 530, 40, 24
    q, k, v = qkv(length, 6, 2, dim, dtype, value_dim)
    for isa in ISAS:
        _C.set_isa(isa)
        torch.set_num_threads(1)
        whole = dense(q, k, v, **how)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            what = f"{isa}, {threads} threads"
            assert torch.equal(dense(q, k, v, **how), whole), what
            assert torch.equal(between_others(q, k, v, **how), whole), f"{what}: packed"
            assert torch.equal(paged(q, k, v, [length], **how), whole), f"{what}: a prompt"
            chunks = [129, 1, 70, 300, *[1] * 30]
            assert torch.equal(paged(q, k, v, chunks, **how), whole), f"{what}: chunks, tokens"
            for last in (1, 7, 200):
                got = dense(q[-last:], k, v, **how)
                assert torch.equal(got, whole[-last:]), f"{what}: the last {last} queries"


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 1, 128), (2, 2, 64), (5, 1, 256)])
def test_every_token_decoded_gives_the_bits_of_the_batch(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int
) -> None:
    q, k, v = qkv(1100, heads, kv_heads, dim, dtype)
    for isa in ISAS:
        _C.set_isa(isa)
        assert torch.equal(paged(q, k, v, [1] * 1100), dense(q, k, v)), isa


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [1, 16, 17, 64, 70, 600])
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 128), (40, 24)])
@pytest.mark.parametrize("isa", ISAS)
def test_one_query_has_the_bits_of_the_last_of_many(
    isa: str, dim: int, value_dim: int, keys: int, dtype: torch.dtype
) -> None:
    """Few rows of float32 read values where they lie, and keys are packed as far as they go."""
    _C.set_isa(isa)
    q, k, v = qkv(keys, 4, 2, dim, dtype, value_dim)
    many = dense(q, k, v)
    assert torch.equal(dense(q[-1:], k, v), many[-1:])
    v = torch.cat((v, torch.full_like(v, NAN)), -1)[..., :value_dim]
    assert torch.equal(between_others(q[-1:], k, v), many[-1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_change_the_bits(dtype: torch.dtype) -> None:
    q, k, v = (x.unflatten(0, (2, 75)) for x in qkv(150, 4, 2, 32, dtype))
    fused = torch.cat((q, k, v), dim=2).contiguous()
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    expanded = k[:, :, :1].expand(k.shape), v[:, :, :1].expand(v.shape)
    for isa in ISAS:
        _C.set_isa(isa)
        whole = attention(q, k, v)
        assert torch.equal(attention(*fused.split((4, 2, 2), dim=2)), whole)
        assert torch.equal(attention(*by_head), whole)
        one_head = attention(q, *(x.contiguous() for x in expanded))
        assert torch.equal(attention(q, *expanded), one_head)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packing_first_or_on_the_way_and_splits_in_parallel_give_the_same_bits(
    dtype: torch.dtype,
) -> None:
    for queries, keys in ((200, 200), (2, 1300), (90, 520)):
        q, k, v = (x[None] for x in qkv(keys, 4, 2, 24, dtype, queries=queries))
        mask = torch.arange(keys)[None] % 7 != 3
        for isa in ISAS:
            _C.set_isa(isa)
            size = _C.attention_scratch(q, k, v, None)
            assert size > 0
            results = []
            for scratch in (None, torch.full((size,), NAN)):
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    o, lse = torch.empty_like(q), torch.empty(lse_shape(q))
                    rest = (None, None, mask, None, scratch, 0.2, 40, 9, 0.0)
                    _C.attention(o, lse, q, k, v, *rest)
                    results.append((o, lse))
            for o, lse in results[1:]:
                assert torch.equal(o, results[0][0]) and torch.equal(lse, results[0][1]), isa


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_behind_a_mask_may_be_anything_and_change_no_bit(dtype: torch.dtype) -> None:
    q, k, v = (x[None] for x in qkv(333, 4, 2, 48, dtype))
    mask = torch.rand(1, 333, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[:, 64:128] = False  # a tile
    hidden = ~mask[..., None, None]
    bad_k, bad_v = k.masked_fill(hidden, NAN), v.masked_fill(hidden, float("inf"))
    for isa in ISAS:
        _C.set_isa(isa)
        for how in ({"causal": True}, {"window_size": (50, 20)}):
            clean = attention(q, k, v, key_mask=mask, **how)
            assert not clean.isnan().any()
            assert torch.equal(attention(q, bad_k, bad_v, key_mask=mask, **how), clean), isa


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", [1, 63, 64, 129, 200])
def test_a_mask_at_the_end_gives_the_bits_of_shorter_keys(dtype: torch.dtype, kept: int) -> None:
    q, k, v = (x[None] for x in qkv(201, 4, 1, 16, dtype))
    mask = torch.arange(201)[None] < kept
    for isa in ISAS:
        _C.set_isa(isa)
        o, lse = attention(q, k, v, key_mask=mask, return_lse=True)
        short = attention(q, k[:, :kept], v[:, :kept], return_lse=True)
        assert torch.equal(o, short[0]) and torch.equal(lse, short[1]), isa


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("left", [0, 1, 60, 130])
def test_keys_outside_every_window_may_be_anything(dtype: torch.dtype, left: int) -> None:
    q, k, v = (x[None] for x in qkv(300, 2, 1, 32, dtype, queries=3))
    first = 297 - left  # the first key that the first query, at position 297, sees
    bad_k, bad_v = k.clone(), v.clone()
    for x in (bad_k, bad_v):
        x[:, :first] = NAN
    for isa in ISAS:
        _C.set_isa(isa)
        for right in (0, 1):
            clean = attention(q, k, v, window_size=(left, right))
            got = attention(q, bad_k, bad_v, window_size=(left, right))
            assert torch.equal(got, clean), (isa, right)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_queries_than_keys(dtype: torch.dtype) -> None:
    q, k, v = (x[None] for x in qkv(70, 4, 2, 64, dtype, queries=200))
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    for isa in ISAS:
        _C.set_isa(isa)
        o, lse = attention(q, k, v, causal=True, return_lse=True)
        assert not o[:, :130].any() and (lse[..., :130] == -float("inf")).all()
        assert torch.equal(o[:, 130:], attention(q[:, 130:], k, v, causal=True)), isa
        o, lse = attention(q, k, v, causal=True, return_lse=True, sinks=sinks)
        assert not o[:, :130].any() and torch.equal(lse[0, :, 0], sinks)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("starts", [[0, 9], [-5, 3], [5, 2], [2**31 - 1, -(2**31)], [0, 2, 1, 6]])
def test_kernels_stay_inside_their_tensors_whatever_cu_seqlens_say(
    dtype: torch.dtype, starts: list[int]
) -> None:
    q, k, v = qkv(6, 2, 1, 16, dtype)
    for isa in ISAS:
        _C.set_isa(isa)
        for cu_q, cu_k in ((starts, [0] * len(starts)), (starts, starts), (starts, starts[::-1])):
            guarded = torch.full((18, 2, 16), 7.0, dtype=dtype)
            lse = torch.full((3, 2, 6), 7.0)
            o = guarded[6:12]
            scratch = torch.empty(_C.attention_scratch(q, k, v, int32(cu_q)))
            rest = (int32(cu_q), int32(cu_k), None, None, scratch, 0.2, -1, -1, 0.0)
            _C.attention(o, lse[1], q, k, v, *rest)
            assert (guarded[:6] == 7).all() and (guarded[12:] == 7).all()
            assert (lse[0] == 7).all() and (lse[2] == 7).all()


def test_empty_tensors_are_legal() -> None:
    for tokens, keys, batch in ((0, 5, 1), (5, 0, 1), (5, 5, 0), (0, 0, 2)):
        q, k = torch.ones(batch, tokens, 2, 16), torch.ones(batch, keys, 1, 16)
        o, lse = attention(q, k, k, return_lse=True)
        assert o.shape == q.shape and not o.any() and lse.shape == (batch, 2, tokens)
        assert (lse == -float("inf")).all() or keys
    o = attention(torch.ones(3, 2, 16), torch.ones(3, 1, 16), torch.ones(3, 1, 16),
                  cu_seqlens_q=int32([0]))  # fmt: skip
    assert isinstance(o, Tensor) and not o.any()
