"""Log-probability of one token a row, and the entropy of its distribution, from a linear head.

For policies: the log-probabilities are those that generation reported for the same hidden states,
bit for bit, raw or at a temperature. Nothing of size `[tokens, vocab]` is held; the backward pass
makes the logits again, chunk by chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .linear_cross_entropy import check_target
from .lm_head import (
    HEAD_SCHEMA,
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
    needed_gradients,
    scaled_logits,
    wanted_gradients,
)
from .registry import Op


def linear_logprob_ref(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch definition of the op: (log-probability, entropy, log-sum-exp)."""
    x, head = head_of(args)
    target, ignore_index, temperature, softcap, _ = args[7:]
    rows = counted_rows(target, ignore_index)
    ids = target[rows].long()
    z = scaled_logits(head.logits_ref(x[rows]), softcap, temperature)
    logp = torch.log_softmax(z, 1)
    picked = logp.gather(1, ids.clamp(0, head.n - 1)[:, None])[:, 0]
    picked = picked.masked_fill((ids < 0) | (ids >= head.n), float("nan"))
    p = logp.exp()
    entropy = -torch.where(p != 0, p * logp, 0.0).sum(1)
    empty = x.new_zeros(x.shape[0], dtype=torch.float32)
    return (
        empty.index_copy(0, rows, picked),
        empty.index_copy(0, rows, entropy),
        empty.index_copy(0, rows, torch.logsumexp(z, 1).detach()),
    )


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x = args[0]
    return tuple(x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(3))  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, entropy, lse = output
    ctx.mark_non_differentiable(lse)
    x, weight, scales, ctx.format, ctx.n, ctx.activation, bias, target, *rest = inputs
    ctx.ignore_index, ctx.temperature, ctx.softcap, bits = rest
    ctx.wide = bits & WEIGHT_FP32
    ctx.save_for_backward(x, weight, scales, bias, target, entropy, lse)


@first_derivative_only("linear_logprob")
def _backward(ctx: Any, dlogprob: Tensor, dentropy: Tensor, _: Any) -> tuple[Any, ...]:
    # d log p(t) / dz = [v = t] - p;  d entropy / dz = -p (log p + entropy)
    x, weight, scales, bias, target, entropy, lse = ctx.saved_tensors
    needed = needed_gradients(ctx)
    zero = torch.zeros_like(dlogprob)
    coefficients = torch.stack((-dlogprob - dentropy * entropy, dlogprob, zero, -dentropy), 1)
    found = linear_logits_backward(
        x, weight, scales, ctx.format, ctx.n, ctx.activation, bias, target, lse, coefficients,
        ctx.ignore_index, ctx.temperature, ctx.softcap, needed | ctx.wide,
    )  # fmt: skip
    return *given_gradients(found, needed), *[None] * 5


_linear_logprob = Op(
    f"linear_logprob({HEAD_SCHEMA}, Tensor target, int ignore_index, float temperature, "
    "float softcap, int gradients) -> (Tensor, Tensor, Tensor)",
    linear_logprob_ref,
    fake=_fake,
    backward=_backward,
    setup_context=_save,
    variant=head_variant,
)


def linear_logprob(
    x: Tensor,
    weight: Tensor | Packed,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
    activation: str = "int8",
) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's target and the row's entropy; both differentiable.

    Args:
        x: `[..., H]` hidden states, float32 or bfloat16.
        weight: `[V, H]` in the dtype of x, or a `PackedWeight` (frozen: no gradient of its own).
        target: `[...]` int64 or int32 ids.
        bias: `[V]`, float32 or bfloat16.
        temperature: logits are multiplied by 1 / temperature, as the sampler does; at least 1e-5.
        softcap: if positive, logits are capped to softcap * tanh(logit / softcap) first.
        ignore_index: rows with this target are left out: both results 0, no gradient, no time.
        activation: of a quantized weight, as in `quant_matmul`.

    Returns:
        `(logprob, entropy)`, float32 `[...]`, of the distribution at the temperature.

    Raises:
        ValueError: on a mismatched shape or dtype, a target outside the vocabulary, or a
            temperature below 1e-5, naming the argument. Targets on a GPU, or under torch.compile,
            are not read: there such a row's log-probability is NaN, its gradient 0.
    """
    bits = wanted_gradients(x, weight, bias, now=False)
    head = head_arguments(x, weight, bias, activation)
    flat = check_target(x, target, head[4], ignore_index)
    check_scaling(temperature, softcap)
    logprob, entropy, _ = _linear_logprob(
        *head, flat, ignore_index, float(temperature), float(softcap), bits
    )
    return logprob.reshape(target.shape), entropy.reshape(target.shape)
