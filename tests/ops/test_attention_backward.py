"""attention_backward on the CPU: the same bits however it is run, and nothing leaks.

Its values are tested with those of the other ops, on the cases of its OpInfo (test_ops.py).
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllm import _C
from fastllm.ops.attention_ref import attention_ref
from fastllm.ops.registry import OPS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = _C.isas()


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def backward(*args: Any) -> tuple[Tensor, ...]:
    rows = {row.name: row.fn for row in OPS["attention_backward"].tables["cpu"]}
    return rows["native"](*args)


class Documents:
    """Random documents with grad_o and the o and lse of the reference's forward."""

    def __init__(
        self,
        lengths: list[tuple[int, int]],
        heads: int,
        kv_heads: int,
        dim: int,
        dtype: torch.dtype,
        *,
        value_dim: int | None = None,
        numbers: tuple[float, int, int, float] = (0.125, -1, 0, 0.0),
        sinks: bool = False,
        masked: bool = False,
    ) -> None:
        g = torch.Generator().manual_seed(dim + heads)
        value_dim = value_dim or dim
        self.numbers = numbers
        self.sinks = torch.randn(heads, generator=g) if sinks else None
        self.documents = []
        for queries, keys in lengths:
            q = torch.randn(queries, heads, dim, generator=g).to(dtype)
            k = torch.randn(keys, kv_heads, dim, generator=g).to(dtype)
            v = torch.randn(keys, kv_heads, value_dim, generator=g).to(dtype)
            mask = torch.rand(keys, generator=g) < 0.8 if masked else None
            starts = int32([0, queries]), int32([0, keys])
            o, lse = attention_ref(q, k, v, *starts, mask, self.sinks, *numbers)
            grad_o = torch.randn(o.shape, generator=g).to(dtype)
            grad_lse = torch.randn(lse.shape, generator=g)
            self.documents.append((grad_o, grad_lse, q, k, v, o, lse, mask))

    def arguments(self, which: list[int]) -> list[Any]:
        """Arguments of the op for documents one after the other."""
        parts = [self.documents[s] for s in which]
        together = [
            None if xs[0] is None else torch.cat(xs, -1 if i in (1, 6) else 0)
            for i, xs in enumerate(zip(*parts, strict=True))
        ]
        *tensors, mask = together
        starts = (int32([0, *accumulate(p[i].shape[0] for p in parts)]) for i in (2, 3))
        return [*tensors, *starts, mask, self.sinks, *self.numbers]

    def run(self, which: list[int]) -> list[tuple[Tensor, ...]]:
        """(dq, dk, dv) of each of the documents, computed together."""
        dq, dk, dv, _ = backward(*self.arguments(which))
        queries = [self.documents[s][2].shape[0] for s in which]
        keys = [self.documents[s][3].shape[0] for s in which]
        return list(zip(dq.split(queries), dk.split(keys), dv.split(keys), strict=True))


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"numbers": (0.1, 37, 5, 2.0), "sinks": True, "masked": True, "value_dim": 24},
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_threads_and_the_number_of_passes_do_not_change_the_bits(
    dtype: torch.dtype, variant: dict[str, Any]
) -> None:
    # One KV head: a single thread makes one pass, more threads make two.
    args = Documents([(200, 333)], 3, 1, 40, dtype, **variant).arguments([0])
    for isa in ISAS:
        _C.set_isa(isa)
        torch.set_num_threads(1)
        alone = backward(*args)
        assert same(backward(*args), alone), f"{isa}: two runs differ"
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert same(backward(*args), alone), f"{isa}, {threads} threads"


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_gradients_summed_in_scratch_have_the_same_bits(dtype: torch.dtype) -> None:
    # 1.1 MB of dQ for the one KV head: too much for a thread to keep.
    args = Documents([(1100, 1100)], 2, 1, 128, dtype).arguments([0])
    torch.set_num_threads(1)
    alone = backward(*args)
    torch.set_num_threads(2)
    assert same(backward(*args), alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_document_alone_and_among_others_gives_the_same_bits(
    dtype: torch.dtype, variant: dict[str, Any]
) -> None:
    lengths = [(70, 70), (3, 130), (1, 1), (129, 40), (64, 64), (17, 200)]
    documents = Documents(lengths, 4, 2, 24, dtype, **variant)
    for isa in ISAS:
        _C.set_isa(isa)
        alone = [documents.run([s])[0] for s in range(6)]
        for order in (list(range(6)), [5, 2, 0, 3]):
            for s, got in zip(order, documents.run(order), strict=True):
                assert same(got, alone[s]), f"{isa}, document {s}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_batches_and_packed_documents_give_the_same_bits(dtype: torch.dtype) -> None:
    documents = Documents([(100, 100)] * 3, 4, 2, 32, dtype, masked=True)
    packed = documents.run([0, 1, 2])
    args = documents.arguments([0, 1, 2])
    for i in (0, 2, 3, 4, 5, 9):
        args[i] = args[i].unflatten(0, (3, 100))
    for i in (1, 6):
        args[i] = args[i].unflatten(1, (3, 100)).transpose(0, 1)
    args[6] = args[6].contiguous()
    args[7] = args[8] = None
    # Views with other strides: heads first, and heads of a fused projection.
    for i in (0, 5):
        args[i] = args[i].transpose(1, 2).contiguous().transpose(1, 2)
    args[2:5] = torch.cat(args[2:5], 2).split((4, 2, 2), 2)
    batched = backward(*args)[:3]
    for b in range(3):
        assert same([x[b] for x in batched], packed[b])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_hidden_keys_and_dead_rows_hold_does_not_matter(dtype: torch.dtype) -> None:
    # Keys before every window, masked keys, keys and rows past the last document.
    documents = Documents([(70, 150)], 2, 1, 40, dtype, masked=True, numbers=(0.2, 20, 0, 0.0))
    args = documents.arguments([0])
    nan = float("nan")
    tail = [torch.full_like(args[i][:5], nan) for i in (0, 2, 3, 4, 5)]
    hidden = ~args[9]
    hidden[:60] = True
    for isa in ISAS:
        _C.set_isa(isa)
        clean = backward(*args)
        dirty = list(args)
        for i in (3, 4):
            dirty[i] = args[i].clone()
            dirty[i][hidden] = nan
        for i, extra in zip((0, 2, 3, 4, 5), tail, strict=True):
            dirty[i] = torch.cat((dirty[i], extra))
        for i in (1, 6):
            dirty[i] = torch.cat((args[i], args[i][:, :5]), 1)
        dirty[9] = torch.cat((args[9], torch.ones(5, dtype=torch.bool)))
        got = backward(*dirty)
        for g, c in zip(got[:3], clean[:3], strict=True):
            assert torch.equal(g[: c.shape[0]], c)
            assert not g[c.shape[0] :].any()
        for g in got[1:3]:
            assert not g[: hidden.shape[0]][hidden].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_see_nothing_have_no_gradient(dtype: torch.dtype) -> None:
    # 60 more queries than keys: causal rows before key 0 see none of them.
    args = Documents([(90, 30)], 2, 2, 16, dtype).arguments([0])
    assert args[6][:, :60].isinf().all()
    for isa in ISAS:
        _C.set_isa(isa)
        clean = backward(*args)
        assert not clean[0][:60].any()
        assert clean[0][60:].any()
        dirty = list(args)
        for i in (0, 2):
            dirty[i] = args[i].clone()
            dirty[i][:60] = float("nan")
        assert same(backward(*dirty)[:3], clean[:3])


def test_lengths_that_lie_stay_inside_their_tensors() -> None:
    args = Documents([(70, 70)], 2, 1, 16, torch.float32).arguments([0])
    for starts in ([0, 1000], [-5, 70], [60, 10], [50, 2**31 - 1], [-(2**31), 0]):
        args[7] = args[8] = int32(starts)
        backward(*args)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", (64, 128, 256))
def test_long_documents_give_the_same_bits(dtype: torch.dtype, dim: int) -> None:
    lengths = [(2100, 2100), (700, 1500), (1, 900)]
    for heads, kv_heads in ((8, 2), (5, 1)):
        documents = Documents(lengths, heads, kv_heads, dim, dtype, numbers=(0.1, 800, 0, 0.0))
        for isa in ISAS:
            _C.set_isa(isa)
            torch.set_num_threads(1)
            alone = [documents.run([s])[0] for s in range(3)]
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                for s, got in enumerate(documents.run([0, 1, 2])):
                    assert same(got, alone[s]), (isa, threads, s)
