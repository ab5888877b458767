"""The loss of a language model's head as a module, without its logits in memory."""

from __future__ import annotations

from torch import Tensor, nn

from fastllm.nn.autocast import autocasting
from fastllm.ops.linear_cross_entropy import REDUCTIONS, linear_cross_entropy
from fastllm.quantize.packed import PackedWeight


class LinearCrossEntropyLoss(nn.Module):
    """Cross entropy of `softmax(x @ weight.T + bias)` and targets: `nn.CrossEntropyLoss` of a head.

    Of `x.shape[0]` tokens no `[tokens, vocab]` tensor is made, in neither pass. The module holds no
    weight: it is given the head's, which stays where the model has it (tied to the embedding, say).

    Args:
        ignore_index: rows with this target are left out.
        reduction: "mean" over the rows that count, "sum" or "none".
        softcap: if positive, logits become softcap * tanh(logit / softcap), as in Gemma.
        label_smoothing: share of the target's probability spread over the vocabulary, in [0, 1].
        z_loss: weight of the squared log-sum-exp of a row's logits.

    Raises:
        ValueError: naming the option that is out of range.
    """

    def __init__(
        self, ignore_index: int = -100, reduction: str = "mean", softcap: float = 0.0,
        label_smoothing: float = 0.0, z_loss: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction {reduction!r} is not one of {', '.join(REDUCTIONS)}")
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
        for name, value in (("softcap", softcap), ("z_loss", z_loss)):
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"{name} must be a finite number from 0, got {value}")
        self.ignore_index, self.reduction, self.softcap = ignore_index, reduction, softcap
        self.label_smoothing, self.z_loss = label_smoothing, z_loss

    def forward(
        self, x: Tensor, weight: Tensor | PackedWeight, target: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """The loss, float32: a scalar, or `[...]` for reduction "none".

        Under torch.autocast x is taken in the dtype of the weight.

        Args:
            x: `[..., H]` hidden states, float32 or bfloat16.
            weight: `[V, H]` in the dtype of x.
            target: `[...]` int64 or int32 ids. Language models predict the next token: give
                `x[:, :-1]` and `ids[:, 1:]`.
            bias: `[V]`.

        Raises:
            ValueError: naming the argument whose shape, dtype or value does not fit.
        """
        if isinstance(weight, Tensor) and autocasting(x):
            x = x.to(weight.dtype)
        return linear_cross_entropy(
            x, weight, target, bias, ignore_index=self.ignore_index, reduction=self.reduction,
            softcap=self.softcap, label_smoothing=self.label_smoothing, z_loss=self.z_loss,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, "
            f"softcap={self.softcap:g}, label_smoothing={self.label_smoothing:g}, "
            f"z_loss={self.z_loss:g}"
        )
