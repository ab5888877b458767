"""The LM-head losses by Triton kernels; the two products of the backward pass are cuBLAS's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import packed_layout as layout
from .linear_cross_entropy import cross_entropy_coefficients
from .lm_head import PLAIN, Head
from .lm_head_backend import CrossEntropy, Scaling
from .lm_head_chunks import add_rows
from .registry import batch_invariant

_LOGITS = 1 << 26  # in the workspace, 256 MB: enough rows to fill the GPU with any vocabulary


class TritonHead:
    """A `Backend` of kernels/. Nothing is read on the host: rows without a target stay."""

    gathers = False
    keeps_memory = False

    def logit_rows(self, n: int) -> int:
        return max(128, _LOGITS // n // 128 * 128)

    def logits(self, head: Head, x: Tensor, memory: Tensor | None) -> Tensor:
        from ..kernels import linear, quant_matmul

        fixed = batch_invariant()
        if head.format == PLAIN:
            return linear.linear(x, head.weight, head.bias, torch.float32, batch_invariant=fixed)
        return quant_matmul.quant_matmul(
            x, head.weight, head.packed_scales(), head.format, head.n, head.bias, head.activation,
            torch.float32, batch_invariant=fixed,
        )  # fmt: skip

    def cross_entropy(
        self, losses: Tensor, lse: Tensor, d: Tensor | None, logits: Tensor, targets: Tensor,
        options: CrossEntropy,
    ) -> None:  # fmt: skip
        from ..kernels import lm_head as kernel

        smoothing, z_loss = options.smoothing, options.z_loss
        logprob, found, _, mean = kernel.loss_rows(
            logits, targets, options.softcap, 1.0, walk=smoothing != 0.0
        )
        loss = -logprob
        if smoothing:
            loss = loss * (1.0 - smoothing) + smoothing * (found - mean)
        if z_loss:
            loss = loss + z_loss * found.square()
        losses.copy_(loss)
        lse.copy_(found)
        if d is not None:
            g = torch.ones_like(found) * options.scale
            coefficients = cross_entropy_coefficients(g, found, logits.shape[1], smoothing, z_loss)
            kernel.target_gradient_rows(
                d, logits, targets, found, coefficients, options.softcap, 1.0
            )

    def log_probs(
        self, logprob: Tensor, lse: Tensor, entropy: Tensor, logits: Tensor, targets: Tensor,
        scaling: Scaling,
    ) -> None:  # fmt: skip
        from ..kernels import lm_head as kernel

        found = kernel.loss_rows(logits, targets, scaling.softcap, scaling.temperature, walk=True)
        for to, value in zip((logprob, lse, entropy), found[:3], strict=True):
            to.copy_(value)

    def target_gradient(
        self, d: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, coefficients: Tensor,
        scaling: Scaling,
    ) -> None:  # fmt: skip
        from ..kernels import lm_head as kernel

        kernel.scale_logits(logits, scaling.softcap, scaling.temperature)
        kernel.target_gradient_rows(
            d, logits, targets, lse, coefficients, scaling.softcap, scaling.temperature
        )

    def divergence(
        self, out: Tensor | None, lse: Tensor | None, d: Tensor | None, grad: Tensor | None,
        logits: Tensor, teacher: Tensor, teacher_softcap: float, scaling: Scaling,
    ) -> None:  # fmt: skip
        from ..kernels import lm_head as kernel

        kernel.scale_logits(logits, scaling.softcap, scaling.temperature)
        kernel.scale_logits(teacher, teacher_softcap, scaling.temperature)
        sums, teacher_sums = kernel.row_lse(logits), kernel.row_lse(teacher)
        value, student = kernel.kl_rows(
            logits, sums, teacher, teacher_sums, scaling.kind, scaling.beta
        )
        _copy(out, value, lse, sums)
        if d is not None:
            assert grad is not None
            kernel.kl_gradient_rows(
                d, grad, student, logits, sums, teacher, teacher_sums, scaling.kind, scaling.beta,
                scaling.softcap, scaling.temperature,
            )  # fmt: skip

    def top_divergence(
        self, out: Tensor | None, lse: Tensor | None, d: Tensor | None, grad: Tensor | None,
        logits: Tensor, ids: Tensor, logprobs: Tensor, scaling: Scaling,
    ) -> None:  # fmt: skip
        from ..kernels import lm_head as kernel

        value, sums = kernel.kl_top_rows(
            d, grad, logits, ids, logprobs, scaling.softcap, scaling.temperature, scaling.kind,
            scaling.beta,
        )  # fmt: skip
        _copy(out, value, lse, sums)

    def input_gradient(self, d: Tensor, head: Head, dx: Tensor) -> None:
        from ..kernels import quant_matmul_input_grad as kernel

        if head.format == PLAIN:
            dx.copy_(d @ head.weight)
        elif head.format in layout.DENSE:
            dx.copy_(d @ layout.dense_rows(head.weight, head.format, head.n, dx.shape[1]))
        else:
            dx.copy_(kernel.quant_matmul_input_grad(
                d, head.weight, head.packed_scales(), head.format, torch.float32
            ))  # fmt: skip

    def weight_gradient(self, y: Tensor, d: Tensor, x: Tensor, add: bool) -> None:
        if y.dtype == x.dtype:
            torch.addmm(y, d.T, x, beta=float(add), out=y)
        elif add:
            y += _fp32_product(d.T, x)
        else:
            y.copy_(_fp32_product(d.T, x))

    def bias_gradient(self, y: Tensor, d: Tensor) -> None:
        y += d.sum(0, dtype=torch.float32)


def _fp32_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of bfloat16 in float32; torch has it for GPUs alone, tests run elsewhere too."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _copy(out: Tensor | None, value: Tensor, lse: Tensor | None, sums: Tensor) -> None:
    if out is not None and lse is not None:
        out.copy_(value)
        lse.copy_(sums)


def _fits(x: Tensor, weight: Tensor, scales: Any, format: str) -> bool:
    if format == PLAIN:
        return weight.stride(1) == 1 or weight.shape[1] == 1
    return layout.rows_of(weight, format) == layout.ROWS_PER_GROUP["cuda"]


add_rows("triton", "cuda", TritonHead(), _fits)
