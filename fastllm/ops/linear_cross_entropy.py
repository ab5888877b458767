"""Cross entropy of a linear head, without its logits in memory.

loss of a row = -(1 - s) log p(target) - s mean_v log p(v) + z_loss * lse^2 with label smoothing s
(Szegedy et al., 2015, arXiv 1512.00567) and the z-loss of PaLM (Chowdhery et al., 2022, arXiv
2204.02311). With a mean or a sum the gradients are made in the forward pass, from logits that are
at hand, and scaled in the backward pass; rows of their own (reduction "none") keep their
log-sum-exp, and the backward pass makes the logits again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .checks import values_readable
from .lm_head import (
    BIAS,
    HEAD_SCHEMA,
    INPUT,
    WEIGHT,
    WEIGHT_FP32,
    Packed,
    check_scaling,
    counted_rows,
    first_derivative_only,
    given_gradients,
    head_arguments,
    head_of,
    head_variant,
    linear_logits_backward,
    logit_gradient,
    needed_gradients,
    scaled_logits,
    target_gradient,
    wanted_gradients,
)
from .registry import Op

REDUCTIONS = ("none", "sum", "mean")


def cross_entropy_coefficients(
    g: Tensor, lse: Tensor, n: int, label_smoothing: float, z_loss: float
) -> Tensor:
    """(a, b, c, e) of `target_gradient` `[T, 4]` from gradients of the rows' losses."""
    a = g * (1.0 + 2.0 * z_loss * lse) if z_loss else g
    b, c = g * -(1.0 - label_smoothing), g * -(label_smoothing / n)
    return torch.stack((a, b, c, torch.zeros_like(g)), 1)


def row_losses(
    z: Tensor, ids: Tensor, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """(loss, log-sum-exp) of every row of scaled logits; NaN at targets outside the vocabulary."""
    n = z.shape[1]
    logp = torch.log_softmax(z, 1)
    picked = logp.gather(1, ids.clamp(0, n - 1)[:, None])[:, 0]
    lse = torch.logsumexp(z, 1)
    loss = -picked
    if label_smoothing:
        loss = loss * (1.0 - label_smoothing) + label_smoothing * (lse - z.mean(1))
    if z_loss:
        loss = loss + z_loss * lse.square()
    return loss.masked_fill((ids < 0) | (ids >= n), float("nan")), lse


def reduce_losses(loss: Tensor, reduction: str, count: int) -> Tensor:
    """Sum or mean of `count` losses, added up in float64 and rounded once."""
    total = loss.double().sum()
    return (total / count if reduction == "mean" else total).to(torch.float32)


def linear_cross_entropy_ref(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Plain PyTorch definition of the op: (loss, lse, dx, dweight, dbias)."""
    x, head = head_of(args)
    target, ignore_index, reduction, softcap, label_smoothing, z_loss, gradients = args[7:]
    rows = counted_rows(target, ignore_index)
    xs, ids, count = x[rows], target[rows].long(), rows.shape[0]
    logits = head.logits_ref(xs)
    z = scaled_logits(logits, softcap, 1.0)
    losses, found = row_losses(z, ids, label_smoothing, z_loss)
    found = found.detach()
    lse = x.new_zeros(x.shape[0], dtype=torch.float32).index_copy(0, rows, found)
    if reduction == "none":
        loss = torch.zeros_like(lse).index_copy(0, rows, losses)
        return loss, lse, *head.empty_gradients(x, gradients & WEIGHT_FP32, 0)
    scale = torch.full_like(found, 1.0 / count if reduction == "mean" and count else 1.0)
    coefficients = cross_entropy_coefficients(scale, found, head.n, label_smoothing, z_loss)
    with torch.no_grad():
        d = logit_gradient(target_gradient(z, ids, found, coefficients), logits, softcap, 1.0)
        made = head.gradients_ref(xs, d, rows, gradients, x.shape[0])
    return reduce_losses(losses, reduction, count), lse, *made


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, head = head_of(args)
    reduction, gradients = args[9], args[13]
    tokens = x.shape[0]
    loss = x.new_empty((tokens,) if reduction == "none" else (), dtype=torch.float32)
    lse = x.new_empty(tokens, dtype=torch.float32)
    bits = gradients & WEIGHT_FP32 if reduction == "none" else gradients
    return loss, lse, *head.empty_gradients(x, bits, tokens)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, lse, *made = output
    ctx.mark_non_differentiable(lse, *made)
    ctx.set_materialize_grads(False)  # zeros as large as the weight for `made`
    x, weight, scales, ctx.format, ctx.n, ctx.activation, bias, target, *rest = inputs
    ctx.ignore_index, ctx.reduction, ctx.softcap, ctx.label_smoothing, ctx.z_loss, bits = rest
    needed = needed_gradients(ctx)
    ctx.made = ctx.reduction != "none" and bits & needed == needed
    ctx.wide = bits & WEIGHT_FP32
    if ctx.made:
        ctx.save_for_backward(*made)
    else:
        ctx.save_for_backward(x, weight, scales, bias, target, lse)


def _scaled(found: Tensor, g: Tensor) -> Tensor:
    """found * g; in place of it where nothing else can see it.

    The gradients saved by the forward pass are used once unless the graph is kept: then they may
    be handed on as they are (g = 1, the usual case) or multiplied in place, and no second copy of
    a gradient as large as the weight appears.
    """
    if type(found) is not Tensor or torch._C._autograd._get_current_graph_task_keep_graph():
        return found * g.to(found.dtype) if found.dtype == torch.float32 else (
            found.float() * g
        ).to(found.dtype)  # fmt: skip
    if g.device.type == "cpu" and float(g) == 1.0:
        return found
    return found.mul_(g)


@first_derivative_only("linear_cross_entropy")
def _backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Any, ...]:
    needed = needed_gradients(ctx)
    if ctx.made:
        bits = (INPUT, WEIGHT, BIAS)
        dx, dweight, dbias = (
            _scaled(t, dloss) if needed & bit else t
            for t, bit in zip(ctx.saved_tensors, bits, strict=True)
        )
        return *given_gradients((dx, dweight, dbias), needed), *[None] * 7
    x, weight, scales, bias, target, lse = ctx.saved_tensors
    g = dloss.expand(x.shape[0])
    if ctx.reduction == "mean":
        g = g / (target != ctx.ignore_index).sum()
    found = linear_logits_backward(
        x, weight, scales, ctx.format, ctx.n, ctx.activation, bias, target, lse,
        cross_entropy_coefficients(g, lse, ctx.n, ctx.label_smoothing, ctx.z_loss),
        ctx.ignore_index, 1.0, ctx.softcap, needed | ctx.wide,
    )  # fmt: skip
    return *given_gradients(found, needed), *[None] * 7


_linear_cross_entropy = Op(
    f"linear_cross_entropy({HEAD_SCHEMA}, Tensor target, int ignore_index, str reduction, "
    "float softcap, float label_smoothing, float z_loss, int gradients) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    linear_cross_entropy_ref,
    fake=_fake,
    backward=_backward,
    setup_context=_save,
    variant=head_variant,
)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor | Packed,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    activation: str = "int8",
) -> Tensor:
    """Cross entropy of `softmax(x @ weight.T + bias)` and targets; differentiable.

    Args:
        x: `[..., H]` hidden states, float32 or bfloat16.
        weight: `[V, H]` in the dtype of x, or a `PackedWeight` (frozen: no gradient of its own).
        target: `[...]` int64 or int32 ids.
        bias: `[V]`, float32 or bfloat16.
        ignore_index: rows with this target are left out: no loss, no gradient, no time.
        reduction: "mean" over the rows that count (NaN when there are none, as in torch), "sum", or
            "none".
        softcap: if positive, logits are capped to softcap * tanh(logit / softcap).
        label_smoothing: share of the target's probability spread over the vocabulary, in [0, 1].
        z_loss: weight of the squared log-sum-exp.
        activation: of a quantized weight, as in `quant_matmul`.

    Returns:
        float32: a scalar, or `[...]` for "none" (0 in ignored rows).

    Raises:
        ValueError: on a mismatched shape or dtype, a target outside the vocabulary, or an option
            out of range, naming the argument. Targets on a GPU, or under torch.compile, are not
            read: there such a row's loss is NaN, its gradient 0.
    """
    bits = wanted_gradients(x, weight, bias, now=reduction != "none")
    head = head_arguments(x, weight, bias, activation)
    flat = check_target(x, target, head[4], ignore_index)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction {reduction!r} is not one of {', '.join(REDUCTIONS)}")
    check_scaling(1.0, softcap)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if not math.isfinite(z_loss) or z_loss < 0.0:
        raise ValueError(f"z_loss must not be negative, got {z_loss}")
    loss = _linear_cross_entropy(
        *head, flat, ignore_index, reduction, float(softcap), float(label_smoothing),
        float(z_loss), bits,
    )[0]  # fmt: skip
    return loss.reshape(target.shape) if reduction == "none" else loss


def check_target(x: Tensor, target: Tensor, n: int, ignore_index: int) -> Tensor:
    """The targets `[T]`.

    Raises:
        ValueError: on a shape or dtype other than `x` calls for, or an id outside the vocabulary.
    """
    if target.shape != x.shape[:-1] or target.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"target must be int64 or int32 of shape {tuple(x.shape[:-1])} like the rows of x, "
            f"got {target.dtype} of {tuple(target.shape)}"
        )
    flat = target.reshape(-1)
    if flat.shape[0] and values_readable(flat):
        wrong = ((flat < 0) | (flat >= n)) & (flat != ignore_index)
        if wrong.any():
            row = int(wrong.nonzero()[0, 0])
            raise ValueError(
                f"target {int(flat[row])} of row {row} is outside the vocabulary of {n}; rows "
                f"without a loss have the target {ignore_index}"
            )
    return flat
