"""What the losses over a vocabulary share: the head's weight, its logits, their gradient.

`linear_cross_entropy`, `linear_logprob` and `linear_kl` take hidden rows x and the head's weight,
and never hold `[tokens, vocab]`: they walk over chunks of rows in a workspace whose size the
head's shape alone decides. Logits are those of `linear` or `quant_matmul` in fp32, and the
log-sum-exp is that of `log_probs` (fixed tiles of 512 columns), so that a loss sees the very
log-probabilities that generation reports.

From a logit l: the capped logit is softcap * tanh(l / softcap) (softcap 0: l), and
z = capped logit * (1 / temperature), as the sampler scales it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import packed_layout as layout
from .linear import check_output, linear_ref
from .quant_format import QUANT_FORMATS
from .quant_matmul import ACTIVATIONS, check_mode, quant_matmul_ref, variants
from .registry import Op

HEAD_SCHEMA = (
    "Tensor x, Tensor weight, Tensor? scales, str format, int n, str activation, Tensor? bias"
)
PLAIN = ""  # the format of a weight [V, H] in rows
VARIANTS = ("dense", *variants(layout.FORMATS))
_Backward = Callable[..., tuple[Any, ...]]
# Bits of the argument `gradients`: which ones a call makes.
INPUT, WEIGHT, BIAS, WEIGHT_FP32 = 1, 2, 4, 8


class Packed(Protocol):
    """What is read of a `fastllm.quantize.packed.PackedWeight`."""

    @property
    def data(self) -> Tensor: ...
    @property
    def scales(self) -> Tensor: ...
    @property
    def format(self) -> str: ...
    @property
    def n(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Head:
    """A head's weight as ops take it: rows `[V, H]` if format is "", else packed."""

    weight: Tensor
    scales: Tensor | None
    format: str
    n: int
    activation: str
    bias: Tensor | None

    def rows(self, columns: int) -> Tensor:
        """The weight's values as float32 `[V, H]`."""
        if self.format == PLAIN:
            return self.weight.float()
        return layout.dequantize(self.weight, self.packed_scales(), self.format, self.n, columns)

    def packed_scales(self) -> Tensor:
        """Scales of a packed weight."""
        assert self.scales is not None
        return self.scales

    def logits_ref(self, x: Tensor) -> Tensor:
        """Plain PyTorch definition of the head's logits, float32 `[T, V]`."""
        if self.format == PLAIN:
            return linear_ref(x, self.weight, self.bias, torch.float32)
        return quant_matmul_ref(
            x, self.weight, self.packed_scales(), self.format, self.n, self.bias, self.activation,
            torch.float32,
        )  # fmt: skip

    def gradients_ref(
        self, x: Tensor, d: Tensor, rows: Tensor, gradients: int, tokens: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Definition of the head's gradients from those of its logits.

        Args:
            x: hidden rows `[R, H]`.
            d: gradient of their logits, float32 `[R, V]`; it is rounded once to the dtype of x, as
                the values of a packed weight are.
            rows: their places among `tokens` rows; the others have no gradient.
            gradients: which to make; the others come out empty.
            tokens: rows of the result.
        """
        d = d.to(x.dtype).float()
        dx, dweight, dbias = self.empty_gradients(x, gradients, tokens)
        if gradients & INPUT:
            weight = self.rows(x.shape[1]).to(x.dtype).float()
            dx.zero_().index_copy_(0, rows, (d @ weight).to(x.dtype))
        if gradients & WEIGHT:
            dweight.copy_(d.T @ x.float())
        if gradients & BIAS:
            dbias.copy_(d.sum(0))
        return dx, dweight, dbias

    def empty_gradients(
        self, x: Tensor, gradients: int, tokens: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Memory for the gradients of x, weight and bias; of size 0 for those not asked for."""
        nothing = (0,)
        dx = x.new_empty((tokens, x.shape[1]) if gradients & INPUT else nothing)
        wide = torch.float32 if gradients & WEIGHT_FP32 else self.weight.dtype
        dweight = x.new_empty(self.weight.shape if gradients & WEIGHT else nothing, dtype=wide)
        kind = x.dtype if self.bias is None else self.bias.dtype
        dbias = x.new_empty((self.n,) if gradients & BIAS else nothing, dtype=kind)
        return dx, dweight, dbias


def head_of(args: Sequence[Any]) -> tuple[Tensor, Head]:
    """(x, head) from the first seven arguments of an op of the family."""
    return args[0], Head(*args[1:7])


def head_variant(*args: Any) -> str:
    """The variant of a call: "dense", or the packed format and activation."""
    format, activation = args[3], args[5]
    if format == PLAIN:
        return "dense"
    return format if format in layout.DENSE else f"{format}/{activation}"


def head_arguments(
    x: Tensor, weight: Tensor | Packed, bias: Tensor | None, activation: str, name: str = "x"
) -> tuple[Any, ...]:
    """Checked (x, weight, scales, format, n, activation, bias) of an op, x as `[T, H]`.

    Raises:
        ValueError: on mismatched shapes, dtypes or names, naming the argument.
    """
    of = name.removesuffix("x")  # "teacher_" of the teacher's arguments
    if x.dim() < 1 or x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"{name} must be float32 or bfloat16 [..., H], got {x.dtype} of {tuple(x.shape)}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"{of}activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if isinstance(weight, Tensor):
        if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
            raise ValueError(
                f"{of}weight must have shape [V, {x.shape[-1]}] (the columns of {name}), "
                f"got {tuple(weight.shape)}"
            )
        if weight.dtype != x.dtype:
            raise ValueError(
                f"{of}weight is {weight.dtype} and {name} is {x.dtype}: they must be the same"
            )
        n = weight.shape[0]
        found: tuple[Any, ...] = (rows, weight, None, PLAIN, n, activation, bias)
    else:
        n = weight.n
        layout.check_packed(weight.data, weight.scales, weight.format, n, x.shape[-1])
        activation = QUANT_FORMATS[weight.format].mode(activation)
        check_mode(weight.format, activation, x.dtype, f"{of}activation", name)
        found = (rows, weight.data, weight.scales, weight.format, n, activation, bias)
    if n < 1:
        raise ValueError(f"{of}weight has no rows: a distribution needs at least one")
    check_output(bias, None, n)
    return found


def check_scaling(temperature: float, softcap: float, of: str = "") -> None:
    """Raise ValueError unless logits can be divided by the temperature and capped."""
    if not 1e-5 <= temperature < float("inf"):
        raise ValueError(
            f"temperature must be at least 1e-5 and finite, got {temperature}: greedy rows have "
            "log-probability 0 and no gradient"
        )
    if not 0.0 <= softcap < float("inf"):
        raise ValueError(f"{of}softcap must be 0 (none) or positive, got {softcap}")


def wanted_gradients(
    x: Tensor, weight: Tensor | Packed, bias: Tensor | None, now: bool = True
) -> int:
    """Which gradients a call will need, as bits; with `now` false only how dweight is stored."""
    bits = 0
    if not is_compiling() and isinstance(weight, Tensor) and weight.requires_grad:
        # Where autograd accumulates in fp32, rounding to bf16 first would be for nothing. Compiled
        # code cannot ask; there it is rounded.
        wide = weight.is_leaf and getattr(weight, "grad_dtype", None) == torch.float32
        bits |= WEIGHT_FP32 * wide
    if not now or not torch.is_grad_enabled():
        return bits
    bits |= INPUT * x.requires_grad
    bits |= WEIGHT * (isinstance(weight, Tensor) and weight.requires_grad)
    return bits | BIAS * (bias is not None and bias.requires_grad)


def needed_gradients(ctx: Any) -> int:
    """The bits of the gradients that autograd asks an op of the family for."""
    need = ctx.needs_input_grad
    return INPUT * need[0] | WEIGHT * need[1] | BIAS * need[6]


def scaled_logits(logits: Tensor, softcap: float, temperature: float) -> Tensor:
    """z of raw logits, in their dtype."""
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return logits * (1.0 / temperature) if temperature != 1.0 else logits


def logit_gradient(dz: Tensor, logits: Tensor, softcap: float, temperature: float) -> Tensor:
    """Gradient of raw logits from that of z."""
    if temperature != 1.0:
        dz = dz * (1.0 / temperature)
    return dz * (1.0 - torch.tanh(logits / softcap).square()) if softcap else dz


def counted_rows(target: Tensor, ignore_index: int) -> Tensor:
    """Indices of the rows whose target counts."""
    return (target != ignore_index).nonzero()[:, 0]


# --- the gradient of losses that see one target a row -------------------------------------------


def linear_logits_backward_ref(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch definition of `linear_logits_backward`."""
    x, head = head_of(args)
    target, lse, coefficients, ignore_index, temperature, softcap, gradients = args[7:]
    rows = counted_rows(target, ignore_index)
    xs, ids = x[rows], target[rows].long()
    logits = head.logits_ref(xs)
    dz = target_gradient(
        scaled_logits(logits, softcap, temperature), ids, lse[rows], coefficients[rows]
    )
    d = logit_gradient(dz, logits, softcap, temperature)
    return head.gradients_ref(xs, d, rows, gradients, x.shape[0])


def target_gradient(z: Tensor, ids: Tensor, lse: Tensor, coefficients: Tensor) -> Tensor:
    """a p + b [v = target] + c + e p log p of every row, float32 `[R, V]`.

    Args:
        z: scaled logits `[R, V]`.
        ids: targets `[R]`; a row whose target is outside the vocabulary has no gradient.
        lse: log-sum-exp of z.
        coefficients: (a, b, c, e) `[R, 4]`.
    """
    inside = (ids >= 0) & (ids < z.shape[1])
    a, b, c, e = coefficients.masked_fill(~inside[:, None], 0.0)[:, :, None].unbind(1)
    logp = z - lse[:, None]
    p = logp.exp()
    dz = a * p + c + e * torch.where(p > 0, p * logp, 0.0)
    dz = dz.scatter_add(1, ids.clamp(0, z.shape[1] - 1)[:, None], b)
    return dz.masked_fill(~inside[:, None], 0.0)


def gradients_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of what a backward op gives: `gradients` is its last argument."""
    x, head = head_of(args)
    return head.empty_gradients(x, args[-1], x.shape[0])


linear_logits_backward = Op(
    f"linear_logits_backward({HEAD_SCHEMA}, Tensor target, Tensor lse, Tensor coefficients, "
    "int ignore_index, float temperature, float softcap, int gradients) "
    "-> (Tensor, Tensor, Tensor)",
    linear_logits_backward_ref,
    fake=gradients_fake,
    variant=head_variant,
)


def first_derivative_only(name: str) -> Callable[[_Backward], _Backward]:
    """Make a backward of the op `name` that refuses to be recorded (`create_graph=True`).

    Its kernels record nothing: its results would be constants, and a penalty on a gradient would
    silently lose what goes through them wherever the rest of a model is differentiable twice.
    """

    def decorate(backward: _Backward) -> _Backward:
        @functools.wraps(backward)
        def run(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            if torch.is_grad_enabled():
                raise RuntimeError(
                    f"fastllm.ops.{name} has no second derivative: differentiate twice through "
                    "its logits instead, fastllm.ops.linear and torch.nn.functional"
                )
            return backward(ctx, *grads)

        return run

    return decorate


def given_gradients(
    found: tuple[Tensor, Tensor, Tensor], needed: int
) -> tuple[Tensor | None, Tensor | None, None, None, None, None, Tensor | None]:
    """What a backward returns for the seven arguments of the head."""
    dx, dweight, dbias = found
    return (
        dx if needed & INPUT else None,
        dweight if needed & WEIGHT else None,
        None,
        None,
        None,
        None,
        dbias if needed & BIAS else None,
    )
