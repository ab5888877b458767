"""attention: gradients by differences, tracing, drawn shapes, the backend table, hostile input."""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fastllm import _C
from fastllm.graph import capture
from fastllm.ops import attention
from fastllm.ops.attention import _attention, _attention_backward
from fastllm.ops.registry import Op
from fastllm.testing.check import Judge
from fastllm.testing.infos.attention import (
    DTYPES,
    Problem,
    _peer,
    exact_attention,
    make_arguments,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 2)},
    "causal window, softcap": {"causal": True, "window_size": (2, -1), "softcap": 2.0},
    "padding": {"key_mask": torch.tensor([[True, False, True, True, True, True, False]] * 2)},
}


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(len(shapes))
    return [torch.randn(s, generator=g, dtype=dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("with_sinks", [False, True], ids=["", "sinks"])
def test_gradcheck_of_the_reference(name: str, with_sinks: bool) -> None:
    q, k, v, sinks = leaves((2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 16), (4,))

    def run(*args: Tensor) -> Any:
        return attention(
            *args[:3], sinks=args[3] if with_sinks else None, return_lse=True, **VARIANTS[name]
        )

    leaves_of_run = (q, k, v, sinks) if with_sinks else (q, k, v)
    assert torch.autograd.gradcheck(run, leaves_of_run, fast_mode=True)


def test_gradcheck_of_the_reference_on_packed_documents() -> None:
    q, k, v = leaves((9, 2, 8), (11, 1, 8), (11, 1, 8))
    places = {"cu_seqlens_q": int32([0, 3, 3, 8]), "cu_seqlens_k": int32([0, 4, 6, 10])}
    packed = functools.partial(attention, causal=True, **places)
    assert torch.autograd.gradcheck(packed, (q, k, v), fast_mode=True)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_a_compiled_step_gives_the_eager_bits(backend: str, packed: bool) -> None:
    lead = (10,) if packed else (2, 5)
    args = leaves((*lead, 4, 16), (*lead, 2, 16), (*lead, 2, 16), (4,), dtype=torch.bfloat16)
    places = {"cu_seqlens_q": int32([0, 3, 10])} if packed else {}

    def step(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        o, lse = attention(
            q, k, v, **places, causal=True, sinks=sinks, softcap=3.0, return_lse=True
        )
        return o.float().square().sum() + lse.sum()

    eager = torch.autograd.grad(step(*args), args)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for a, b in zip(eager, torch.autograd.grad(compiled(*args), args), strict=True):
        assert torch.equal(a, b)


def test_a_fake_trace_of_a_step_reads_no_values() -> None:
    args = leaves((10, 4, 16), (10, 2, 16), (10, 2, 16), (4,), dtype=torch.bfloat16)

    def step(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, cu: Tensor) -> tuple[Tensor, ...]:
        o = attention(q, k, v, cu_seqlens_q=cu, causal=True, sinks=sinks, window_size=(5, 0))
        assert isinstance(o, Tensor)
        return torch.autograd.grad(o.float().sum(), (q, k, v, sinks))

    graph = make_fx(step, tracing_mode="fake")(*args, int32([0, 3, 10])).graph
    called = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert {"fastllm.attention.default", "fastllm.attention_backward.default"} <= called
    depend_on_data = {"item", "_local_scalar_dense", "nonzero", "unique", "masked_select", "tolist"}
    assert not {part for name in called for part in name.split(".")} & depend_on_data


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    layout = draw(st.sampled_from(["packed", "batch", "fused", "transposed"]))
    length = st.integers(0, 70)
    count = draw(st.integers(1, 3))
    if layout == "packed":
        q, k = (tuple(draw(length) for _ in range(count)) for _ in range(2))
    else:
        q, k = (draw(length),) * count, (draw(length),) * count
        k = q if layout == "fused" else k
    kv_heads = draw(st.integers(1, 3))
    dim = 8 * draw(st.integers(2, 20))
    return Problem(
        q=q, k=k, layout=layout, kv_heads=kv_heads, heads=kv_heads * draw(st.integers(1, 5)),
        dim=dim, value_dim=None if layout == "fused" else 8 * draw(st.integers(2, 20)),
        left=draw(st.integers(-1, 80)), right=draw(st.integers(-1, 20)),
        softcap=draw(st.sampled_from([0.0, 2.0])), sinks=draw(st.booleans()),
        masked=draw(st.booleans()),
    )  # fmt: skip


def check_drawn(problem: Problem, dtype: torch.dtype) -> None:
    def draw(number: int) -> tuple[Any, Any]:
        args = make_arguments(torch.Generator().manual_seed(number), problem, dtype)
        return exact_attention(*args), _peer(*args)

    args = make_arguments(torch.Generator().manual_seed(0), problem, dtype)
    # A drawn problem may have one visible pair: its peer's error is chance for more than 8 draws.
    Judge(draw, draws=100).check(_attention(*args), problem.label)


# One chain of 16 products put its log-sum-exp past the bound.
SHORT_ROWS = Problem(
    q=(3, 3, 3), heads=9, kv_heads=3, dim=16, left=1, sinks=True, masked=True, layout="fused"
)


@example(SHORT_ROWS, torch.float32)
@given(problems(), st.sampled_from(DTYPES))
@settings(max_examples=40, deadline=None)
def test_drawn_shapes_and_strides(problem: Problem, dtype: torch.dtype) -> None:
    check_drawn(problem, dtype)


@pytest.mark.full
@given(problems(), st.sampled_from(DTYPES))
@settings(max_examples=1500, deadline=None)
def test_many_drawn_shapes_and_strides(problem: Problem, dtype: torch.dtype) -> None:
    check_drawn(problem, dtype)


HEAD_DIMS = (*range(16, 257, 8), 512)
TABLE: dict[str, dict[str, Any]] = {
    "full": {}, "causal": {"right": 0}, "window": {"left": 4, "right": 0},
    "two-sided window": {"left": 4, "right": 2}, "softcap": {"right": 0, "softcap": 2.0},
    "sinks": {"right": 0, "sinks": True}, "padding": {"masked": True}, "scale": {"scale": 0.3},
    "shorter queries": {"k": (9, 0, 5), "right": 0}, "longer queries": {"k": (1, 2, 0)},
    "all heads their own": {"kv_heads": 4}, "one key head": {"kv_heads": 1},
    "other value dim": {"dim": 192, "value_dim": 128}, "empty": {"q": (0, 0)},
    "batch": {"q": (3, 3), "layout": "batch"}, "fused": {"q": (3, 3), "layout": "fused"},
    "transposed": {"q": (3, 3), "layout": "transposed"},
    **{f"head dim {dim}": {"dim": dim} for dim in HEAD_DIMS},
}  # fmt: skip


def serving(op: Op, device: str, args: tuple[Any, ...], dtype: torch.dtype) -> str:
    """The name of the row that the table of `device` gives these arguments."""
    for row in op.tables[device]:
        if not row.opt_in and dtype in row.dtypes and (row.when is None or row.when(*args)):
            return row.name
    return "reference"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", TABLE)
def test_every_variant_has_a_native_and_a_triton_row(variant: str, dtype: torch.dtype) -> None:
    problem = Problem(**{"q": (3, 0, 4), **TABLE[variant]})
    args = make_arguments(torch.Generator().manual_seed(0), problem, dtype)
    o, lse = _attention(*args)
    backward = o, lse, *args[:3], o, lse, *args[3:]
    for device, name in (("cpu", "native"), ("cuda", "triton")):
        assert serving(_attention, device, args, dtype) == name
        assert serving(_attention_backward, device, backward, dtype) == name


def good() -> dict[str, Any]:
    q, k, v = (torch.ones(2, 5, h, 16) for h in (4, 2, 2))
    return {"q": q, "k": k, "v": v}


def packed_arguments(**changed: Any) -> dict[str, Any]:
    q, k, v = (torch.ones(5, h, 16) for h in (4, 2, 2))
    return {"q": q, "k": k, "v": v, "cu_seqlens_q": int32([0, 2, 5]), **changed}


BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "three dimensions without cu_seqlens": ("q", {**good(), "q": torch.ones(5, 4, 16)}),
    "batches differ": ("k", {**good(), "k": torch.ones(3, 5, 2, 16)}),
    "dtypes differ": ("v", {**good(), "v": torch.ones(2, 5, 2, 16).bfloat16()}),
    "devices differ": ("k", {**good(), "k": torch.ones(2, 5, 2, 16, device="meta")}),
    "integers": ("q", {n: x.int() for n, x in good().items()}),
    "head dims differ": ("k", {**good(), "k": torch.ones(2, 5, 2, 24)}),
    "heads do not divide": ("heads of q", {**good(), "q": torch.ones(2, 5, 3, 16)}),
    "no heads": ("heads of q", {**good(), "q": torch.ones(2, 5, 0, 16)}),
    "no key heads": ("heads of q", {n: x[:, :, : 4 * (n == "q")] for n, x in good().items()}),
    "values of other tokens": ("v", {**good(), "v": torch.ones(2, 6, 2, 16)}),
    "an empty head dim": ("head dims", {n: x[..., :0] for n, x in good().items()}),
    "cu_seqlens int64": ("cu_seqlens_q", packed_arguments(cu_seqlens_q=torch.tensor([0, 5]))),
    "cu_seqlens descend": ("cu_seqlens_q", packed_arguments(cu_seqlens_q=int32([0, 4, 3]))),
    "cu_seqlens from 1": ("cu_seqlens_q", packed_arguments(cu_seqlens_q=int32([1, 4]))),
    "cu_seqlens past the end": ("cu_seqlens_q", packed_arguments(cu_seqlens_q=int32([0, 6]))),
    "cu_seqlens of k": ("cu_seqlens_k", packed_arguments(cu_seqlens_k=int32([0, 2, 9]))),
    "cu_seqlens count": ("cu_seqlens_k", packed_arguments(cu_seqlens_k=int32([0, 5]))),
    "no cu_seqlens of q": ("cu_seqlens", {**good(), "cu_seqlens_k": int32([0, 5])}),
    "mask shape": ("key_mask", {**good(), "key_mask": torch.ones(2, 4).bool()}),
    "mask dtype": ("key_mask", {**good(), "key_mask": torch.ones(2, 5)}),
    "sinks shape": ("sinks", {**good(), "sinks": torch.ones(2)}),
    "window": ("window_size", {**good(), "window_size": (-2, 0)}),
    "softcap": ("softcap", {**good(), "softcap": -1.0}),
    "softcap NaN": ("softcap", {**good(), "softcap": float("nan")}),
    "softcap None": ("softcap", {**good(), "softcap": None}),
    "window None": ("window_size", {**good(), "window_size": None}),
    "window of one": ("window_size", {**good(), "window_size": 3}),
    "window of fractions": ("window_size", {**good(), "window_size": (1.5, 0)}),
    "window of None": ("window_size", {**good(), "window_size": (None, 0)}),
    "window too large": ("window_size", {**good(), "window_size": (2**63, 0)}),
    "sparse": ("q must be a strided", {**good(), "q": good()["q"].to_sparse()}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    argument, kwargs = BAD[name]
    with pytest.raises(ValueError, match=argument):
        attention(**kwargs)


@pytest.mark.parametrize("name", ["q", "v", "cu_seqlens_q", "key_mask", "sinks"])
def test_what_is_no_tensor_is_named(name: str) -> None:
    arguments = packed_arguments() if name == "cu_seqlens_q" else good()
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got list"):
        attention(**{**arguments, name: [0, 5]})


def test_any_strides_of_masks_sinks_and_starts_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for op in (_attention, _attention_backward):
        monkeypatch.setattr(op, "ref", None)  # the kernels serve all
    q, k, v = leaves((2, 5, 4, 16), (2, 5, 2, 16), (2, 5, 2, 16), dtype=torch.float32)
    masks = torch.rand(5, 2).lt(0.6).t(), torch.tensor([[True], [False]]).expand(2, 5)
    sinks = torch.arange(8.0)[::2], torch.ones(1).expand(4)
    starts = int32([0, 9, 2, 9, 5, 9])[::2]

    def results(mask: Tensor, sink: Tensor, cu: Tensor) -> list[Tensor]:
        dense = attention(q, k, v, key_mask=mask, sinks=sink)
        packed = attention(q[0], k[0], v[0], cu_seqlens_q=cu, key_mask=mask[0])
        assert isinstance(dense, Tensor) and isinstance(packed, Tensor)
        return [dense, packed, *torch.autograd.grad((dense.sum(), packed.sum()), (q, k, v))]

    for mask, sink in zip(masks, sinks, strict=True):
        tidy = results(mask.contiguous(), sink.contiguous(), starts.contiguous())
        for a, b in zip(results(mask, sink, starts), tidy, strict=True):
            assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"key_mask must have .* graph capture"), capture():
        attention(q, k, v, key_mask=masks[0])


def test_logits_past_float32_are_as_documented() -> None:
    q, v = torch.full((1, 1, 1, 16), 1e20), torch.randn(1, 2, 1, 16)
    up, down = (torch.full((1, 1, 1, 16), x) for x in (1e20, -1e20))
    native = functools.partial(attention, return_lse=True)
    o, lse = native(q, torch.cat((up, down), 1), v)
    assert o.isnan().all()
    o, lse = native(q, torch.cat((down, down), 1), v)
    assert not o.any() and (lse == float("-inf")).all()
    o, lse = native(q, torch.cat((down, up * 0), 1), v)
    assert torch.equal(o[0, 0], v[0, 1])


def test_memory_grows_with_the_length_not_its_square() -> None:
    forward, backward = [], []
    for length in (4096, 8192, 16384):
        q, k = torch.empty(1, length, 8, 64), torch.empty(1, length, 2, 64)
        forward.append(_C.attention_scratch(q, k, k, None))
        backward.append(_C.attention_backward_scratch(1, 1, length, 8, 2, 64))
    for small, large in (*pairwise(forward), *pairwise(backward)):
        assert 0 < large <= 2 * small
    assert max(forward + backward) <= 4 * (8 + 2 + 2) * 64 * 16384  # of q, k and v


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_keys_give_zero_and_no_gradient(dtype: torch.dtype) -> None:
    q, k, v = leaves((1, 70, 2, 16), (1, 3, 1, 16), (1, 3, 1, 16), dtype=dtype)
    o, lse = attention(q, k, v, causal=True, return_lse=True)
    assert not o[:, :67].any()
    assert (lse[..., :67] == float("-inf")).all() and lse[..., 67:].isfinite().all()
    dq, dk, dv = torch.autograd.grad(o.float().sum(), (q, k, v))
    assert not dq[:, :67].any()
    assert dq[:, 68:].any() and dk.any() and dv.any()
    assert all(g.isfinite().all() for g in (dq, dk, dv))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_query_spoils_its_own_row_alone(dtype: torch.dtype, bad: float) -> None:
    q, k, v = (
        x.detach() for x in leaves((1, 70, 2, 16), (1, 70, 1, 16), (1, 70, 1, 16), dtype=dtype)
    )
    clean = attention(q, k, v, causal=True)
    q[0, 30, 1, 3] = bad
    got = attention(q, k, v, causal=True)
    assert isinstance(clean, Tensor) and isinstance(got, Tensor)
    assert not got[0, 30, 1].isfinite().all()
    got[0, 30, 1] = clean[0, 30, 1]
    assert torch.equal(got, clean)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_enormous_logits_take_the_largest_key(dtype: torch.dtype) -> None:
    q = torch.full((1, 1, 1, 16), 200.0, dtype=dtype)
    k = torch.full((1, 80, 1, 16), -200.0, dtype=dtype)
    k[0, 41] = 200.0
    v = torch.arange(80.0).to(dtype).view(1, 80, 1, 1).expand(1, 80, 1, 16)
    args = [x.clone().requires_grad_() for x in (q, k, v)]
    for scale in (1e4, 1e30):  # lse in fp32 cannot carry their gradients, which must be finite
        o = attention(*args, softmax_scale=scale)
        assert isinstance(o, Tensor)
        assert (o == 41).all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(o.float().sum(), args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_scale_of_zero_is_the_mean(dtype: torch.dtype) -> None:
    q, k, v = leaves((1, 3, 2, 16), (1, 70, 1, 16), (1, 70, 1, 16), dtype=dtype)
    o = attention(q, k, v, softmax_scale=0.0)
    assert isinstance(o, Tensor)
    torch.testing.assert_close(o[0, 0, 0].float(), v[0, :, 0].float().mean(0), atol=5e-3, rtol=5e-3)
    dq, _, dv = torch.autograd.grad(o.float().sum(), (q, k, v))
    assert not dq.any()
    torch.testing.assert_close(dv.float(), torch.full((1, 70, 1, 16), 6 / 70), atol=1e-3, rtol=1e-2)


def test_what_is_hidden_may_be_anything() -> None:
    for dtype in DTYPES:
        q, k, v = leaves((8, 2, 16), (140, 1, 16), (140, 1, 16), dtype=dtype)
        cu_q, cu_k = int32([0, 8]), int32([0, 70])
        mask = torch.ones(140).bool()
        mask[5:8] = False
        runs = []
        for garbage in (0.0, float("nan")):
            with torch.no_grad():
                k[5:8], v[5:8], k[70:], v[70:] = (garbage,) * 4
            o = attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, key_mask=mask)
            assert isinstance(o, Tensor)
            runs.append((o, *torch.autograd.grad(o.float().square().sum(), (q, k, v))))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
        assert not runs[1][2][70:].any() and not runs[1][3][5:8].any()
