"""RMSNorm as a module, in place of torch's: the same arguments, state and values."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastllm.ops.rms_norm import add_rms_norm, rms_norm

_OURS = (torch.float32, torch.bfloat16)
_DEFAULT_EPS = torch.finfo(torch.float32).eps  # what torch takes for bfloat16 too


class RMSNorm(nn.RMSNorm):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimensions, as `torch.nn.RMSNorm`.

    Statistics are float32 whatever the dtype of x, and the result is rounded once, to that dtype;
    the weight may be float32 or bfloat16 beside either. Inputs of other dtypes than these two are
    handed to torch.

    Args:
        normalized_shape: sizes of the last dimensions, which are normalized together.
        eps: added to the mean square; None: float32's epsilon.
        elementwise_affine: whether there is a `weight`, of `normalized_shape`.
        device, dtype: of the weight.
    """

    def forward(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """Norm of x [..., *normalized_shape], in `out_dtype` or the dtype of x.

        Raises ValueError if the last sizes of x are not `normalized_shape`.
        """
        dims = len(self.normalized_shape)
        if tuple(x.shape[-dims:]) != self.normalized_shape:
            raise ValueError(
                f"the last sizes of x must be {list(self.normalized_shape)}, got {list(x.shape)}"
            )
        weight: Tensor | None = self.weight
        if x.dtype not in _OURS or (weight is not None and weight.dtype not in _OURS):
            y = F.rms_norm(x, self.normalized_shape, weight, self.eps)
            return y if out_dtype is None else y.to(out_dtype)
        if weight is None:
            weight = torch.ones(self.normalized_shape, dtype=torch.float32, device=x.device)
        eps = _DEFAULT_EPS if self.eps is None else self.eps
        if dims == 1 and x.ndim <= 3:
            return rms_norm(x, weight, eps, out_dtype)
        rows = x.flatten(-dims) if x.ndim == dims else x.flatten(-dims).flatten(0, -2)
        return rms_norm(rows, weight.flatten(), eps, out_dtype).view(x.shape)

    def after_add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of residual + x in the dtype of x, residual + x in float32).

        What a pre-norm decoder does between two blocks, in one pass; x and residual [..., N].
        """
        eps = _DEFAULT_EPS if self.eps is None else self.eps
        return add_rms_norm(x, residual, self.weight, eps)


def empty_norm(size: int, eps: float) -> RMSNorm:
    """A norm of the last dimension whose weight a loader sets: on meta, and frozen."""
    return RMSNorm(size, eps, device="meta").requires_grad_(False)
