"""The LM-head losses on the CPU: chunks of rows through native kernels.

A block of up to `block_rows` rows goes through the three products of a step of training:

    logits   = x W'       fp32, 128 rows at a time, and at once through the row kernel that makes
                          the losses and the gradient d of the logits (dtype of x)
    dx       = d W        complete for the rows of the block
    dweight += d' x       fp32 sums over blocks; one block alone is rounded where it is written

The workspace is the logits of 128 rows and d of one block. Blocks are large because each of them
reads and writes all of dweight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _C
from . import packed_layout as layout
from .linear import prepared_rows
from .linear_cross_entropy import _linear_cross_entropy, reduce_losses
from .linear_kl import (
    KINDS,
    _linear_kl,
    _linear_kl_top,
    linear_kl_backward,
    linear_kl_top_backward,
)
from .linear_logprob import _linear_logprob
from .lm_head import (
    BIAS,
    INPUT,
    PLAIN,
    VARIANTS,
    WEIGHT,
    WEIGHT_FP32,
    Head,
    head_of,
    linear_logits_backward,
)
from .quant_matmul import ACTIVATIONS

LOGIT_ROWS = 128  # 25 MB of logits for 49,152 ids; a weight is packed anew for every 128 rows
_DEQUANTIZED_ROWS = 2048  # of a packed weight, at a time, for the gradient of x


def block_rows(columns: int) -> int:
    """Rows of a block: d of one is at most about as large as the weight (or 512 rows)."""
    return min(max(512, columns), 1024)


def spans(count: int, most: int) -> Iterator[slice]:
    """Equal parts of `count` rows, even but for the last one."""
    if not count:
        return
    parts = -(-count // most)
    size = -(-count // parts)
    size += size % 2
    for begin in range(0, count, size):
        yield slice(begin, min(begin + size, count))


def _padded_stride(columns: int) -> int:
    # An odd number of cache lines: rows a multiple of 4 KB apart would share sets of the caches.
    return -(-columns // 64) * 64 + 32


class Logits:
    """A head's logits, `LOGIT_ROWS` rows at a time, in one workspace."""

    def __init__(self, head: Head, most: int) -> None:
        self.head = head
        self.memory = torch.empty((min(most, LOGIT_ROWS), head.n), dtype=torch.float32)

    def of(self, x: Tensor) -> Tensor:
        """float32 `[R, V]` of rows x `[R, H]`; overwritten by the next call."""
        head, y = self.head, self.memory[: x.shape[0]]
        if head.format == PLAIN:
            _C.linear(y, x, head.weight, head.bias, prepared_rows(x))
        else:
            _C.quant_matmul(
                y, x, head.weight, head.packed_scales(), layout.FORMATS.index(head.format), head.n,
                head.bias, ACTIVATIONS.index(head.activation), prepared_rows(x),
            )  # fmt: skip
        return y


class Rows:
    """The rows of x that count, block by block; their results go to the places they came from."""

    def __init__(self, x: Tensor, target: Tensor | None, ignore_index: int) -> None:
        self.x = x if x.stride(1) == 1 else x.contiguous()
        self.target = target
        self.tokens = self.count = x.shape[0]
        self.index: Tensor | None = None
        if target is not None:
            index = (target != ignore_index).nonzero()[:, 0]
            self.count = index.shape[0]
            if self.count < self.tokens:
                self.index = index

    def take(self, tensor: Tensor, part: slice) -> Tensor:
        """The rows `part` of those that count, of a tensor with one row a token."""
        return tensor[part] if self.index is None else tensor[self.index[part]]

    def spread(self, found: Tensor) -> Tensor:
        """Results of the rows that count, `[count]`, zeros elsewhere."""
        if self.index is None:
            return found
        return found.new_zeros(self.tokens).index_copy_(0, self.index, found)


class Gradients:
    """Gradients of x, weight and bias, summed up over blocks of rows."""

    def __init__(self, head: Head, rows: Rows, bits: int) -> None:
        self.head, self.rows, self.bits, x = head, rows, bits, rows.x
        self.dx, self.dweight, self.dbias = head.empty_gradients(x, bits, rows.tokens)
        self.size = block_rows(x.shape[1])
        self.most = min(rows.count, self.size)
        self.d = torch.empty((self.most, _padded_stride(head.n)), dtype=x.dtype)[:, : head.n]
        self.sums = self.dweight
        narrow = self.dweight.dtype != torch.float32
        if bits & WEIGHT and narrow and rows.count > self.size:
            self.sums = torch.empty(self.dweight.shape, dtype=torch.float32)
        if bits & INPUT and (rows.index is not None or not rows.count):
            self.dx.zero_()
        self.bias_sums = torch.zeros(head.n if bits & BIAS else 0, dtype=torch.float32)

    def add(self, part: slice) -> None:
        """Take in `self.d`, the gradient of the logits of the rows `part`."""
        x, d = self.rows.take(self.rows.x, part), self.d[: part.stop - part.start]
        if self.bits & INPUT:
            dx = self._input_gradient(d, x.shape[1])
            if self.rows.index is None:
                self.dx[part] = dx
            else:
                self.dx.index_copy_(0, self.rows.index[part], dx.to(self.dx.dtype))
        if self.bits & WEIGHT:
            _product(self.sums, d, x, transposed=True, add=part.start > 0)
        if self.bits & BIAS:
            _C.column_sums(self.bias_sums, d, True)

    def _input_gradient(self, d: Tensor, columns: int) -> Tensor:
        head = self.head
        dx = torch.empty((d.shape[0], columns), dtype=torch.float32)
        if head.format == PLAIN:
            _product(dx, d, head.weight)
            return dx
        for begin in range(0, head.n, _DEQUANTIZED_ROWS):
            ids = torch.arange(begin, min(begin + _DEQUANTIZED_ROWS, head.n))
            stored = layout.columns_of(head.weight, head.format)  # bf16: an even number
            w = torch.empty((ids.shape[0], stored), dtype=d.dtype)
            _C.quant_embedding(
                w, ids, head.weight, head.packed_scales(), layout.FORMATS.index(head.format), head.n
            )
            _product(dx, d[:, begin : begin + ids.shape[0]], w[:, :columns], add=begin > 0)
        return dx

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """(dx, dweight, dbias), empty where they were not asked for."""
        if self.bits & WEIGHT and not self.rows.count:
            self.dweight.zero_()
        elif self.sums is not self.dweight:
            self.dweight.copy_(self.sums)
        if self.bits & BIAS:
            self.dbias.copy_(self.bias_sums)
        return self.dx, self.dweight, self.dbias


def _product(y: Tensor, a: Tensor, b: Tensor, transposed: bool = False, add: bool = False) -> None:
    """y (+)= a @ b, or a.T @ b."""
    k = a.shape[0 if transposed else 1]
    scratch = torch.empty(_C.gradient_product_scratch(b.shape[1], k, transposed), dtype=torch.uint8)
    _C.gradient_product(y, a, b, scratch, transposed, add)


def _native_layout(x: Tensor, weight: Tensor, scales: Any, format: str, *_: Any) -> bool:
    if format == PLAIN:
        return weight.stride(1) == 1 or weight.shape[1] == 1
    return layout.rows_of(weight, format) == layout.ROWS_PER_GROUP["cpu"]


@_linear_cross_entropy.impl("native", "cpu", variants=VARIANTS, when=_native_layout)
def _cross_entropy_cpu(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, head = head_of(args)
    target, ignore_index, reduction, softcap, smoothing, z_loss, bits = args[7:]
    rows = Rows(x, target, ignore_index)
    if reduction == "none":
        bits &= WEIGHT_FP32
    made = Gradients(head, rows, bits) if bits & ~WEIGHT_FP32 else None
    losses, lse = torch.empty(rows.count), torch.empty(rows.count)
    scale = 1.0 / rows.count if reduction == "mean" and rows.count else 1.0
    logits = Logits(head, rows.count)
    for block in spans(rows.count, block_rows(x.shape[1])):
        for part in spans(block.stop - block.start, LOGIT_ROWS):
            at = slice(block.start + part.start, block.start + part.stop)
            _C.cross_entropy_rows(
                losses[at], lse[at], None if made is None else made.d[part],
                logits.of(rows.take(rows.x, at)), rows.take(target, at).contiguous(),
                softcap, smoothing, z_loss, scale,
            )  # fmt: skip
        if made is not None:
            made.add(block)
    found = made.finish() if made is not None else head.empty_gradients(x, bits & WEIGHT_FP32, 0)
    if reduction == "none":
        return rows.spread(losses), rows.spread(lse), *found
    return reduce_losses(losses, reduction, rows.count), rows.spread(lse), *found


@_linear_logprob.impl("native", "cpu", variants=VARIANTS, when=_native_layout)
def _logprob_cpu(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, head = head_of(args)
    target, ignore_index, temperature, softcap, _ = args[7:]
    rows = Rows(x, target, ignore_index)
    logprob, entropy, lse = (torch.empty(rows.count) for _ in range(3))
    logits = Logits(head, rows.count)
    for part in spans(rows.count, LOGIT_ROWS):
        _C.log_prob_rows(
            logprob[part], lse[part], entropy[part], logits.of(rows.take(rows.x, part)),
            rows.take(target, part).contiguous(), temperature, softcap,
        )  # fmt: skip
    return rows.spread(logprob), rows.spread(entropy), rows.spread(lse)


@linear_logits_backward.impl("native", "cpu", variants=VARIANTS, when=_native_layout)
def _logits_backward_cpu(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, head = head_of(args)
    target, lse, coefficients, ignore_index, temperature, softcap, bits = args[7:]
    rows = Rows(x, target, ignore_index)
    made, logits = Gradients(head, rows, bits), Logits(head, rows.count)
    for block in spans(rows.count, block_rows(x.shape[1])):
        for part in spans(block.stop - block.start, LOGIT_ROWS):
            at = slice(block.start + part.start, block.start + part.stop)
            _C.target_gradient_rows(
                made.d[part], logits.of(rows.take(rows.x, at)), rows.take(target, at).contiguous(),
                rows.take(lse, at).contiguous(), rows.take(coefficients, at).contiguous(),
                temperature, softcap,
            )  # fmt: skip
        made.add(block)
    return made.finish()


class _Teacher:
    """Calls the kernel of a divergence for rows of logits: dense teacher, or its k best ids."""

    def __init__(self, args: tuple[Any, ...], most: int, top: bool) -> None:
        if top:
            self.ids, self.logprobs = (t.contiguous() for t in args[7:9])
            temperature, softcap, kind, beta = args[9:13]
            self.options: tuple[Any, ...] = temperature, softcap, KINDS.index(kind), beta
        else:
            x, head = head_of(args[7:])
            self.x = x if x.stride(1) == 1 else x.contiguous()
            self.logits = Logits(head, most)
            teacher_softcap, temperature, softcap, kind, beta = args[14:19]
            self.options = temperature, softcap, teacher_softcap, KINDS.index(kind), beta
        self.top = top

    def rows(self, at: slice, out: Any, lse: Any, d: Any, grad: Any, logits: Tensor) -> None:
        """Divergences `out` and log-sum-exps `lse` of the rows `at`, or gradients d of logits."""
        if self.top:
            ids, logprobs = self.ids[at], self.logprobs[at]
            _C.kl_top_rows(out, lse, d, grad, logits, ids, logprobs, *self.options)
        else:
            _C.kl_rows(out, lse, d, grad, logits, self.logits.of(self.x[at]), *self.options)


def _divergences(args: tuple[Any, ...], top: bool) -> tuple[Tensor, Tensor]:
    x, head = head_of(args)
    rows = Rows(x, None, 0)
    out, lse = torch.empty(rows.count), torch.empty(rows.count)
    logits, teacher = Logits(head, rows.count), _Teacher(args, rows.count, top)
    for at in spans(rows.count, LOGIT_ROWS):
        teacher.rows(at, out[at], lse[at], None, None, logits.of(rows.x[at]))
    return out, lse


def _divergence_gradients(args: tuple[Any, ...], top: bool) -> tuple[Tensor, Tensor, Tensor]:
    x, head = head_of(args)
    *_, grad, bits = args
    rows = Rows(x, None, 0)
    made = Gradients(head, rows, bits)
    logits, teacher = Logits(head, rows.count), _Teacher(args, rows.count, top)
    for block in spans(rows.count, block_rows(x.shape[1])):
        for part in spans(block.stop - block.start, LOGIT_ROWS):
            at = slice(block.start + part.start, block.start + part.stop)
            teacher.rows(at, None, None, made.d[part], grad[at], logits.of(rows.x[at]))
        made.add(block)
    return made.finish()


def _teacher_layout(*args: Any) -> bool:
    teacher_x, teacher_weight, _, teacher_format, *_ = args[7:]
    return _native_layout(*args) and _native_layout(teacher_x, teacher_weight, None, teacher_format)


@_linear_kl.impl("native", "cpu", variants=VARIANTS, when=_teacher_layout)
def _kl_cpu(*args: Any) -> tuple[Tensor, Tensor]:
    return _divergences(args, top=False)


@linear_kl_backward.impl("native", "cpu", variants=VARIANTS, when=_teacher_layout)
def _kl_backward_cpu(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _divergence_gradients(args, top=False)


@_linear_kl_top.impl("native", "cpu", variants=VARIANTS, when=_native_layout)
def _kl_top_cpu(*args: Any) -> tuple[Tensor, Tensor]:
    return _divergences(args, top=True)


@linear_kl_top_backward.impl("native", "cpu", variants=VARIANTS, when=_native_layout)
def _kl_top_backward_cpu(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _divergence_gradients(args, top=True)
