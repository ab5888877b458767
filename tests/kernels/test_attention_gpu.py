"""Attention and its gradients on a GPU: float64's values, the same bits again, packed or alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastllm.ops import attention
from fastllm.ops.attention_ref import attention_backward_ref, attention_ref

pytestmark = pytest.mark.gpu

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """One call: head dims, lengths of q and k of each document (or of each of a batch)."""

    dims: tuple[int, int] = (128, 128)
    dtype: torch.dtype = BF16
    docs: tuple[tuple[int, int], ...] = ((300, 300), (1, 77), (129, 400))
    window: tuple[int, int] = (-1, 0)
    softcap: float = 0.0
    packed: bool = True
    masked: bool = False
    sinks: bool = False


CASES = [
    *(Case((d, d)) for d in (64, 80, 96, 128, 256, 512)),
    Case((192, 128)),
    Case(dtype=F16),
    *(Case((d, d), F32) for d in (64, 128)),
    Case(window=(-1, -1)),
    Case(window=(100, 20)),
    Case(softcap=5.0, sinks=True),
    Case(docs=((200, 333),) * 2, packed=False, masked=True),
    Case(docs=((200, 333),) * 2, packed=False, masked=True, softcap=5.0, sinks=True),
]


def arguments(case: Case) -> tuple[list[Tensor], list[Tensor | float | None]]:
    """(q, k, v, gradients of o and lse), and what follows k and v in the op."""
    g = torch.Generator("cuda").manual_seed(0)
    lengths = [[doc[i] for doc in case.docs] for i in (0, 1)]
    lead = [(sum(n),) if case.packed else (len(n), n[0]) for n in lengths]
    shapes = [(*lead[0], 8, case.dims[0]), (*lead[1], 2, case.dims[0]), (*lead[1], 2, case.dims[1])]
    shapes += [(*lead[0], 8, case.dims[1]), (*lead[0][:-1], 8, lead[0][-1])]
    tensors = [torch.randn(s, generator=g, device="cuda") for s in shapes]
    tensors = [*(x.to(case.dtype) for x in tensors[:4]), tensors[4]]
    starts = [
        torch.tensor([0, *n], device="cuda").cumsum(0).int() if case.packed else None
        for n in lengths
    ]
    mask = torch.rand(lead[1], generator=g, device="cuda") > 0.3 if case.masked else None
    sinks = torch.randn(8, generator=g, device="cuda") if case.sinks else None
    scale = case.dims[0] ** -0.5
    return tensors, [*starts, mask, sinks, scale, *case.window, case.softcap]


def by_reference(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """o and the gradients by the definition, in a dtype."""
    tensors, rest = arguments(case)
    q, k, v, grad_o = (x.to(dtype) for x in tensors[:4])
    wide = torch.promote_types(dtype, F32)
    rest[3] = None if rest[3] is None else rest[3].to(wide)
    o, lse = attention_ref(q, k, v, *rest)
    grads = attention_backward_ref(grad_o, tensors[4].to(wide), q, k, v, o, lse, *rest)
    return [o, *grads]


def by_kernels(case: Case, documents: int | None = None) -> list[Tensor]:
    """The same by the op; of the first documents only, if asked."""
    tensors, (cu_q, cu_k, mask, sinks, scale, left, right, softcap) = arguments(case)
    if documents is not None:
        cu_q, cu_k = cu_q[: documents + 1], cu_k[: documents + 1]
        n_q, n_k = int(cu_q[-1]), int(cu_k[-1])
        q, k, v, grad_o, grad_lse = tensors
        tensors = [q[:n_q], k[:n_k], v[:n_k], grad_o[:n_q], grad_lse[:, :n_q]]
    q, k, v = (x.clone().requires_grad_() for x in tensors[:3])
    sinks = None if sinks is None else sinks.clone().requires_grad_()
    o, lse = attention(
        q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, key_mask=mask, sinks=sinks,
        softmax_scale=scale, window_size=(left, right), softcap=softcap, return_lse=True,
    )  # fmt: skip
    inputs = [q, k, v] if sinks is None else [q, k, v, sinks]
    seen = lse.isfinite()
    grads = torch.autograd.grad([o, lse[seen]], inputs, [tensors[3], tensors[4][seen]])
    return [o, *grads]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_are_those_of_float64(case: Case) -> None:
    for name, y, peer, ref in zip(
        ("o", "dq", "dk", "dv", "dsinks"),
        by_kernels(case),
        by_reference(case, case.dtype),
        by_reference(case, torch.float64),
        strict=False,
    ):
        top = ref.abs().max().item()
        ulp = 2.0 ** math.floor(math.log2(top)) * torch.finfo(y.dtype).eps
        bound = max(2 * (peer.double() - ref).abs().max().item(), ulp)
        assert (y.double() - ref).abs().max().item() <= bound, name


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_a_second_run_and_a_smaller_batch_give_the_same_bits(dtype: torch.dtype) -> None:
    case = Case(dtype=dtype, docs=((300, 300), (70, 190), (129, 400)))
    whole = by_kernels(case)
    for first, second in zip(whole, by_kernels(case), strict=True):
        assert torch.equal(first, second)
    for y, alone in zip(whole[1:], by_kernels(case, documents=1)[1:], strict=True):
        assert torch.equal(y[: alone.shape[0]], alone)


def test_hidden_rows_do_not_leak() -> None:
    """NaN in masked keys and past the last document; their gradients are zero."""
    tensors, rest = arguments(Case(masked=True, docs=((300, 300), (70, 190))))
    q, k, v, grad_o, _ = tensors
    cu_q, cu_k, mask, *_ = rest
    ends = int(cu_q[1]), int(cu_k[1])
    hidden = ~mask
    hidden[ends[1] :] = True
    k[hidden], v[hidden] = math.nan, math.nan
    q[ends[0] :], grad_o[ends[0] :] = math.nan, math.nan
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    starts = {"cu_seqlens_q": cu_q[:2], "cu_seqlens_k": cu_k[:2]}
    o = attention(q, k, v, causal=True, key_mask=mask, **starts)
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), grad_o)
    assert all(x.isfinite().all() for x in (o, dq, dk, dv))
    assert not o[ends[0] :].any() and not dq[ends[0] :].any()
    assert not dk[hidden].any() and not dv[hidden].any()
