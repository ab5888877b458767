"""`moe_gate` and `moe_dispatch` in one op: on a GPU one launch takes logits to sorted slots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from .moe_dispatch import _moe_dispatch, moe_dispatch_ref
from .moe_gate import (
    Gate,
    check_rows,
    checked_logits,
    gate_outputs,
    moe_gate_cpu,
    moe_gate_ref,
    rows_contiguous,
)
from .moe_gate_backward import moe_gate_backward
from .moe_gate_cuda import fits_cuda, launch_gate
from .registry import Op


def moe_route_ref(logits: Tensor, bias: Tensor | None, k: int, *options: Any) -> tuple[Tensor, ...]:
    """Plain PyTorch definition of `moe_route`: the options of `moe_gate`, then first and n."""
    *rule, first_expert, n_experts = options
    gate = moe_gate_ref(logits, bias, k, *rule)
    return *gate, *moe_dispatch_ref(gate[1], n_experts, first_expert)


def _outputs(logits: Tensor, k: int, n_experts: int) -> tuple[Tensor, ...]:
    offsets = logits.new_empty((n_experts + 1,), dtype=torch.int32)
    slots = logits.new_empty((logits.shape[0] * k,), dtype=torch.int32)
    return *gate_outputs(logits, k), offsets, slots


def _fake(logits: Tensor, bias: Tensor | None, k: int, *options: Any) -> tuple[Tensor, ...]:
    return _outputs(logits, k, options[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    logits, _, _, scoring, _, _, _, renormalize, scale, _, _ = inputs
    ctx.mark_non_differentiable(output[1], output[2], output[5], output[6])
    ctx.save_for_backward(logits, output[1])
    ctx.options = scoring, renormalize, scale


def _gradients(
    ctx: Any, d_weights: Tensor, _ids: Any, _counts: Any, d_score_sum: Tensor, d_z_sum: Tensor,
    *_: Any,
) -> tuple[Any, ...]:  # fmt: skip
    logits, ids = ctx.saved_tensors
    d = d_weights.contiguous(), d_score_sum.contiguous(), d_z_sum
    return moe_gate_backward(logits, ids, *d, *ctx.options), *[None] * 10


_moe_route = Op(
    "moe_route(Tensor logits, Tensor? bias, int k, str scoring, int groups, int kept_groups, "
    "str group_score, bool renormalize, float scale, int first_expert, int n_experts) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    moe_route_ref,
    fake=_fake,
    backward=_gradients,
    setup_context=_save,
)


@_moe_route.impl("native", "cpu", dtypes=(torch.float32,), when=rows_contiguous)
def _moe_route_cpu(
    logits: Tensor, bias: Tensor | None, k: int, *options: Any
) -> tuple[Tensor, ...]:
    *rule, first_expert, n_experts = options
    gate = moe_gate_cpu(logits, bias, k, *rule)
    return *gate, *_moe_dispatch(gate[1], n_experts, first_expert)


if hasattr(_C, "moe_gate_cuda"):  # the extension was built with CUDA

    @_moe_route.impl("cuda", "cuda", dtypes=(torch.float32,), when=fits_cuda, opt_in=True)
    def _moe_route_cuda(
        logits: Tensor, bias: Tensor | None, k: int, *options: Any
    ) -> tuple[Tensor, ...]:
        first_expert, n_experts = options[-2:]
        out = _outputs(logits, k, n_experts)
        launch_gate(out[:5], (out[5], out[6]), first_expert, logits, bias, *options[:6])
        return out


@_moe_route.impl("triton", "cuda", dtypes=(torch.float32,))
def _moe_route_triton(
    logits: Tensor, bias: Tensor | None, k: int, *options: Any
) -> tuple[Tensor, ...]:
    from ..kernels import moe_dispatch, moe_gate

    *rule, first_expert, n_experts = options
    gate = moe_gate.moe_gate(logits, bias, k, *rule)
    return *gate, *moe_dispatch.moe_dispatch(gate[1], n_experts, first_expert)


def moe_route(
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
    first_expert: int = 0,
    n_experts: int | None = None,
) -> tuple[Gate, tuple[Tensor, Tensor]]:
    """`moe_gate` and the `moe_dispatch` of what it chose; differentiable in logits.

    Args:
        logits, k, scoring, bias, groups, kept_groups, group_score, renormalize, scale: as of
            `moe_gate`.
        first_expert, n_experts: the experts that are served here, all of them by default.

    Returns:
        The gate, and (offsets, slots) as `moe_dispatch` gives them: what `moe` takes as `dispatch`.

    Raises:
        ValueError: as `moe_gate`, and if the experts served here are not experts of logits.
    """
    options = scoring, groups, kept_groups, group_score, renormalize, float(scale)
    logits = checked_logits(logits, bias, k, *options)
    served = logits.shape[1] - first_expert if n_experts is None else n_experts
    if first_expert < 0 or served < 0 or first_expert + served > logits.shape[1]:
        raise ValueError(
            f"first_expert {first_expert} and n_experts {n_experts} must lie within the "
            f"{logits.shape[1]} experts of logits"
        )
    route = _moe_route(logits, bias, k, *options, first_expert, served)
    weights, ids, *sums, offsets, slots = route
    found = Gate(ids, weights, *sums)
    check_rows(found, logits, bias)
    return found, (offsets, slots)
