"""The router of a mixture of experts: scores, selection of k experts a token, their weights.

Which options give the routing of a family (logits in fp32):

- Mixtral, Qwen3-MoE, GPT-OSS: softmax, `renormalize=True` (a softmax over the chosen logits is
  the same); OLMoE: softmax (`renormalize` by its `norm_topk_prob`, as Qwen3-MoE);
- DeepSeek-V2: softmax, `groups`, `kept_groups`, `group_score="max"`, `scale`; without
  `renormalize`;
- DeepSeek-V3: sigmoid, `bias`, `groups`, `kept_groups`, `group_score="top2"`, `renormalize=True`,
  `scale`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C
from ..errors import NotFiniteError
from .checks import values_readable
from .moe_gate_backward import SUM_EPS, moe_gate_backward
from .moe_gate_cuda import fits_cuda, launch_gate
from .registry import Op

SCORINGS = ("softmax", "sigmoid")
GROUP_SCORES = ("max", "top2")

_kept: ContextVar[list[NotFiniteError] | None] = ContextVar("refusals of routers", default=None)


class Gate(NamedTuple):
    """What a router decided, and the sums over tokens that balance it."""

    topk_ids: Tensor  # int32 [T, k], by descending choice; -1: the row has no distribution
    topk_weights: Tensor  # fp32 [T, k]
    counts: Tensor  # int32 [E]: slots of each expert
    score_sum: Tensor  # fp32 [E]: sum over tokens of the normalized scores
    z_sum: Tensor  # fp32 []: sum over tokens of logsumexp(logits)^2


def _excluded(choice: Tensor, groups: int, kept_groups: int, group_score: str) -> Tensor:
    """bool [T, E]: the expert's group is not one of the best; ties go to the lower group."""
    grouped = choice.unflatten(1, (groups, -1))
    best = grouped.amax(-1) if group_score == "max" else grouped.topk(2, -1).values.sum(-1)
    order = best.sort(dim=1, descending=True, stable=True).indices
    out = torch.ones_like(best, dtype=torch.bool).scatter(1, order[:, :kept_groups], False)
    return out.repeat_interleave(choice.shape[1] // groups, dim=1)


def moe_gate_ref(
    logits: Tensor,
    bias: Tensor | None,
    k: int,
    scoring: str,
    groups: int,
    kept_groups: int,
    group_score: str,
    renormalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Plain PyTorch definition of `moe_gate`."""
    n_experts = logits.shape[1]
    valid = logits.amax(1).isfinite()  # amax passes NaN on
    rows = torch.where(valid[:, None], logits, 0.0)
    scores = torch.softmax(rows, -1) if scoring == "softmax" else torch.sigmoid(rows)
    # Scores order like their logits, but round to equal numbers where logits still differ.
    by_logits = bias is None and (groups == 1 or group_score == "max")
    choice = rows if by_logits else scores if bias is None else scores + bias
    valid = valid & (choice < math.inf).all(1)
    order = choice.sort(dim=1, descending=True, stable=True).indices
    if kept_groups < groups:
        out = _excluded(choice, groups, kept_groups, group_score).gather(1, order)
        order = order.gather(1, out.byte().sort(dim=1, stable=True).indices)
    ids = order[:, :k]
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + SUM_EPS)
    weights = torch.where(valid[:, None], weights * scale, 0.0)
    p = scores if scoring == "softmax" else scores / (scores.sum(-1, keepdim=True) + SUM_EPS)
    counted = torch.where(valid[:, None], ids, n_experts).flatten()
    counts = torch.zeros(n_experts + 1, dtype=torch.int32, device=logits.device)
    counts = counts.scatter_add(0, counted, torch.ones_like(counted, dtype=torch.int32))
    return (
        weights,
        torch.where(valid[:, None], ids, -1).int(),
        counts[:n_experts].clone(),
        torch.where(valid[:, None], p, 0.0).sum(0),
        torch.where(valid, torch.logsumexp(rows, -1), 0.0).square().sum(),
    )


def gate_outputs(logits: Tensor, k: int) -> tuple[Tensor, ...]:
    """Room for what the op gives: weights, ids, counts, score_sum, z_sum.

    A floating output first: opcheck adds all outputs up in the dtype of the first.
    """
    tokens, n_experts = logits.shape
    return (
        logits.new_empty((tokens, k)),
        logits.new_empty((tokens, k), dtype=torch.int32),
        logits.new_empty((n_experts,), dtype=torch.int32),
        logits.new_empty((n_experts,)),
        logits.new_empty(()),
    )


def _fake(logits: Tensor, bias: Tensor | None, k: int, *_: Any) -> tuple[Tensor, ...]:
    return gate_outputs(logits, k)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    logits, _, _, scoring, _, _, _, renormalize, scale = inputs
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(logits, output[1])
    ctx.options = scoring, renormalize, scale


def _gradients(
    ctx: Any, d_weights: Tensor, _ids: Any, _counts: Any, d_score_sum: Tensor, d_z_sum: Tensor
) -> tuple[Any, ...]:
    logits, ids = ctx.saved_tensors
    d = d_weights.contiguous(), d_score_sum.contiguous(), d_z_sum
    return moe_gate_backward(logits, ids, *d, *ctx.options), *[None] * 8


_moe_gate = Op(
    "moe_gate(Tensor logits, Tensor? bias, int k, str scoring, int groups, int kept_groups, "
    "str group_score, bool renormalize, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    moe_gate_ref,
    fake=_fake,
    backward=_gradients,
    setup_context=_save,
)


def rows_contiguous(logits: Tensor, bias: Tensor | None, *_: Any) -> bool:
    """What the native kernels need of their arguments."""
    return logits.stride(1) == 1 and (bias is None or bias.is_contiguous())


@_moe_gate.impl("native", "cpu", dtypes=(torch.float32,), when=rows_contiguous)
def moe_gate_cpu(
    logits: Tensor,
    bias: Tensor | None,
    k: int,
    scoring: str,
    groups: int,
    kept_groups: int,
    group_score: str,
    renormalize: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    """The native row."""
    tokens, n_experts = logits.shape
    scratch = _C.moe_gate_scratch(tokens, n_experts)
    out = gate_outputs(logits, k)
    _C.moe_gate(
        *out,
        logits.new_empty(scratch, dtype=torch.float32) if scratch else None,
        logits,
        bias,
        scoring == "sigmoid",
        groups,
        kept_groups,
        group_score == "top2",
        renormalize,
        scale,
    )
    return out


if hasattr(_C, "moe_gate_cuda"):  # the extension was built with CUDA

    @_moe_gate.impl("cuda", "cuda", dtypes=(torch.float32,), when=fits_cuda, opt_in=True)
    def _moe_gate_cuda(logits: Tensor, bias: Tensor | None, k: int, *options: Any) -> Any:
        out = gate_outputs(logits, k)
        launch_gate(out, None, 0, logits, bias, *options)
        return out


@_moe_gate.impl("triton", "cuda", dtypes=(torch.float32,))
def _moe_gate_triton(*args: Any) -> tuple[Tensor, ...]:
    from ..kernels import moe_gate as kernel

    return kernel.moe_gate(*args)


def moe_gate(
    logits: Tensor,
    k: int,
    *,
    scoring: str = "softmax",
    bias: Tensor | None = None,
    groups: int = 1,
    kept_groups: int = 1,
    group_score: str = "max",
    renormalize: bool = False,
    scale: float = 1.0,
) -> Gate:
    """Choose k experts a token and weigh them; differentiable in logits.

    `scores` are the softmax over all experts, or the sigmoid of each. Experts are chosen by
    `scores + bias`; without a bias, and unless groups are ranked by "top2", by the logits
    themselves, which order alike. Ties go to the lower id. The weights are the scores of the
    chosen, without the bias.

    Args:
        logits: `[T, E]` float32. -inf: the expert is chosen only where others run out.
        k: experts a token, 1 to E.
        scoring: "softmax" or "sigmoid".
        bias: `[E]` float32 added for the selection alone, or None; -inf bars an expert.
        groups: number of equal runs of experts; only experts of the best `kept_groups` of them can
            be chosen.
        kept_groups: 1 to `groups`.
        group_score: what ranks a group: its largest choice ("max") or the sum of its two largest
            ("top2").
        renormalize: divide a token's weights by (their sum + 1e-20).
        scale: multiplies the weights at last.

    Returns:
        `Gate(topk_ids, topk_weights, counts, score_sum, z_sum)`: ids int32 `[T, k]` and weights
        float32 `[T, k]` in descending order of choice; int32 `[E]` slots of each expert; float32
        `[E]` sum over tokens of the softmax scores, or of each token's sigmoids divided by their
        sum; float32 `[]` sum over tokens of `logsumexp(logits)^2`. Gradients flow through
        `topk_weights`, `score_sum` and `z_sum`; what is kept for them is logits and ids, `4 E + 4
        k` bytes a token.

    Raises:
        ValueError: on a shape, dtype or option other than these; where values can be read (eager,
            on the CPU, outside a graph) also when a row of logits is NaN, +inf or -inf throughout,
            or bias is NaN or +inf. Elsewhere such a row gets ids -1 and weights 0 and is not
            counted.
    """
    options = scoring, groups, kept_groups, group_score, renormalize, float(scale)
    logits = checked_logits(logits, bias, k, *options)
    weights, ids, *sums = _moe_gate(logits, bias, k, *options)
    gate = Gate(ids, weights, *sums)
    check_rows(gate, logits, bias)
    return gate


def checked_logits(
    logits: Tensor,
    bias: Tensor | None,
    k: int,
    scoring: str,
    groups: int,
    kept_groups: int,
    group_score: str,
    renormalize: bool,
    scale: float,
) -> Tensor:
    """logits with contiguous rows; raises ValueError unless a router takes these arguments."""
    _check_logits(logits, bias)
    _check_choice(logits.shape[1], k, scoring, groups, kept_groups, group_score)
    if not -math.inf < scale < math.inf:  # it may be symbolic, which isfinite does not take
        raise ValueError(f"scale must be a finite number, got {scale}")
    return logits if logits.stride(1) == 1 else logits.contiguous()


def check_rows(gate: Gate, logits: Tensor, bias: Tensor | None) -> None:
    """Raise NotFiniteError where a row chose nothing, if values can be read; `kept_refusals`."""
    tokens, k = gate.topk_ids.shape
    if values_readable(logits) and int(gate.counts.sum()) != tokens * k:
        error, kept = _refusal(logits, bias, gate.topk_ids), _kept.get()
        if kept is None:
            raise error
        kept.append(error)


@contextmanager
def kept_refusals() -> Iterator[list[NotFiniteError]]:
    """Keep in a list what routers would raise for rows without a distribution.

    Inside, such rows choose no expert, as they do where values cannot be read. For processes that
    wait for each other's sums: one that stopped in the middle would leave the others waiting.
    """
    refused: list[NotFiniteError] = []
    token = _kept.set(refused)
    try:
        yield refused
    finally:
        _kept.reset(token)


def _check_logits(logits: Tensor, bias: Tensor | None) -> None:
    if logits.ndim != 2 or logits.shape[1] == 0 or logits.dtype != torch.float32:
        raise ValueError(
            "logits must be float32 of shape [T, E] with E > 0 (router products take "
            f"out_dtype=torch.float32), got {logits.dtype} of {list(logits.shape)}"
        )
    if bias is not None and (
        bias.dtype != torch.float32
        or bias.shape != logits.shape[1:]
        or bias.device != logits.device
    ):
        raise ValueError(
            f"bias must be float32 of shape [{logits.shape[1]}] on {logits.device} like logits, "
            f"got {bias.dtype} of {list(bias.shape)} on {bias.device}"
        )


def _check_choice(
    n_experts: int, k: int, scoring: str, groups: int, kept_groups: int, group_score: str
) -> None:
    if scoring not in SCORINGS:
        raise ValueError(f"scoring must be one of {SCORINGS}, got {scoring!r}")
    if group_score not in GROUP_SCORES:
        raise ValueError(f"group_score must be one of {GROUP_SCORES}, got {group_score!r}")
    if not 1 <= k <= n_experts:
        raise ValueError(f"k must be in [1, {n_experts}] (the experts of logits), got {k}")
    if groups < 1 or n_experts % groups:
        raise ValueError(f"groups must divide the {n_experts} experts of logits, got {groups}")
    if not 1 <= kept_groups <= groups:
        raise ValueError(f"kept_groups must be in [1, {groups}] (groups), got {kept_groups}")
    held = kept_groups * (n_experts // groups)
    if k > held:
        raise ValueError(f"k must be at most {held}, the experts of the kept groups, got {k}")
    if group_score == "top2" and 1 < groups == n_experts:
        raise ValueError(f"group_score 'top2' needs 2 experts a group, got groups={groups}")


def _refusal(logits: Tensor, bias: Tensor | None, topk_ids: Tensor) -> NotFiniteError:
    if bias is not None and not bool((bias < math.inf).all()):
        return NotFiniteError("bias must not hold NaN or +inf")
    row = int((topk_ids[:, 0] < 0).int().argmax())
    return NotFiniteError(
        f"logits has no distribution in row {row}: it holds NaN or +inf, or nothing but -inf"
    )
