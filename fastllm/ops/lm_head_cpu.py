"""The LM-head losses by native kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from . import packed_layout as layout
from .linear import gradient_product, prepared_rows
from .linear_kl import KINDS
from .lm_head import PLAIN, Head
from .lm_head_backend import CrossEntropy, Scaling
from .lm_head_chunks import add_rows
from .quant_matmul import ACTIVATIONS
from .quant_matmul_input_grad import quant_matmul_input_grad


class NativeHead:
    """A `Backend` of csrc/."""

    gathers = True
    keeps_memory = True

    def logit_rows(self, n: int) -> int:
        return 128  # 25 MB for 49,152 ids; a plain weight is packed anew for every 128 rows

    def logits(self, head: Head, x: Tensor, memory: Tensor | None) -> Tensor:
        assert memory is not None
        y = memory[: x.shape[0]]
        if head.format == PLAIN:
            _C.linear(y, x, head.weight, head.bias, prepared_rows(x))
        else:
            _C.quant_matmul(
                y, x, head.weight, head.packed_scales(), layout.FORMATS.index(head.format), head.n,
                head.bias, ACTIVATIONS.index(head.activation), prepared_rows(x),
            )  # fmt: skip
        return y

    def cross_entropy(
        self, losses: Tensor, lse: Tensor, d: Tensor | None, logits: Tensor, targets: Tensor,
        options: CrossEntropy,
    ) -> None:  # fmt: skip
        _C.cross_entropy_rows(
            losses, lse, d, logits, targets, options.softcap, options.smoothing, options.z_loss,
            options.scale,
        )  # fmt: skip

    def log_probs(
        self, logprob: Tensor, lse: Tensor, entropy: Tensor, logits: Tensor, targets: Tensor,
        scaling: Scaling,
    ) -> None:  # fmt: skip
        _C.log_prob_rows(
            logprob, lse, entropy, logits, targets, scaling.temperature, scaling.softcap
        )

    def target_gradient(
        self, d: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, coefficients: Tensor,
        scaling: Scaling,
    ) -> None:  # fmt: skip
        _C.target_gradient_rows(
            d, logits, targets, lse, coefficients, scaling.temperature, scaling.softcap
        )

    def divergence(
        self, out: Tensor | None, lse: Tensor | None, d: Tensor | None, grad: Tensor | None,
        logits: Tensor, teacher: Tensor, teacher_softcap: float, scaling: Scaling,
    ) -> None:  # fmt: skip
        _C.kl_rows(
            out, lse, d, grad, logits, teacher, scaling.temperature, scaling.softcap,
            teacher_softcap, KINDS.index(scaling.kind), scaling.beta,
        )  # fmt: skip

    def top_divergence(
        self, out: Tensor | None, lse: Tensor | None, d: Tensor | None, grad: Tensor | None,
        logits: Tensor, ids: Tensor, logprobs: Tensor, scaling: Scaling,
    ) -> None:  # fmt: skip
        _C.kl_top_rows(
            out, lse, d, grad, logits, ids, logprobs, scaling.temperature, scaling.softcap,
            KINDS.index(scaling.kind), scaling.beta,
        )  # fmt: skip

    def input_gradient(self, d: Tensor, head: Head, dx: Tensor) -> None:
        if head.format == PLAIN:
            gradient_product(dx, d, head.weight)
        elif head.format in layout.DENSE:
            gradient_product(
                dx, d, layout.dense_rows(head.weight, head.format, head.n, dx.shape[1])
            )
        else:
            dx.copy_(quant_matmul_input_grad(
                d, head.weight, head.packed_scales(), head.format, torch.float32
            ))  # fmt: skip

    def weight_gradient(self, y: Tensor, d: Tensor, x: Tensor, add: bool) -> None:
        gradient_product(y, d, x, transposed=True, add=add)

    def bias_gradient(self, y: Tensor, d: Tensor) -> None:
        _C.column_sums(y, d, True)


def _fits(x: Tensor, weight: Tensor, scales: Any, format: str) -> bool:
    if format == PLAIN:
        return weight.stride(1) == 1 or weight.shape[1] == 1
    return layout.rows_of(weight, format) == layout.ROWS_PER_GROUP["cpu"]


add_rows("native", "cpu", NativeHead(), _fits)
