"""Divergence of a linear head's distribution p from a teacher's q, token by token.

    forward   KL(q || p) = sum q (log q - log p)
    reverse   KL(p || q)
    js        beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p

The teacher is another head (hidden states and weight: its logits too are made chunk by chunk), or
its k most likely ids with their log-probabilities. From k ids the divergence is that of k + 1
outcomes, the last being "any other token", which is at most the full divergence (data processing
inequality) and not negative. Generalized Jensen-Shannon as in Agarwal et al., 2023 (arXiv
2306.13649). Gradients go to the student.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import values_readable
from .lm_head import (
    HEAD_SCHEMA,
    WEIGHT_FP32,
    Packed,
    check_scaling,
    first_derivative_only,
    given_gradients,
    gradients_fake,
    head_arguments,
    head_of,
    head_variant,
    logit_gradient,
    needed_gradients,
    scaled_logits,
    wanted_gradients,
)
from .registry import Op

KINDS = ("forward", "reverse", "js")
# log 2^-24: fp32 log-probabilities of the k ids cannot tell a smaller rest from none.
LEAST_LOG_REST = -16.635532
TEACHER_SCHEMA = (
    "Tensor teacher_x, Tensor teacher_weight, Tensor? teacher_scales, str teacher_format, "
    "int teacher_n, str teacher_activation, Tensor? teacher_bias"
)
_OPTIONS = "float temperature, float softcap, str kind, float beta, int gradients"
_MADE = "(Tensor, Tensor, Tensor)"


def divergence(logp: Tensor, logq: Tensor, kind: str, beta: float) -> tuple[Tensor, Tensor]:
    """Divergence of every row `[R]` and its gradient with respect to z (logp's logits) `[R, V]`."""
    p, q = logp.exp(), logq.exp()
    if kind == "forward":
        return _expected(q, logq - logp), p * q.sum(1, keepdim=True) - q
    if kind == "reverse":
        kl = _expected(p, logp - logq)
        return kl, torch.where(p > 0, p * (logp - logq - kl[:, None]), 0.0)
    logm = torch.log(beta * q + (1.0 - beta) * p)
    student = _expected(p, logp - logm)
    value = beta * _expected(q, logq - logm) + (1.0 - beta) * student
    return value, torch.where(p > 0, (1.0 - beta) * p * (logp - logm - student[:, None]), 0.0)


def _expected(weight: Tensor, value: Tensor) -> Tensor:
    return torch.where(weight != 0, weight * value, 0.0).sum(1)


def _dense(args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """(divergence [T], gradient of the raw logits [T, V], unscaled, log-sum-exp [T])."""
    x, head = head_of(args)
    teacher_x, teacher = head_of(args[7:])
    teacher_softcap, temperature, softcap, kind, beta = args[14:19]
    logits = head.logits_ref(x)
    z = scaled_logits(logits, softcap, temperature)
    logq = torch.log_softmax(
        scaled_logits(teacher.logits_ref(teacher_x), teacher_softcap, temperature), 1
    )
    value, dz = divergence(torch.log_softmax(z, 1), logq, kind, beta)
    return value, logit_gradient(dz, logits, softcap, temperature), torch.logsumexp(z, 1).detach()


def _top(args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The same from a teacher's k ids and log-probabilities."""
    x, head = head_of(args)
    ids, logprobs, temperature, softcap, kind, beta = args[7:13]
    logits = head.logits_ref(x)
    z = scaled_logits(logits, softcap, temperature)
    logp = torch.log_softmax(z, 1)
    ids, rest = ids.long(), torch.ones_like(logp)
    rest.scatter_(1, ids, 0.0)
    others = logp.masked_fill(rest == 0, float("-inf"))
    log_rest = torch.logsumexp(others, 1, keepdim=True)
    left = torch.log1p(-logprobs.exp().sum(1, keepdim=True).clamp(max=1.0))
    logq = torch.cat((logprobs, left.clamp(min=LEAST_LOG_REST)), 1)
    if ids.shape[1] == head.n:  # no other token
        logq, log_rest = logq[:, :-1], log_rest[:, :0]
    value, dz = divergence(torch.cat((logp.gather(1, ids), log_rest), 1), logq, kind, beta)
    spread = torch.zeros_like(logp)
    if log_rest.shape[1]:
        spread = torch.exp(others - log_rest) * dz[:, -1:]
        dz = dz[:, :-1]
    spread = spread.scatter(1, ids, dz)
    return (
        value,
        logit_gradient(spread, logits, softcap, temperature),
        torch.logsumexp(z, 1).detach(),
    )


def linear_kl_ref(*args: Any) -> tuple[Tensor, Tensor]:
    """Plain PyTorch definition of the op `linear_kl`: (divergence, log-sum-exp)."""
    value, _, lse = _dense(args)
    return value, lse


def linear_kl_top_ref(*args: Any) -> tuple[Tensor, Tensor]:
    """Plain PyTorch definition of the op `linear_kl_top`."""
    value, _, lse = _top(args)
    return value, lse


def _from_rows(args: tuple[Any, ...], d: Tensor, g: Tensor, gradients: int) -> Any:
    x, head = head_of(args)
    rows = torch.arange(x.shape[0], device=x.device)
    return head.gradients_ref(x, d * g[:, None], rows, gradients, x.shape[0])


def linear_kl_backward_ref(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch definition of the op `linear_kl_backward`."""
    return _from_rows(args, _dense(args)[1], args[19], args[20])


def linear_kl_top_backward_ref(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch definition of the op `linear_kl_top_backward`."""
    return _from_rows(args, _top(args)[1], args[13], args[14])


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    x = args[0]
    return tuple(x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2))  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    tensors = [a for a in inputs if isinstance(a, Tensor)]
    # Places of tensors are kept as None: all else of the call goes back as it came.
    ctx.rest = tuple(None if isinstance(a, Tensor) else (a,) for a in inputs)
    ctx.save_for_backward(*tensors)


def _arguments(ctx: Any) -> tuple[Any, ...]:
    tensors = iter(ctx.saved_tensors)
    return tuple(next(tensors) if place is None else place[0] for place in ctx.rest)


@first_derivative_only("linear_kl")
def _kl_backward(ctx: Any, g: Tensor, _: Any) -> tuple[Any, ...]:
    return _backward_of(linear_kl_backward, ctx, g)


@first_derivative_only("linear_kl")
def _kl_top_backward(ctx: Any, g: Tensor, _: Any) -> tuple[Any, ...]:
    return _backward_of(linear_kl_top_backward, ctx, g)


def _backward_of(op: Op, ctx: Any, g: Tensor) -> tuple[Any, ...]:
    *args, bits = _arguments(ctx)
    needed = needed_gradients(ctx)
    found = op(*args, g.contiguous(), needed | bits & WEIGHT_FP32)
    return *given_gradients(found, needed), *[None] * (len(args) + 1 - 7)


linear_kl_backward = Op(
    f"linear_kl_backward({HEAD_SCHEMA}, {TEACHER_SCHEMA}, float teacher_softcap, "
    "float temperature, float softcap, str kind, float beta, Tensor grad, int gradients) "
    f"-> {_MADE}",
    linear_kl_backward_ref,
    fake=gradients_fake,
    variant=head_variant,
)
linear_kl_top_backward = Op(
    f"linear_kl_top_backward({HEAD_SCHEMA}, Tensor ids, Tensor logprobs, float temperature, "
    f"float softcap, str kind, float beta, Tensor grad, int gradients) -> {_MADE}",
    linear_kl_top_backward_ref,
    fake=gradients_fake,
    variant=head_variant,
)
_linear_kl = Op(
    f"linear_kl({HEAD_SCHEMA}, {TEACHER_SCHEMA}, float teacher_softcap, {_OPTIONS}) "
    "-> (Tensor, Tensor)",
    linear_kl_ref,
    fake=_fake,
    backward=_kl_backward,
    setup_context=_save,
    variant=head_variant,
)
_linear_kl_top = Op(
    f"linear_kl_top({HEAD_SCHEMA}, Tensor ids, Tensor logprobs, {_OPTIONS}) -> (Tensor, Tensor)",
    linear_kl_top_ref,
    fake=_fake,
    backward=_kl_top_backward,
    setup_context=_save,
    variant=head_variant,
)


def linear_kl(
    x: Tensor,
    weight: Tensor | Packed,
    teacher_x: Tensor | None = None,
    teacher_weight: Tensor | Packed | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    *,
    teacher_ids: Tensor | None = None,
    teacher_logprobs: Tensor | None = None,
    temperature: float = 1.0,
    kind: str = "forward",
    beta: float = 0.5,
    softcap: float = 0.0,
    teacher_softcap: float = 0.0,
    activation: str = "int8",
    teacher_activation: str = "int8",
) -> Tensor:
    """Divergence of the student's next-token distributions from the teacher's; differentiable.

    The teacher is either (teacher_x, teacher_weight) or (teacher_ids, teacher_logprobs).

    Args:
        x: the student's hidden states `[..., H]`, float32 or bfloat16.
        weight: `[V, H]` in the dtype of x, or a `PackedWeight` (frozen: no gradient of its own).
        teacher_x: the teacher's hidden states `[..., H']`; H' may differ from H.
        teacher_weight: `[V, H']` or a `PackedWeight`, over the same vocabulary.
        bias: of the student's head `[V]`.
        teacher_bias: of the teacher's head `[V]`.
        teacher_ids: int32 or int64 `[..., k]`, different in each row.
        teacher_logprobs: float32 `[..., k]`, log-probabilities at the temperature.
        temperature: both distributions are taken at it. The result is not multiplied by its square.
        kind: "forward" (covers the teacher's modes), "reverse" (seeks one), or "js".
        beta: the teacher's share of the mixture of "js", between 0 and 1.
        softcap: as in `linear_cross_entropy`.
        teacher_softcap: the teacher's.
        activation: of a quantized weight, as in `quant_matmul`.
        teacher_activation: the teacher's.

    Returns:
        float32 `[...]`, in nats. Rows without a loss are left out by selecting rows of x.

    Raises:
        ValueError: on mismatched shapes or dtypes, different vocabularies, or an option out of
            range, naming the argument.
    """
    bits = wanted_gradients(x, weight, bias, now=False)
    head = head_arguments(x, weight, bias, activation)
    check_scaling(temperature, softcap)
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
    if kind == "js" and not 0.0 < beta < 1.0:
        raise ValueError(f"beta must be between 0 and 1, got {beta}")
    options = float(temperature), float(softcap), kind, float(beta), bits
    dense, top = (teacher_x, teacher_weight), (teacher_ids, teacher_logprobs)
    if all(t is not None for t in dense) and top == (None, None):
        assert teacher_x is not None and teacher_weight is not None
        check_scaling(temperature, teacher_softcap, "teacher_")
        teacher = _teacher_head(x, teacher_x, teacher_weight, teacher_bias, teacher_activation)
        if teacher[4] != head[4]:
            raise ValueError(
                f"teacher_weight has {teacher[4]} rows and weight {head[4]}: teacher and student "
                "must share one vocabulary"
            )
        value, _ = _linear_kl(*head, *teacher, float(teacher_softcap), *options)
    elif all(t is not None for t in top) and dense == (None, None):
        assert teacher_ids is not None and teacher_logprobs is not None
        _check_top(x, teacher_ids, teacher_logprobs, head[4])
        ids = teacher_ids.reshape(-1, teacher_ids.shape[-1])
        logprobs = teacher_logprobs.detach().reshape(ids.shape)
        value, _ = _linear_kl_top(*head, ids, logprobs, *options)
    else:
        raise ValueError(
            "give the teacher as teacher_x and teacher_weight, or as teacher_ids and "
            "teacher_logprobs"
        )
    return value.reshape(x.shape[:-1])


def _teacher_head(
    x: Tensor, teacher_x: Tensor, weight: Tensor | Packed, bias: Tensor | None, activation: str
) -> tuple[Any, ...]:
    if teacher_x.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"teacher_x must have rows {tuple(x.shape[:-1])} like x, got {tuple(teacher_x.shape)}"
        )
    found = head_arguments(teacher_x, weight, bias, activation, "teacher_x")
    return tuple(a.detach() if isinstance(a, Tensor) else a for a in found)


def _check_top(x: Tensor, ids: Tensor, logprobs: Tensor, n: int) -> None:
    if ids.shape[:-1] != x.shape[:-1] or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"teacher_ids must be int32 or int64 [{', '.join(map(str, x.shape[:-1]))}, k], got "
            f"{ids.dtype} of {tuple(ids.shape)}"
        )
    if not 1 <= ids.shape[-1] <= n:
        raise ValueError(f"teacher_ids must have 1 to {n} ids a row, got {ids.shape[-1]}")
    if logprobs.shape != ids.shape or logprobs.dtype != torch.float32:
        raise ValueError(
            f"teacher_logprobs must be float32 of shape {tuple(ids.shape)} like teacher_ids, got "
            f"{logprobs.dtype} of {tuple(logprobs.shape)}"
        )
    if ids.numel() and values_readable(ids):
        if bool(((ids < 0) | (ids >= n)).any()):
            raise ValueError(f"teacher_ids holds an id outside the vocabulary of {n}")
        ordered = ids.sort(-1).values
        if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
            raise ValueError("teacher_ids holds an id twice in one row")
