"""The CUDA C++ row of paged_attention on a GPU: right, batch-invariant, and replayable."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastllm.ops.paged_attention import _paged_attention
from fastllm.ops.paged_cache import quantize_rows

pytestmark = pytest.mark.gpu

# Half a unit in the last place, relative: what one rounding to the dtype may move.
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SUBNORMAL = {torch.bfloat16: 0.0, torch.float16: 2.0**-25}


class Shape(NamedTuple):
    """Heads and dims of a case, and its sequences: new tokens, positions in the cache."""

    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    new: tuple[int, ...]
    cached: tuple[int, ...]
    page: int = 64
    window: int = -1
    softcap: float = 0.0
    sinks: bool = False


SHAPES = (
    Shape(3, 3, 64, 64, (1, 1, 1, 1), (63, 0, 64, 65), page=16),
    Shape(4, 1, 80, 80, (1, 1, 1), (511, 512, 513), window=37, sinks=True),
    Shape(32, 8, 128, 128, (1,) * 5, (1, 5000, 1100, 130, 17000)),
    Shape(7, 1, 192, 128, (3, 0, 2, 20), (600, 5, 2, 70), page=48, softcap=5.0),
    Shape(16, 1, 256, 256, (1, 1), (1500, 40), sinks=True, window=600),
    Shape(9, 3, 64, 64, (130,), (700,), page=128),
)


def row() -> object:
    """The function of the table's row; skips where the extension was built without CUDA."""
    found = [r.fn for r in _paged_attention.tables["cuda"] if r.name == "cuda"]
    if not found:
        pytest.skip("the extension was built without CUDA kernels (nvcc was not found)")
    return found[0]


def make(shape: Shape, dtype: torch.dtype, codes: bool, seed: int = 0) -> list[object]:
    """Arguments of the op: pages in random order, NaN where no sequence has a key."""
    g = torch.Generator("cuda").manual_seed(seed)
    width = -(-max(shape.cached) // shape.page) + 1
    pages = len(shape.cached) * width + 1
    table = torch.randperm(pages, generator=g, device="cuda")[: len(shape.cached) * width]
    table = table.view(len(shape.cached), width).int()
    q = torch.randn(
        sum(shape.new), shape.heads, shape.dim, generator=g, device="cuda", dtype=torch.float32
    ).to(dtype)
    cache: list[Tensor] = []
    scales: list[Tensor | None] = []
    for dim in (shape.dim, shape.value_dim):
        x = torch.full((pages, shape.kv_heads, shape.page, dim), float("nan"), device="cuda")
        for s, length in enumerate(shape.cached):
            for at in range(0, length, shape.page):
                n = min(shape.page, length - at)
                rows = torch.randn(shape.kv_heads, n, dim, generator=g, device="cuda")
                x[int(table[s, at // shape.page]), :, :n] = rows
        values, scale = quantize_rows(x) if codes else (x.to(dtype), None)
        cache.append(values)
        scales.append(scale)
    sinks = torch.randn(shape.heads, generator=g, device="cuda") if shape.sinks else None
    starts = torch.tensor([0, *accumulate(shape.new)], dtype=torch.int32, device="cuda")
    lengths = torch.tensor(shape.cached, dtype=torch.int32, device="cuda")
    return [q, *cache, table, starts, lengths, *scales, sinks, shape.dim**-0.5, shape.window,
            shape.softcap]  # fmt: skip


def exact(shape: Shape, args: list[object]) -> tuple[Tensor, Tensor]:
    """Output in float64, and for each element how far rounding P and the output may move it."""
    q, k_cache, v_cache, table, starts, _, k_scales, v_scales, sinks, scale = args[:10]
    group = shape.heads // shape.kv_heads
    dtype = q.dtype
    o = torch.zeros(*q.shape[:2], shape.value_dim, dtype=torch.float64, device="cuda")
    bound = torch.zeros_like(o)
    for s, length in enumerate(shape.cached):
        rows = slice(int(starts[s]), int(starts[s + 1]))
        new = rows.stop - rows.start
        if not length or not new:
            continue
        used = table[s, : -(-length // shape.page)].long()

        def gather(x: Tensor, used: Tensor = used, length: int = length) -> Tensor:
            return x[used].transpose(0, 1).flatten(1, 2)[:, :length].double()

        k, v = gather(k_cache), gather(v_cache)
        scores = q[rows].double().transpose(0, 1).unflatten(0, (-1, group)) @ k[:, None].mT
        p_scale = torch.ones_like(v[..., 0])
        if k_scales is not None:
            scores = scores * gather(k_scales)[:, None, None]
            p_scale = gather(v_scales)
        scores = scores * scale
        if shape.softcap:
            scores = shape.softcap * (scores / shape.softcap).tanh()
        key = torch.arange(length, device="cuda")
        query = key[length - new :, None]
        visible = key <= query
        if shape.window >= 0:
            visible &= key >= query - shape.window
        scores = scores.masked_fill(~visible, float("-inf"))
        top = scores.amax(-1, keepdim=True)
        p = (scores - top).exp()
        total = p.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + (sinks.double().view(-1, group, 1, 1) - top).exp()
        p = p * p_scale[:, None, None]
        out = p @ v[:, None] / total
        moved = ((UNIT[dtype] + 2e-5) * p + SUBNORMAL[dtype]) @ v.abs()[:, None] / total
        moved = moved + UNIT[dtype] * out.abs() + SUBNORMAL[dtype]
        o[rows], bound[rows] = (x.flatten(0, 1).transpose(0, 1) for x in (out, moved))
    return o, bound


@pytest.mark.parametrize("codes", [False, True], ids=["half", "int8"])
@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.heads}-{s.kv_heads}x{s.dim}")
def test_results_are_within_their_rounding_of_float64(
    shape: Shape, dtype: torch.dtype, codes: bool
) -> None:
    run = row()
    args = make(shape, dtype, codes)
    want, bound = exact(shape, args)
    got = run(*args)
    assert got.dtype == dtype and got.shape == want.shape
    error = (got.double() - want).abs()
    assert (error <= bound).all(), f"{(error / bound).nan_to_num(0).max().item():.2f} of the bound"


@pytest.mark.parametrize("codes", [False, True], ids=["half", "int8"])
def test_a_sequence_alone_has_the_bits_it_has_in_a_batch(codes: bool) -> None:
    run = row()
    args = make(SHAPES[2], torch.bfloat16, codes)
    together = run(*args)
    for s in range(len(SHAPES[2].cached)):
        alone = list(args)
        alone[0] = args[0][s : s + 1]
        alone[3] = args[3][s : s + 1]
        alone[4] = torch.tensor([0, 1], dtype=torch.int32, device="cuda")
        alone[5] = args[5][s : s + 1]
        assert torch.equal(run(*alone)[0], together[s])


def test_a_captured_call_reads_lengths_when_it_is_replayed() -> None:
    run = row()
    shape = SHAPES[2]
    args = make(shape, torch.bfloat16, False)
    lengths = args[5].clone()
    args[5] = torch.ones_like(lengths)
    run(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = run(*args)
    args[5].copy_(lengths)
    graph.replay()
    torch.cuda.synchronize()
    replayed = o.clone()
    assert torch.equal(replayed, run(*args))


def test_lying_metadata_touches_nothing_outside() -> None:
    run = row()
    args = make(SHAPES[1], torch.bfloat16, False)
    huge = 2**31 - 1
    for table, length in ((huge, 513), (-1, 513), (0, huge), (0, -5)):
        lying = list(args)
        lying[3] = torch.full_like(args[3], table)
        lying[5] = torch.full_like(args[5], length)
        run(*lying)
        torch.cuda.synchronize()  # an access outside would raise here
