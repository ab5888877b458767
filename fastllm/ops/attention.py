"""Attention for training and for whole sequences: dense or packed, with gradients.

softmax(scale * q k^T) v by the online softmax of FlashAttention (Dao et al., 2022; arXiv
2205.14135), its backward by recomputation from the log-sum-exp. Every document starts at its own
key position 0 and keys are taken in tiles of 64 and splits of 512 from there, as `paged_attention`
takes them: a row's bits are the same in training, in a prompt and token by token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _C
from .attention_checks import check_attention
from .attention_ref import attention_backward_ref, attention_ref, lse_shape, wide_dtype
from .checks import MAX_HEAD_DIM, check_tensors, laid_out
from .registry import FLOATS, Op, batch_invariant


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    o = q.new_empty(*q.shape[:-1], v.shape[-1])
    return o, q.new_empty(lse_shape(q), dtype=wide_dtype(q))


def _attention_backward_fake(
    grad_o: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor,
    lse: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, mask: Tensor | None,
    sinks: Tensor | None, *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dsinks = lse.new_empty(0 if sinks is None else sinks.shape[0])
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_q, cu_k, key_mask, sinks, *numbers = inputs
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k, key_mask, sinks)
    ctx.numbers = numbers
    ctx.set_materialize_grads(False)


def _attention_grads(ctx: Any, grad_o: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, o, lse, cu_q, cu_k, key_mask, sinks = ctx.saved_tensors
    if grad_o is None:
        grad_o = torch.zeros_like(o)
    elif grad_o.stride(-1) != 1:  # the gradient of a sum has strides of 0
        grad_o = grad_o.contiguous()
    dq, dk, dv, dsinks = _attention_backward(
        grad_o, grad_lse, q, k, v, o, lse, cu_q, cu_k, key_mask, sinks, *ctx.numbers
    )
    return dq, dk, dv, None, None, None, None if sinks is None else dsinks, *[None] * 4


_attention_backward = Op(
    "attention_backward(Tensor grad_o, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor o,"
    " Tensor lse, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? key_mask, Tensor? sinks,"
    " float softmax_scale, int window_left, int window_right, float softcap)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    attention_backward_ref,
    fake=_attention_backward_fake,
)
_attention = Op(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k,"
    " Tensor? key_mask, Tensor? sinks, float softmax_scale, int window_left, int window_right,"
    " float softcap) -> (Tensor, Tensor)",
    attention_ref,
    fake=_attention_fake,
    backward=_attention_grads,
    setup_context=_save_attention,
)


def _native_attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> bool:
    dims = (q.shape[-1], v.shape[-1])
    starts = [t for t in rest[:2] if t is not None]
    mask = rest[2]
    return (
        q.stride(-1) == 1
        and k.stride(-1) == 1
        and v.stride(-1) == 1
        and 0 < min(dims)
        and max(dims) <= MAX_HEAD_DIM
        and not (dims[0] | dims[1]) % 8
        and all(t.is_contiguous() for t in starts)
        and (mask is None or mask.stride(-1) == 1)
        and k.shape[-2] > 0
    )


@_attention.impl("native", "cpu", dtypes=FLOATS, when=_native_attention)
def _attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    key_mask: Tensor | None, sinks: Tensor | None, *numbers: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    o = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse = q.new_empty(lse_shape(q), dtype=torch.float32)
    size = _C.attention_scratch(q, k, v, cu_seqlens_q)
    scratch = q.new_empty(size, dtype=torch.float32) if size else None
    _C.attention(
        o, lse, q, k, v, cu_seqlens_q, cu_seqlens_k, key_mask, sinks, scratch, *numbers
    )  # fmt: skip
    return o, lse


def _native_backward(
    grad_o: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor,
    lse: Tensor, *rest: Any,
) -> bool:  # fmt: skip
    contiguous = all(x.stride(-1) == 1 for x in (grad_o, o)) and lse.is_contiguous()
    return contiguous and _native_attention(q, k, v, *rest)


@_attention_backward.impl("native", "cpu", dtypes=FLOATS, when=_native_backward)
def _attention_backward_cpu(
    grad_o: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor,
    lse: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    key_mask: Tensor | None, sinks: Tensor | None, *numbers: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dsinks = q.new_empty(0 if sinks is None else sinks.shape[0], dtype=torch.float32)
    batches = 1 if cu_seqlens_q is not None else q.shape[0]
    documents = batches if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    size = _C.attention_backward_scratch(
        batches, documents, q.shape[-3], q.shape[-2], k.shape[-2], q.shape[-1]
    )
    scratch = q.new_empty(size, dtype=torch.float32)
    if key_mask is not None:
        key_mask = key_mask.contiguous()
    _C.attention_backward(
        dq, dk, dv, dsinks, grad_o, grad_lse, q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k,
        key_mask, sinks, scratch, *numbers,
    )  # fmt: skip
    return dq, dk, dv, dsinks


@_attention.impl("triton", "cuda", dtypes=FLOATS)
def _attention_triton(*args: Any) -> tuple[Tensor, Tensor]:
    from ..kernels import attention as kernel

    return kernel.attention(*args, batch_invariant=batch_invariant())


@_attention_backward.impl("triton", "cuda", dtypes=FLOATS)
def _attention_backward_triton(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ..kernels import attention_backward as kernel

    return kernel.attention_backward(*args)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    key_mask: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of dense batches or packed documents; differentiable in q, k, v and sinks.

    Query i of a document with len_q queries and len_k keys stands at key position
    `i + len_k - len_q` (the ends are aligned, as FlashAttention does). A row that sees no key gives
    0, lse -inf, and no gradient.

    Logits are float32. One that overflows to +inf makes its row NaN, as in PyTorch; a row whose
    logits all overflow to -inf counts as seeing no key. NaN and infinity in q and k stay in the
    rows that see them; in v they also reach rows of the same block that see no such key but come
    before (0 x NaN), as in PyTorch.

    Args:
        q: `[B, T, H, D]`, or `[total, H, D]` with `cu_seqlens_q`; float32, bfloat16 or float16.
            Any strides, as all tensors (the kernels want a contiguous last dimension, others are
            copied, which a graph capture on the CPU refuses).
        k: `[B, Tk, Hk, D]` or `[total_k, Hk, D]`; H is a multiple of Hk (grouped queries).
        v: `[B, Tk, Hk, Dv]` or `[total_k, Hk, Dv]`.
        cu_seqlens_q: int32 `[S + 1]`, where each document begins in q, and the end of the last;
            read on the device. Rows past the end give 0.
        cu_seqlens_k: the same for k and v; default `cu_seqlens_q`.
        causal: hide the keys after a query's own position.
        softmax_scale: factor of q.k; default `D ** -0.5`.
        window_size: `(left, right)`: keys before and after its own position that a query sees;
            -1 is all of them. `causal` makes right 0.
        softcap: above 0, logits become `softcap * tanh(logits / softcap)`.
        sinks: `[H]`, a logit of each head that takes probability and has no value.
        key_mask: bool, `[B, Tk]` or `[total_k]`; False hides a key (padding) from every query.
        return_lse: also return the log-sum-exp of each row's logits, sink included: float32
            `[B, H, T]` or `[H, total]`; differentiable.

    Returns:
        o, `[B, T, H, Dv]` or `[total, H, Dv]`, contiguous, in the dtype of `q`; or `(o, lse)`.

    Raises:
        TypeError: naming the argument, on what is no tensor.
        ValueError: naming the argument, on shapes, dtypes or devices that do not belong together,
            and, on the CPU, on `cu_seqlens` that do not ascend from 0 to at most the tokens.
    """
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    try:
        check_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, key_mask, sinks, window_size, softcap)
    except AttributeError:
        check_tensors(
            q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
            key_mask=key_mask, sinks=sinks,
        )  # fmt: skip
        raise
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        cu_seqlens_q = laid_out("cu_seqlens_q", cu_seqlens_q)
        cu_seqlens_k = laid_out("cu_seqlens_k", cu_seqlens_k)
    if key_mask is not None:
        key_mask = laid_out("key_mask", key_mask)
    if sinks is not None:
        sinks = laid_out("sinks", sinks.to(wide_dtype(q)))
    value_dim = v.shape[-1]
    q, k, v = _whole_words("q", q), _whole_words("k", k), _whole_words("v", v)
    o, lse = _attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, key_mask, sinks,
        float(softmax_scale), window_size[0], 0 if causal else window_size[1], float(softcap),
    )  # fmt: skip
    if o.shape[-1] != value_dim:
        o = o[..., :value_dim].contiguous()
    return (o, lse) if return_lse else o


def _whole_words(name: str, x: Tensor) -> Tensor:
    """x with its last dimension contiguous, zeros appended up to a multiple of 8."""
    x = laid_out(name, x)
    return F.pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x
