"""The backward of attention under the interpreter, against float64 autograd of the definition.

Runs as interpreter_cases.py does. Inputs that no gradient may depend on (packed rows past the last
document, masked keys) are NaN in what the kernels get.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from itertools import product

import torch
from interpreter_cases import BF16, F32, NAMES, Case, excess, main, randn, same
from torch import Tensor

F16 = torch.float16
SMALL = ((32, 32, 16), (16, 32, 16))  # keys, queries, edge of the two passes: many tiles


@dataclass(frozen=True)
class Problem:
    """What a case asks: documents of (len_q, len_k) rows, packed or as a batch of equal ones."""

    docs: tuple[tuple[int, int], ...]
    dtype: torch.dtype = F32
    heads: tuple[int, int] = (2, 1)
    dims: tuple[int, int] = (16, 16)
    packed: bool = True
    tail: tuple[int, int] = (0, 0)  # rows past the last document
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    sinks: bool = False
    key_mask: bool = False
    grad_lse: bool = False
    strided: bool = False
    tiles: tuple[tuple[int, int, int], tuple[int, int, int]] | None = SMALL


@dataclass
class Inputs:
    """Arguments of attention_backward, and the float64 gradients of q, k, v, sinks."""

    arguments: list[Tensor | float | None]
    grads: list[Tensor]


def attend(p: Problem, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, keep: Tensor):
    """(o[Tq, H, Dv], lse[H, Tq]) of one document, differentiable."""
    group = p.heads[0] // p.heads[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = torch.einsum("qhd,khd->hqk", q, k) * scale_of(p)
    if p.softcap:
        s = p.softcap * torch.tanh(s / p.softcap)
    ahead = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))[None, :]
    hidden = ~keep[None, :].expand_as(ahead)
    left, right = p.window
    hidden = hidden | (ahead > left if left >= 0 else False)
    hidden = hidden | (ahead < -right if right >= 0 else False)
    s = s.masked_fill(hidden, -math.inf)
    if p.sinks:
        s = torch.cat((s, sinks[:, None, None].expand(*s.shape[:2], 1)), 2)
    blind = s.isneginf().all(2, keepdim=True)
    weights = s.masked_fill(blind, 0.0).softmax(2).masked_fill(blind, 0.0)
    lse = s.masked_fill(blind, 0.0).logsumexp(2).masked_fill(blind[..., 0], -math.inf)
    return torch.einsum("hqk,khd->qhd", weights[:, :, : len(k)], v), lse


def scale_of(p: Problem) -> float:
    return 0.7 if p.softcap else p.dims[0] ** -0.5


def rows(p: Problem, lead: tuple[int, ...], heads: int, dim: int, seed: int) -> Tensor:
    """Random rows [*lead, heads, dim]; if strided, heads of a wider projection, head-major."""
    if p.strided:
        wide = randn(heads + 1, *lead, dim + 8, dtype=p.dtype, seed=seed).movedim(0, -2)
        return wide[..., 1:, 8:]
    return randn(*lead, heads, dim, dtype=p.dtype, seed=seed)


def inputs_of(p: Problem) -> Inputs:
    """Random inputs, the forward's results in float64 rounded once, and the gradients."""
    (h, hk), (d, dv) = p.heads, p.dims
    starts = [[sum(doc[i] for doc in p.docs[:n]) for n in range(len(p.docs) + 1)] for i in (0, 1)]
    lead = [(starts[i][-1] + p.tail[i],) for i in (0, 1)]
    if not p.packed:
        lead = [(len(p.docs), p.docs[0][i]) for i in (0, 1)]
    q, k = rows(p, lead[0], h, d, 1), rows(p, lead[1], hk, d, 2)
    v, g = rows(p, lead[1], hk, dv, 3), rows(p, lead[0], h, dv, 4)
    sinks = randn(h, seed=5)
    keep = torch.ones(lead[1], dtype=torch.bool)
    if p.key_mask:
        keep = randn(*lead[1], seed=6) > -0.3
    wide = [x.double().detach().requires_grad_() for x in (q, k, v, sinks)]
    flat = [x.flatten(0, -3) for x in wide[:3]]
    parts = []
    for i in range(len(p.docs)):
        at = [slice(starts[j][i], starts[j][i + 1]) for j in (0, 1)]
        parts.append(
            attend(p, flat[0][at[0]], flat[1][at[1]], flat[2][at[1]], wide[3], keep.view(-1)[at[1]])
        )
    o, lse = torch.cat([o for o, _ in parts]), torch.cat([lse for _, lse in parts], 1)
    past = (0, lead[0][0] - starts[0][-1]) if p.packed else (0, 0)
    seen = lse.isfinite()
    lse_grad = randn(*lse.shape, seed=7)
    loss = (o * g.double().flatten(0, -3)[: len(o)]).sum()
    if p.grad_lse:
        loss = loss + (lse * lse_grad.double())[seen].sum()
    grads = torch.autograd.grad(loss, wide, allow_unused=True, materialize_grads=True)

    o = torch.nn.functional.pad(o.detach(), (0, 0, 0, 0, *past))
    lse = torch.nn.functional.pad(lse.detach(), past, value=-math.inf)
    lse_grad = torch.nn.functional.pad(lse_grad, past, value=math.nan)
    if p.packed:
        for x, n in ((q, starts[0]), (g, starts[0]), (k, starts[1]), (v, starts[1])):
            x[n[-1] :] = math.nan
    else:
        o = o.view(*lead[0], h, dv)
        lse, lse_grad = (x.view(h, *lead[0]).transpose(0, 1) for x in (lse, lse_grad))
    k[~keep], v[~keep] = math.nan, math.nan
    cu = [torch.tensor(s, dtype=torch.int32) if p.packed else None for s in starts]
    arguments = [g, lse_grad.float() if p.grad_lse else None, q, k, v, o.to(p.dtype), lse.float()]
    arguments += [*cu, keep if p.key_mask else None, sinks if p.sinks else None]
    return Inputs([*arguments, scale_of(p), *p.window, p.softcap], list(grads))


def run(p: Problem, arguments: list[Tensor | float | None]) -> tuple[Tensor, ...]:
    from fastllm.kernels.attention_backward import attention_backward
    from fastllm.kernels.attention_backward_tuning import (
        AttentionBackwardTile,
        AttentionBackwardTiles,
    )

    tiles = None
    if p.tiles:
        tiles = AttentionBackwardTiles(*(AttentionBackwardTile(*t, 4, 1) for t in p.tiles))
    return attention_backward(*arguments, tiles=tiles)


def backward_case(p: Problem) -> float:
    """dq, dk, dv, dsinks against float64; contiguous, in the inputs' dtype.

    A gradient may be twice as far off as the definition in its dtype, where that is more than the
    bound of all cases: o, P and dS are rounded before the last rounding.
    """
    from fastllm.ops.attention_ref import attention_backward_ref

    inputs = inputs_of(p)
    got = run(p, inputs.arguments)
    peers = attention_backward_ref(*inputs.arguments)
    worst = 0.0
    for y, peer, ref in zip(got[:3], peers, inputs.grads, strict=False):
        assert y.is_contiguous(), y.stride()
        allowed = max(1.0, 2.0 * excess(peer, ref, p.dtype))
        worst = max(worst, excess(y, ref, p.dtype) / allowed)
    if not p.sinks:
        return worst if got[3].shape == (0,) else math.inf
    # delta takes o rounded to the dtype, so its sum has that error.
    error = (got[3].double() - inputs.grads[3]).abs().max() / inputs.grads[3].abs().max()
    return max(worst, error.item() / (1e-5 if p.dtype == F32 else 2e-2))


def repeatable(p: Problem) -> float:
    """Two runs give the same bits, and each document alone gives what it gives among others."""
    inputs = inputs_of(p)
    dq, dk, dv, dsinks = run(p, inputs.arguments)
    worst = max(map(same, run(p, inputs.arguments), (dq, dk, dv, dsinks)))
    g, _, q, k, v, o, lse, cu_q, cu_k, *rest = inputs.arguments
    for i, doc in enumerate(p.docs):
        a, b = (slice(int(cu[i]), int(cu[i + 1])) for cu in (cu_q, cu_k))
        alone = [torch.tensor([0, n], dtype=torch.int32) for n in doc]
        parts = [g[a], None, q[a], k[b], v[b], o[a], lse[:, a], *alone, *rest]
        wanted = (dq[a], dk[b], dv[b])
        worst = max(worst, *map(same, run(p, parts), wanted))
        dense = [x if x is None else x[None] for x in parts[:7]]
        batch = run(p, [*dense, None, None, *rest])
        worst = max(worst, *(same(x[0], y) for x, y in zip(batch[:3], wanted, strict=True)))
    return worst


def title(p: Problem) -> str:
    """The case's name: what differs from the plainest problem (pytest cuts ids at 100)."""
    plain = Problem(())
    parts = ["attention_backward", NAMES[p.dtype], "+".join(f"{a}:{b}" for a, b in p.docs)]
    for name in vars(plain):
        value = getattr(p, name)
        if name in ("docs", "dtype") or value == getattr(plain, name):
            continue
        if isinstance(value, tuple):
            value = ":".join(map(str, value))
        parts.append(name if value is True else f"{name}={value}")
    return " ".join(parts)


def hostile_starts() -> float:
    """Documents are cut to the rows that exist: the bits are those of documents cut before."""
    p = Problem(((8, 8), (12, 12)), window=CAUSAL)
    arguments = inputs_of(p).arguments
    huge, worst = 2**31 - 1, 0.0
    for rows in ((-7, 8, huge), (-huge, 8, 25)):
        bad = torch.tensor(rows, dtype=torch.int32)
        found = run(p, [*arguments[:7], bad, bad, *arguments[9:]])
        worst = max(worst, *map(same, found, run(p, arguments)))
    backwards = torch.tensor((huge, -huge, 25), dtype=torch.int32)
    one = torch.tensor((0, 0, 20), dtype=torch.int32)
    found, expected = (run(p, [*arguments[:7], cu, cu, *arguments[9:]]) for cu in (backwards, one))
    return max(worst, *map(same, found, expected))


CAUSAL = (-1, 0)
MIXED = ((37, 37), (0, 5), (5, 40), (3, 0), (33, 20))


def quick_cases() -> dict[str, Case]:
    """Cases of the normal run."""
    problems = [
        Problem(((70, 70), (3, 3)), window=CAUSAL),
        Problem(((70, 70), (3, 3)), BF16, window=CAUSAL, dims=(24, 16), tiles=None),
        Problem(MIXED, BF16, window=CAUSAL, heads=(4, 2), tail=(9, 40)),
        Problem(MIXED, window=(7, 3), heads=(3, 3), tail=(40, 9), dims=(16, 40), strided=True),
        Problem(((45, 45),), F16, window=(20, 0), dims=(72, 16)),
        Problem(((33, 50),) * 2, packed=False, key_mask=True, heads=(4, 1), window=CAUSAL),
        Problem(((33, 17),) * 2, BF16, packed=False, strided=True, sinks=True, window=(9, 0)),
        Problem(((50, 50),), BF16, softcap=2.0, grad_lse=True, window=CAUSAL),
        Problem(((20, 20),), window=CAUSAL, tiles=((8, 16, 16), (16, 8, 16))),
        Problem(((20, 40), (20, 9)), sinks=True, softcap=1.5, grad_lse=True, key_mask=True),
    ]
    cases = {title(p): lambda p=p: backward_case(p) for p in problems}
    cases["attention_backward hostile starts"] = hostile_starts
    same_bits = Problem(((40, 40), (9, 30), (33, 33)), BF16, window=(30, 0), heads=(2, 1))
    for p in (same_bits, replace(same_bits, dtype=F32, softcap=3.0)):
        cases[title(p) + " same bits"] = lambda p=p: repeatable(p)
    return cases


def full_cases() -> dict[str, Case]:
    """Every variant in every dtype."""
    problems: list[Problem] = []
    for dtype, packed, window, heads in product(
        (F32, BF16, F16),
        (True, False),
        (CAUSAL, (-1, -1), (13, 0), (-1, 6), (8, 5)),
        ((4, 2), (3, 1)),
    ):
        docs = ((40, 40), (17, 60), (33, 20)) if packed else ((35, 50),) * 2
        problems.append(Problem(docs, dtype, heads, (16, 16), packed, window=window))
    extras = (
        {"softcap": 2.0},
        {"sinks": True},
        {"key_mask": True},
        {"grad_lse": True},
        {"strided": True},
        {"softcap": 2.0, "sinks": True, "key_mask": True, "grad_lse": True, "strided": True},
    )
    for dtype, packed, extra in product((F32, BF16, F16), (True, False), extras):
        docs = ((40, 40), (17, 60), (33, 20)) if packed else ((35, 50),) * 2
        plain = Problem(docs, dtype, packed=packed, window=CAUSAL)
        problems.append(replace(plain, **extra))
    for dtype, dims in product(
        (F32, BF16), ((80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (512, 512), (64, 200))
    ):
        problems.append(Problem(((70, 70),), dtype, dims=dims, window=CAUSAL, tiles=None))
        problems.append(Problem(((20, 37),), dtype, dims=dims, window=(9, 4)))
    cases = {title(p): lambda p=p: backward_case(p) for p in problems}
    for dtype, window in product((F32, BF16), (CAUSAL, (-1, -1), (20, 5))):
        p = Problem(((140, 140), (70, 190)), dtype, window=window, tiles=None)
        cases[title(p) + " same bits"] = lambda p=p: repeatable(p)
    return cases


if __name__ == "__main__":
    sys.exit(main(quick_cases, full_cases))
