"""What the LM-head losses ask of a device: kernels over rows of logits, and three products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .lm_head import Head


@dataclass(frozen=True, slots=True)
class Scaling:
    """How z comes from logits, and the divergence asked for."""

    softcap: float = 0.0
    temperature: float = 1.0
    kind: str = "forward"
    beta: float = 0.5


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """Options of the cross entropy's row kernel; scale: of its gradient."""

    softcap: float
    smoothing: float
    z_loss: float
    scale: float | Tensor


class Backend(Protocol):
    """The kernels of one device. Logits that a row kernel is given may be overwritten."""

    gathers: bool  # leave out rows without a target; else they stay, with no loss and gradient 0
    keeps_memory: bool  # logits go into memory that calls share; else an allocator gives it

    def logit_rows(self, n: int) -> int:
        """Rows of logits in the workspace, for a vocabulary of n."""
        ...

    def logits(self, head: Head, x: Tensor, memory: Tensor | None) -> Tensor:
        """The logits of rows x, float32, in the memory if there is one."""
        ...

    def cross_entropy(
        self, losses: Tensor, lse: Tensor, d: Tensor | None, logits: Tensor, targets: Tensor,
        options: CrossEntropy,
    ) -> None:  # fmt: skip
        """Losses and log-sum-exps of rows, and with d the gradient of their logits."""
        ...

    def log_probs(
        self, logprob: Tensor, lse: Tensor, entropy: Tensor, logits: Tensor, targets: Tensor,
        scaling: Scaling,
    ) -> None:  # fmt: skip
        """Log-probabilities of targets, log-sum-exps and entropies."""
        ...

    def target_gradient(
        self, d: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, coefficients: Tensor,
        scaling: Scaling,
    ) -> None:  # fmt: skip
        """`target_gradient` of lm_head.py."""
        ...

    def divergence(
        self, out: Tensor | None, lse: Tensor | None, d: Tensor | None, grad: Tensor | None,
        logits: Tensor, teacher: Tensor, teacher_softcap: float, scaling: Scaling,
    ) -> None:  # fmt: skip
        """Divergences from rows of a teacher's logits, or with d their gradients times grad."""
        ...

    def top_divergence(
        self, out: Tensor | None, lse: Tensor | None, d: Tensor | None, grad: Tensor | None,
        logits: Tensor, ids: Tensor, logprobs: Tensor, scaling: Scaling,
    ) -> None:  # fmt: skip
        """The same from a teacher's k ids and log-probabilities."""
        ...

    def input_gradient(self, d: Tensor, head: Head, dx: Tensor) -> None:
        """dx = d @ weight."""
        ...

    def weight_gradient(self, y: Tensor, d: Tensor, x: Tensor, add: bool) -> None:
        """y (+)= d.T @ x; y is float32 where more than one block is added up."""
        ...

    def bias_gradient(self, y: Tensor, d: Tensor) -> None:
        """y += the sum of the rows of d, float32."""
        ...
