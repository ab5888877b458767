"""One step of AdamW in one pass over a parameter and its state. Memory-bound."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .triton_compat import cast


@triton.jit
def adamw_step_kernel(
    param_ptr,
    master_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    grad_ptr,
    scale_ptr,
    count,
    decay,
    new_share,
    keep_sq,
    new_share_sq,
    rate,
    inverse_root,
    eps,
    HAS_MASTER: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_SCALE:
        grad *= tl.load(scale_ptr)
    mean = tl.load(exp_avg_ptr + at, mask=mask, other=0.0)
    square = tl.load(exp_avg_sq_ptr + at, mask=mask, other=0.0)
    mean += (grad - mean) * new_share
    square = square * keep_sq + grad * grad * new_share_sq
    tl.store(exp_avg_ptr + at, mean, mask=mask)
    tl.store(exp_avg_sq_ptr + at, square, mask=mask)
    step = mean * rate / (tl.sqrt(square) * inverse_root + eps)
    if HAS_MASTER:
        weight = tl.load(master_ptr + at, mask=mask, other=0.0) * decay - step
        tl.store(master_ptr + at, weight, mask=mask)
        tl.store(param_ptr + at, cast(weight, param_ptr.dtype.element_ty), mask=mask)
    else:
        weight = tl.load(param_ptr + at, mask=mask, other=0.0) * decay - step
        tl.store(param_ptr + at, weight, mask=mask)


def adamw_step(
    param: Tensor,
    master: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    grad_scale: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """Step `param` in place: f32, or bf16 rounded from its f32 `master`; see fastllm.ops.adamw.

    All tensors contiguous and of one shape; moments f32, grad f32 or bf16, grad_scale one f32.
    """
    count = param.numel()
    if count == 0:
        return
    adamw_step_kernel[(triton.cdiv(count, tuning.ELEMENTWISE_BLOCK),)](
        param,
        master,
        exp_avg,
        exp_avg_sq,
        grad,
        grad_scale,
        count,
        float(1 - lr * weight_decay),
        float(1 - beta1),
        float(beta2),
        float(1 - beta2),
        float(lr / (1 - beta1**step)),
        float((1 - beta2**step) ** -0.5),
        float(eps),
        HAS_MASTER=master is not None,
        HAS_SCALE=grad_scale is not None,
        BLOCK=tuning.ELEMENTWISE_BLOCK,
        num_warps=4,
    )
