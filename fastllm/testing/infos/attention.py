"""Cases of attention and attention_backward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ops.attention_ref import (
    attention_backward_ref,
    attention_ref,
    documents,
    lse_shape,
    visible_keys,
)
from ...ops.registry import FLOATS
from ..opinfo import Args, Case, OpInfo

DTYPES = FLOATS


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Documents and a variant. `layout`: packed documents, `[B, T, H, D]`, views of one fused
    projection, or the transposed `[B, H, T, D]` of torch's attention (the last three: one length).
    """

    q: tuple[int, ...]
    k: tuple[int, ...] | None = None  # default: q
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    value_dim: int | None = None
    left: int = -1
    right: int = -1
    softcap: float = 0.0
    sinks: bool = False
    masked: bool = False
    scale: float | None = None
    layout: Literal["packed", "batch", "fused", "transposed"] = "packed"

    @property
    def keys(self) -> tuple[int, ...]:
        return self.q if self.k is None else self.k

    @property
    def label(self) -> str:
        lengths = "+".join(f"{n}of{m}" for n, m in zip(self.q, self.keys, strict=True))
        text = f"{self.layout}-{lengths}-{self.heads}h{self.kv_heads}-d{self.dim}"
        text += f"v{self.value_dim}" if self.value_dim else ""
        text += f"-w{self.left},{self.right}" if max(self.left, self.right) >= 0 else "-full"
        text += f"-cap{self.softcap:g}" if self.softcap else ""
        text += f"-scale{self.scale:g}" if self.scale else ""
        return text + "-sinks" * self.sinks + "-masked" * self.masked


# Together: every head-dim class and Dv != D, GQA 1 to 7, lengths 0, 1 and odd, q shorter and longer
# than k, windows on either side, several splits of 512, every variant alone and all at once.
PROBLEMS = (
    Problem(q=(1, 3), k=(5, 20), heads=2, kv_heads=2, dim=16, right=0),
    Problem(q=(0,), layout="batch", right=0),
    Problem(q=(5, 0, 17), k=(9, 3, 17), dim=24, right=0),
    Problem(q=(70, 3), k=(70, 0), heads=3, kv_heads=3, dim=40),
    Problem(q=(67, 67), heads=9, kv_heads=3, layout="batch", right=0),
    Problem(q=(130,), heads=2, kv_heads=1, dim=80, left=20, right=0, layout="fused"),
    Problem(q=(33, 33), k=(97, 97), dim=32, left=5, right=9, layout="transposed"),
    Problem(q=(90,), k=(20,), dim=48, right=0, sinks=True),
    Problem(q=(3, 70), k=(40, 70), dim=96, value_dim=64, right=0, softcap=3.0),
    Problem(q=(65, 65), heads=7, kv_heads=1, dim=128, masked=True, layout="batch"),
    Problem(
        q=(66, 9), k=(70, 2), dim=72, value_dim=104, left=30, right=0, softcap=2.0, sinks=True,
        masked=True, scale=0.3,
    ),
    Problem(q=(40,), k=(1200,), heads=2, kv_heads=1, dim=64, left=700, right=0),
    Problem(q=(1, 2), k=(1100, 513), heads=4, kv_heads=1, dim=128, right=0, sinks=True),
    Problem(q=(64,), heads=2, kv_heads=1, dim=192, value_dim=128, right=0),
    Problem(q=(20,), heads=2, kv_heads=2, dim=256, right=0),
    Problem(q=(9,), k=(70,), heads=2, kv_heads=1, dim=512, right=0),
    Problem(q=(129,), heads=1, kv_heads=1, dim=64, left=1, right=0),
)  # fmt: skip
_VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"right": 0},
    {"left": 33, "right": 0},
    {"left": 7, "right": 70},
    {"right": 0, "softcap": 1.5},
    {"right": 0, "sinks": True},
    {"masked": True},
    {"right": 0, "masked": True, "sinks": True, "softcap": 2.5, "left": 90},
    {"right": 0, "scale": 0.02},
)
FULL_PROBLEMS = (
    *(
        replace(
            Problem(q=(70, 1, 20), k=(70, 131, 3)), dim=dim, heads=heads, kv_heads=kv, **variant
        )
        for i, dim in enumerate((*range(16, 257, 8), 512))
        for variant in (_VARIANTS[i % 9], _VARIANTS[(i + 3) % 9], _VARIANTS[(i + 7) % 9])
        for heads, kv in (((6, 2), (3, 3), (5, 1))[i % 3],)
    ),
    *(
        replace(problem, **variant)
        for problem in (
            Problem(q=(150, 150), layout="batch", heads=8, kv_heads=2, dim=64),
            Problem(q=(530, 64), k=(530, 600), heads=2, kv_heads=1, dim=32),
            Problem(q=(100,), k=(64,), heads=12, kv_heads=1, dim=128, value_dim=64),
            Problem(q=(63, 1, 0, 2), heads=2, kv_heads=2, dim=192, value_dim=128),
        )
        for variant in _VARIANTS
    ),
)
BENCH = (
    Problem(q=(512,), heads=9, kv_heads=3, dim=64, right=0, layout="batch"),
    Problem(q=(2048,), heads=32, kv_heads=8, dim=128, right=0, layout="batch"),
)


def make_arguments(g: torch.Generator, problem: Problem, dtype: torch.dtype) -> Args:
    """Random arguments of the op `attention`."""
    p, packed = problem, problem.layout == "packed"
    value_dim = p.value_dim or p.dim

    def rows(lengths: tuple[int, ...], heads: int, dim: int) -> Tensor:
        batch, tokens = len(lengths), lengths[0]
        if packed:
            x = torch.randn(sum(lengths), heads, dim, generator=g)
        elif p.layout == "transposed":
            x = torch.randn(batch, heads, tokens, dim, generator=g).transpose(1, 2)
        else:
            x = torch.randn(batch, tokens, heads, dim, generator=g)
        return x.to(dtype)

    q, k = rows(p.q, p.heads, p.dim), rows(p.keys, p.kv_heads, p.dim)
    v = rows(p.keys, p.kv_heads, value_dim)
    if p.layout == "fused":
        q, k, v = torch.cat((q, k, v), -2).split((p.heads, p.kv_heads, p.kv_heads), -2)
    starts = [
        torch.tensor([0, *accumulate(n)], dtype=torch.int32) if packed else None
        for n in (p.q, p.keys)
    ]
    mask = torch.rand(k.shape[:-2], generator=g) < 0.7 if p.masked else None
    sinks = torch.randn(p.heads, generator=g) if p.sinks else None
    scale = p.scale or p.dim**-0.5
    return q, k, v, *starts, mask, sinks, scale, p.left, p.right, p.softcap


def _case(problem: Problem, dtype: torch.dtype, full: bool = False) -> Case:
    return Case(label=problem.label, make=lambda g: make_arguments(g, problem, dtype), full=full)


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    yield from (_case(problem, dtype) for problem in PROBLEMS)
    yield from (_case(problem, dtype, full=True) for problem in FULL_PROBLEMS)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, sinks: Tensor | None, scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One document by formula, in the dtype of its arguments: `(o [Tq, H, Dv], lse [H, Tq])`."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    s = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    # One more column, of the sink, or of -inf where there is a key: rows without keys stay finite.
    seen = visible.any(-1)
    extra = s.new_zeros(s.shape[:2]).masked_fill(seen, float("-inf"))
    if sinks is not None:
        extra = sinks.to(s.dtype)[:, None].expand(s.shape[:2])
    s = torch.cat((s.masked_fill(~visible, float("-inf")), extra[..., None]), -1)
    o = torch.einsum("hqk,khd->qhd", s.softmax(-1)[..., :-1], v)
    lse = s.logsumexp(-1)
    return o, lse if sinks is not None else lse.masked_fill(~seen, float("-inf"))


def _by_document(attend: Any, dtype: torch.dtype | None, args: Args) -> tuple[Tensor, Tensor]:
    q, k, v, cu_q, cu_k, mask, sinks, scale, left, right, softcap = args
    out, lse_out = [], []
    for rows, keys, _ in documents(q, k, cu_q, cu_k):
        visible = visible_keys(q[rows], k[keys], None if mask is None else mask[keys], left, right)
        parts = (x if dtype is None else x.to(dtype) for x in (q[rows], k[keys], v[keys]))
        o, lse = attend(*parts, visible, sinks, scale, softcap)
        out.append(o)
        lse_out.append(lse)
    if cu_q is not None:
        return torch.cat(out), torch.cat(lse_out, -1)
    if not out:
        return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(lse_shape(q))
    return torch.stack(out), torch.stack(lse_out)


def exact_attention(*args: Any) -> tuple[Tensor, Tensor]:
    """`attention` in float64."""
    return _by_document(dense_attention, torch.float64, args)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, sinks: Tensor | None, scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """torch's attention, which has no lse of its own to give; rows without keys give 0."""
    group = q.shape[1] // k.shape[1]
    _, lse = dense_attention(q.float(), k.float(), v.float(), visible, sinks, scale, softcap)
    k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    seen = visible.any(-1)
    o = F.scaled_dot_product_attention(
        q.transpose(0, 1), k, v, attn_mask=visible | ~seen[:, None], scale=scale
    )
    return (o * seen[:, None]).transpose(0, 1), lse


class _Reference(torch.autograd.Function):
    """The two references as one differentiable function."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        o, lse = attention_ref(*args)
        ctx.save_for_backward(*args[:3], o, lse)
        ctx.rest = args[3:]
        return o, lse

    @staticmethod
    def backward(ctx: Any, grad_o: Tensor, grad_lse: Tensor) -> Any:
        grads = attention_backward_ref(grad_o, grad_lse, *ctx.saved_tensors, *ctx.rest)
        return (
            *grads[:3],
            None,
            None,
            None,
            grads[3] if ctx.rest[3] is not None else None,
            *[None] * 4,
        )


def _peer(*args: Any) -> tuple[Tensor, Tensor]:
    """torch's attention where it has the variant, elsewhere the reference in the same dtype."""
    if args[6] is not None or args[10] or 0 in args[0].shape or 0 in args[1].shape:
        return _Reference.apply(*args)
    return _by_document(_sdpa, None, args)


def _backward_case(problem: Problem, dtype: torch.dtype, full: bool = False) -> Case:
    def make(g: torch.Generator) -> Args:
        args = make_arguments(g, problem, dtype)
        # Exact but for one rounding: a backward is judged by its own errors, not a forward's.
        o, lse = exact_attention(*args)
        o, lse = o.to(dtype), lse.float()
        grad_lse = torch.randn(lse.shape, generator=g) if problem.dim % 16 == 0 else None
        return torch.randn(o.shape, generator=g).to(dtype), grad_lse, *args[:3], o, lse, *args[3:]

    return Case(label=problem.label, make=make, full=full)


def _backward_cases(dtype: torch.dtype) -> Iterator[Case]:
    yield from (_backward_case(problem, dtype) for problem in PROBLEMS)
    yield from (_backward_case(problem, dtype, full=True) for problem in FULL_PROBLEMS)


def _gradients(attend: Any, dtype: torch.dtype | None, args: Args) -> tuple[Tensor, ...]:
    """What attention_backward gives, by autograd of a forward function."""
    grad_o, grad_lse, q, k, v, _, _, *rest = args
    sinks = rest[3]
    leaves = [
        (x if dtype is None else x.to(dtype)).detach().requires_grad_()
        for x in (q, k, v, *(() if sinks is None else (sinks,)))
    ]
    rest[3] = leaves[3] if sinks is not None else None
    with torch.enable_grad():
        o, lse = attend(*leaves[:3], *rest)
        alive = lse.detach() != float("-inf")
        loss = (o * grad_o.to(o.dtype)).sum()
        if grad_lse is not None:
            loss = loss + (lse.where(alive, 0.0) * grad_lse).sum()
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    found = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]
    return (*found, found[0].new_zeros(0)) if sinks is None else tuple(found)


def _backward_peer(*args: Any) -> tuple[Tensor, ...]:
    """torch's gradients; in fp32 the reference's. torch differentiates its own forward, and the
    errors of its scores cancel against those of its own lse, where ours meet a given lse: with
    halves that is nothing beside the rounding of P and dS, in fp32 it is most of the error.
    """
    if args[2].dtype == torch.float32:
        return attention_backward_ref(*args)
    return _gradients(_peer, None, args)


def _attention_flops(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> int:
    mask, left, right = rest[2], rest[5], rest[6]
    pairs = sum(
        int(visible_keys(q[r], k[n], None if mask is None else mask[n], left, right).sum())
        for r, n, _ in documents(q, k, rest[0], rest[1])
    )
    return 2 * pairs * q.shape[-2] * (q.shape[-1] + v.shape[-1])


def _dense_inputs(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Args:
    """As torch's attention likes them best: `[B, H, T, D]`, contiguous, heads repeated."""
    group = q.shape[-2] // k.shape[-2]
    k, v = (x.repeat_interleave(group, -2) for x in (k, v))
    return *(x.transpose(1, 2).contiguous() for x in (q, k, v)), rest[4], rest[6] == 0


def _torch_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)


INFOS = [
    OpInfo(
        name="attention",
        cases=_cases,
        dtypes=DTYPES,
        exact=exact_attention,
        peer=_peer,
        grad_args=(0, 1, 2, 6),
        bench_cases=lambda dtype: (_case(problem, dtype) for problem in BENCH),
        bench_peer=(_dense_inputs, _torch_attention),
        flops=_attention_flops,
    ),
    OpInfo(
        name="attention_backward",
        cases=_backward_cases,
        dtypes=DTYPES,
        exact=lambda *args: _gradients(exact_attention, torch.float64, args),
        peer=_backward_peer,
    ),
]
