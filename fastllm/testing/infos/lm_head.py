"""Cases of the LM-head losses and of their backward ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ops import packed_layout as layout
from ...ops.lm_head import BIAS, INPUT, WEIGHT, WEIGHT_FP32
from ...ops.registry import OPS, Op
from ..opinfo import Args, Case, OpInfo
from .quant_matmul import exact_product, random_packed

ALL = INPUT | WEIGHT | BIAS


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A head [n, k] and rows of hidden states; `format` "" is a plain weight.

    ignored: every fourth row has no target. made: gradients that the cross entropy makes itself.
    """

    rows: int
    n: int
    k: int
    format: str = ""
    activation: str = "bf16"
    bias: bool = False
    ignored: bool = False
    long_ids: bool = True
    temperature: float = 1.0
    softcap: float = 0.0
    smoothing: float = 0.0
    z_loss: float = 0.0
    reduction: str = "mean"
    made: int = 0
    kind: str = "forward"
    picks: int = 5

    @property
    def label(self) -> str:
        text = f"{self.format or 'plain'}-{self.rows}x{self.n}x{self.k}-{self.reduction}"
        text += f"-t{self.temperature:g}-cap{self.softcap:g}-{self.kind}-top{self.picks}"
        return text + "-bias" * self.bias + "-ignored" * self.ignored + f"-g{self.made}"


# Together: no row, one row, a last tile of the vocabulary of 1, 88 and 512 columns, odd k, more
# rows than a chunk of the logits, packed weights, every option alone and all at once.
PROBLEMS = (
    Problem(rows=0, n=600, k=33, reduction="sum", made=INPUT | WEIGHT),
    Problem(rows=1, n=513, k=32, made=INPUT, kind="reverse", picks=1),
    Problem(rows=2, n=1, k=1, reduction="sum", kind="js", picks=1),
    Problem(rows=17, n=1112, k=33, bias=True, made=ALL, kind="js"),
    Problem(
        rows=17, n=600, k=34, bias=True, ignored=True, temperature=0.7, softcap=3.0, smoothing=0.1,
        z_loss=0.01, reduction="sum", made=ALL | WEIGHT_FP32, long_ids=False, kind="reverse",
    ),
    Problem(
        rows=9, n=512, k=64, ignored=True, temperature=2.0, smoothing=0.2, reduction="none",
        kind="js", picks=512,
    ),
    Problem(rows=130, n=530, k=20, ignored=True, z_loss=0.1, reduction="none", softcap=5.0),
    Problem(rows=5, n=530, k=64, format="q4_1", activation="int8", made=INPUT, temperature=1.5),
    Problem(rows=5, n=40, k=64, format="q8_0", kind="js", reduction="none"),
    Problem(rows=20, n=77, k=256, format="q6_k", activation="int8", made=INPUT, kind="reverse"),
    Problem(rows=20, n=77, k=64, format="nf4", ignored=True),
    Problem(rows=30, n=77, k=160, format="fp8", activation="fp8", made=INPUT, kind="js"),
    Problem(rows=3, n=40, k=31, format="bf16", bias=True, made=INPUT | BIAS, kind="reverse"),
)  # fmt: skip


def _dtypes_of(problem: Problem) -> tuple[torch.dtype, ...]:
    if problem.format in layout.DENSE:
        return (layout.DENSE[problem.format],)
    if problem.format and problem.activation not in ("int8", "fp8"):
        return (torch.bfloat16,)
    return torch.float32, torch.bfloat16


def _problems(dtype: torch.dtype) -> Iterator[Problem]:
    return (p for p in PROBLEMS if dtype in _dtypes_of(p))


def _head(g: torch.Generator, p: Problem, dtype: torch.dtype) -> Args:
    """(x, weight, scales, format, n, activation, bias)."""
    x = torch.randn(p.rows, p.k + 3, generator=g).to(dtype)[:, 1 : p.k + 1]  # rows are strided
    bias = torch.randn(p.n, generator=g).to(dtype) if p.bias else None
    if p.format:
        data, scales = random_packed(g, p.format, p.n, p.k, layout.ROWS_PER_GROUP["cpu"])
        return x, data, scales, p.format, p.n, p.activation, bias
    weight = (torch.randn(p.n, p.k, generator=g) * 2 * max(p.k, 1) ** -0.5).to(dtype)
    return x, weight, None, "", p.n, p.activation, bias


def _targets(g: torch.Generator, p: Problem) -> Tensor:
    ids = torch.randint(0, p.n, (p.rows,), generator=g)
    if p.ignored:
        ids[::4] = -100
    return ids if p.long_ids else ids.int()


def exact_logits(head: Args) -> Tensor:
    """float64 logits of (x, weight, scales, format, n, activation, bias), differentiable."""
    x, weight, scales, format, n, activation, bias = head
    if format:
        return exact_product(x, weight, scales, format, n, bias, activation, None)
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


def _scaled(logits: Tensor, softcap: float, temperature: float) -> Tensor:
    z = softcap * torch.tanh(logits / softcap) if softcap else logits
    return z / temperature


def _leaves(head: Args) -> tuple[Args, list[Tensor | None]]:
    """The head in float64 (packed weights as they are), and its x, weight and bias as leaves."""
    new = list(head)
    for i in (0, 1, 6):
        if head[i] is not None and head[i].is_floating_point() and not (i == 1 and head[3]):
            new[i] = head[i].detach().double().requires_grad_()
    leaves = [new[0], None if head[3] else new[1], new[6]]
    return tuple(new), leaves


def _gradients(head: Args, bits: int, loss: Callable[[Args], Tensor]) -> tuple[Tensor, ...]:
    """Float64 gradients of loss(head) that `bits` ask for, the others empty."""
    with torch.enable_grad():
        new, leaves = _leaves(head)
        value = loss(new)
        wanted = [leaf if bits & bit else None for leaf, bit in zip(leaves, (1, 2, 4), strict=True)]
        given = [leaf for leaf in wanted if leaf is not None]
        found = iter(torch.autograd.grad(value, given, allow_unused=True) if given else ())
    empty = torch.empty(0, dtype=torch.float64)
    return tuple(empty if leaf is None else _or_zeros(next(found), leaf) for leaf in wanted)


def _or_zeros(grad: Tensor | None, leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if grad is None else grad


def _reference(name: str) -> Callable[..., Any]:
    """The definition of an op as a differentiable function: its backward is the definition's too.

    Autograd of the definition would leave out its rounding of the logits' gradient.
    """

    class Reference(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = OPS[name].ref(*args)
            setup = OPS[name].setup_context
            assert setup is not None
            setup(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            backward = OPS[name].backward
            assert backward is not None
            with mock.patch.object(Op, "_choose", lambda op, first, args: op.ref):
                return backward(ctx, *grads)

    return Reference.apply


# --- losses of one target a row -----------------------------------------------------------------


def _row_losses(
    logits: Tensor, target: Tensor, softcap: float, smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    z = _scaled(logits, softcap, 1.0)
    lse = z.logsumexp(1)
    keep = target != -100
    picked = z.gather(1, target.long().clamp(min=0)[:, None])[:, 0] - lse
    loss = -(1 - smoothing) * picked - smoothing * (z - lse[:, None]).mean(1) + z_loss * lse**2
    return loss.where(keep, 0.0), lse.where(keep, 0.0).detach()


def _cross_entropy_exact(*args: Any) -> tuple[Tensor, ...]:
    head, (target, _, reduction, softcap, smoothing, z_loss, bits) = args[:7], args[7:]
    count = int((target != -100).sum())

    def reduced(head: Args) -> Tensor:
        losses = _row_losses(exact_logits(head), target, softcap, smoothing, z_loss)[0]
        if reduction == "none":
            return losses
        return losses.sum() / (count if reduction == "mean" else 1)

    lse = _row_losses(exact_logits(head), target, softcap, smoothing, z_loss)[1]
    if reduction == "none":
        return reduced(head), lse, *_gradients(head, 0, reduced)
    return reduced(head), lse, *_gradients(head, bits, reduced)


def _cross_entropy_case(p: Problem, dtype: torch.dtype) -> Case:
    def make(g: torch.Generator) -> Args:
        head = _head(g, p, dtype)
        options = p.reduction, p.softcap, p.smoothing, p.z_loss, p.made
        return *head, _targets(g, p), -100, *options

    return Case(label=p.label, make=make, gradients=p.rows > 0)


def _logprob_exact(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    head, (target, _, temperature, softcap, _) = args[:7], args[7:]
    z = _scaled(exact_logits(head), softcap, temperature)
    keep = target != -100
    logp = z.log_softmax(1)
    picked = logp.gather(1, target.long().clamp(min=0)[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(1)
    return (
        picked.where(keep, 0.0),
        entropy.where(keep, 0.0),
        z.logsumexp(1).where(keep, 0.0).detach(),
    )


def _logprob_case(p: Problem, dtype: torch.dtype) -> Case:
    def make(g: torch.Generator) -> Args:
        head = _head(g, p, dtype)
        return *head, _targets(g, p), -100, p.temperature, p.softcap, 0

    # One id: probability 1, no gradient but rounding.
    return Case(label=p.label, make=make, gradients=p.n > 1 and p.rows > 0)


def _logits_backward_exact(*args: Any) -> tuple[Tensor, ...]:
    head, (target, lse, coefficients, _, temperature, softcap, bits) = args[:7], args[7:]
    keep = target != -100
    ids = target.long().clamp(min=0)[:, None]

    def loss(head: Args) -> Tensor:
        z = _scaled(exact_logits(head), softcap, temperature)
        logp = z.detach() - lse.double()[:, None]
        a, b, c, e = coefficients.double()[:, :, None].unbind(1)
        dz = a * logp.exp() + c + e * logp.exp() * logp
        dz = dz.scatter_add(1, ids, b)
        return (z * dz * keep[:, None]).sum()

    return _gradients(head, bits, loss)


def _logits_backward_case(p: Problem, dtype: torch.dtype) -> Case:
    def make(g: torch.Generator) -> Args:
        head = _head(g, p, dtype)
        lse = _scaled(exact_logits(head), p.softcap, p.temperature).logsumexp(1).float()
        coefficients = torch.randn(p.rows, 4, generator=g)
        coefficients[:, 2] /= p.n
        bits = INPUT | (0 if p.format else WEIGHT | p.made & WEIGHT_FP32) | BIAS * p.bias
        scaling = p.temperature, p.softcap
        return *head, _targets(g, p), lse, coefficients, -100, *scaling, bits

    return Case(label=p.label, make=make)


# --- divergences --------------------------------------------------------------------------------


def _divergence(logp: Tensor, logq: Tensor, kind: str, beta: float) -> Tensor:
    p, q = logp.exp(), logq.exp()
    if kind == "forward":
        return (q * (logq - logp)).sum(1)
    if kind == "reverse":
        return (p * (logp - logq)).sum(1)
    logm = (beta * q + (1 - beta) * p).log()
    return beta * (q * (logq - logm)).sum(1) + (1 - beta) * (p * (logp - logm)).sum(1)


def _dense_divergence(head: Args, teacher: Args, options: Args) -> tuple[Tensor, Tensor]:
    teacher_softcap, temperature, softcap, kind, beta = options
    z = _scaled(exact_logits(head), softcap, temperature)
    logq = _scaled(exact_logits(teacher), teacher_softcap, temperature).log_softmax(1)
    return _divergence(z.log_softmax(1), logq, kind, beta), z.logsumexp(1).detach()


def _top_divergence(head: Args, teacher: Args, options: Args) -> tuple[Tensor, Tensor]:
    (ids, logprobs), (temperature, softcap, kind, beta) = teacher, options
    z = _scaled(exact_logits(head), softcap, temperature)
    ids, logq = ids.long(), logprobs.double()
    logp = z.log_softmax(1)
    known = logp.gather(1, ids)
    if ids.shape[1] < z.shape[1]:
        hidden = torch.zeros_like(logp).scatter_(1, ids, float("-inf"))
        known = torch.cat((known, (logp + hidden).logsumexp(1, keepdim=True)), 1)
        logq = torch.cat((logq, torch.log1p(-logq.exp().sum(1, keepdim=True))), 1)
    return _divergence(known, logq, kind, beta), z.logsumexp(1).detach()


def _teacher(g: torch.Generator, p: Problem, dtype: torch.dtype) -> Args:
    plain = Problem(rows=p.rows, n=p.n, k=24, bias=p.bias)
    return _head(g, plain, dtype)


def _top_teacher(g: torch.Generator, p: Problem, dtype: torch.dtype) -> Args:
    head = _teacher(g, p, dtype)
    logq = _scaled(exact_logits(head), 0.0, p.temperature).log_softmax(1)
    values, ids = logq.topk(p.picks, 1)
    return ids if p.long_ids else ids.int(), values.float()


def _divergence_case(p: Problem, dtype: torch.dtype, top: bool, backward: bool) -> Case:
    def make(g: torch.Generator) -> Args:
        head = _head(g, p, dtype)
        teacher = (_top_teacher if top else _teacher)(g, p, dtype)
        options: Args = p.temperature, p.softcap, p.kind, 0.3
        if not top:
            options = (p.softcap and 4.0, *options)
        bits = INPUT | (0 if p.format else WEIGHT | p.made & WEIGHT_FP32) | BIAS * p.bias
        last: Args = (torch.randn(p.rows, generator=g), bits) if backward else (0,)
        return *head, *teacher, *options, *last

    return Case(label=p.label, make=make, gradients=p.n > 1 and p.rows > 0)


def _divergence_exact(top: bool, backward: bool) -> Callable[..., tuple[Tensor, ...]]:
    formula, cut = (_top_divergence, 9) if top else (_dense_divergence, 14)

    def exact(*args: Any) -> tuple[Tensor, ...]:
        head, teacher = args[:7], args[7:cut]
        if not backward:
            return formula(head, teacher, args[cut:-1])
        grad, bits = args[-2:]
        options = args[cut:-2]
        return _gradients(
            head, bits, lambda head: (formula(head, teacher, options)[0] * grad.double()).sum()
        )

    return exact


def _divergence_info(name: str, top: bool, backward: bool) -> OpInfo:
    return OpInfo(
        name=name,
        # One id has divergence 0, whose gradient is all rounding.
        cases=lambda dtype: (
            _divergence_case(p, dtype, top, backward) for p in _problems(dtype) if p.n > 1
        ),
        exact=_divergence_exact(top, backward),
        peer=None if backward else _reference(name),
        grad_args=() if backward else (0,),
    )


INFOS = [
    OpInfo(
        name="linear_cross_entropy",
        cases=lambda dtype: (_cross_entropy_case(p, dtype) for p in _problems(dtype)),
        exact=_cross_entropy_exact,
        peer=_reference("linear_cross_entropy"),
        grad_args=(0, 6),
    ),
    OpInfo(
        name="linear_logprob",
        cases=lambda dtype: (_logprob_case(p, dtype) for p in _problems(dtype)),
        exact=_logprob_exact,
        peer=_reference("linear_logprob"),
        grad_args=(0, 6),
    ),
    OpInfo(
        name="linear_logits_backward",
        cases=lambda dtype: (_logits_backward_case(p, dtype) for p in _problems(dtype)),
        exact=_logits_backward_exact,
    ),
    _divergence_info("linear_kl", top=False, backward=False),
    _divergence_info("linear_kl_backward", top=False, backward=True),
    _divergence_info("linear_kl_top", top=True, backward=False),
    _divergence_info("linear_kl_top_backward", top=True, backward=True),
]
