"""How the LM-head losses walk: blocks of rows through a backend's kernels, in a fixed workspace.

A block of up to `BLOCK_ROWS` rows goes through the three products of a step of training:

    logits   = x W'       fp32, some rows at a time, and at once through the row kernel that makes
                          the losses and the gradient d of the logits (dtype of x)
    dx       = d W        complete for the rows of the block
    dweight += d' x       fp32 sums over blocks; one block alone is rounded where it is written

The workspace is the logits of a few rows and d of one block. Blocks are large because each of them
reads and writes all of dweight. Until dweight is written, which is at the end of the only block, or
after all of them where fp32 sums stand in for it, its memory holds the logits and the fp32 dx.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .linear import contiguous_rows
from .linear_cross_entropy import _linear_cross_entropy
from .linear_kl import (
    _linear_kl,
    _linear_kl_top,
    linear_kl_backward,
    linear_kl_top_backward,
)
from .linear_logprob import _linear_logprob
from .lm_head import (
    BIAS,
    INPUT,
    VARIANTS,
    WEIGHT,
    WEIGHT_FP32,
    Head,
    head_of,
    linear_logits_backward,
)
from .lm_head_backend import Backend, CrossEntropy, Scaling
from .pages import large_empty, release_rows

# Rows of a block: d of 49,152 ids is 100 MB. Every further block adds the reading and writing of
# dweight's fp32 sums (15 ms of 250 for SmolLM2's head and 512 rows, Zen 5).
BLOCK_ROWS = 1024
# From this size on d is let go of while dweight is made: 660 MB become 595 for 512 rows of 2,048
# and 128,256 ids, in the same time (Zen 5).
_HALVED_BYTES = 64 << 20


def spans(count: int, most: int, start: int = 0) -> Iterator[slice]:
    """Equal parts of rows `start` to `start + count`, even in number but for the last one."""
    if not count:
        return
    parts = -(-count // most)
    size = -(-count // parts)
    size += size % 2
    for begin in range(0, count, size):
        yield slice(start + begin, start + min(begin + size, count))


def _padded_stride(columns: int) -> int:
    # An odd number of cache lines: rows a multiple of 4 KB apart would share sets of the caches.
    return -(-columns // 64) * 64 + 32


class Logits:
    """A head's logits, a few rows at a time, in one workspace.

    Args:
        backend: what makes them.
        head: whose logits.
        x: the rows that they may be of.
        free: a tensor whose memory is not in use: if it is large enough, it is the workspace.
    """

    def __init__(self, backend: Backend, head: Head, x: Tensor, free: Tensor | None = None) -> None:
        self.backend, self.head, self.x = backend, head, contiguous_rows(x)
        self.most = backend.logit_rows(head.n)
        self.memory: Tensor | None = None
        if backend.keeps_memory:
            shape = min(x.shape[0], self.most), head.n
            self.memory = _float_view(free, shape)
            if self.memory is None:
                self.memory = large_empty(shape, torch.float32, x.device)

    def of(self, x: Tensor) -> Tensor:
        """float32 `[R, V]` of rows x `[R, H]`; overwritten by the next call."""
        return self.backend.logits(self.head, x, self.memory)


def _float_view(free: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """float32 of a shape in a contiguous tensor's memory, if it fits."""
    nbytes = 4 * math.prod(shape)
    if free is None or free.nbytes < nbytes:
        return None
    return free.view(-1).view(torch.uint8)[:nbytes].view(torch.float32).view(shape)


class Rows:
    """The rows of x that count; their results go to the places they came from."""

    def __init__(self, x: Tensor, target: Tensor | None, ignore_index: int, gather: bool) -> None:
        self.x = contiguous_rows(x)
        self.tokens = self.count = x.shape[0]
        self.index: Tensor | None = None
        self.ignored: Tensor | None = None
        if target is not None and gather:
            index = (target != ignore_index).nonzero()[:, 0]
            self.count = index.shape[0]
            if self.count < self.tokens:
                self.index = index
        elif target is not None:
            self.ignored = target == ignore_index

    def take(self, tensor: Tensor, part: slice) -> Tensor:
        """The rows `part` of those that count, of a tensor with one row a token; contiguous."""
        found = tensor[part] if self.index is None else tensor[self.index[part]]
        return found if tensor is self.x else found.contiguous()

    def spread(self, found: Tensor) -> Tensor:
        """Results of the rows that count, zeros elsewhere."""
        if self.ignored is not None:
            return found.masked_fill_(self.ignored, 0.0)
        if self.index is None:
            return found
        return found.new_zeros(self.tokens).index_copy_(0, self.index, found)

    def mean_scale(self) -> float | Tensor:
        """1 / the number of rows that count (0 if there are none), read on its device."""
        if self.ignored is None:
            return 1.0 / self.count if self.count else 0.0
        count = (~self.ignored).sum()
        return torch.where(count > 0, 1.0 / count, 0.0).float()

    def new(self) -> Tensor:
        """float32, one element a row that counts."""
        return self.x.new_empty(self.count, dtype=torch.float32)


class Gradients:
    """Gradients of x, weight and bias, summed up over blocks of rows."""

    def __init__(self, backend: Backend, head: Head, rows: Rows, bits: int) -> None:
        self.backend, self.head, self.rows, self.bits, x = backend, head, rows, bits, rows.x
        self.dx, self.dweight, self.dbias = head.empty_gradients(x, bits, rows.tokens)
        d = large_empty((min(rows.count, BLOCK_ROWS), _padded_stride(head.n)), x.dtype, x.device)
        self.d = d[:, : head.n]
        self.dweight = large_empty(self.dweight.shape, self.dweight.dtype, x.device)
        self.sums = self.dweight
        if bits & WEIGHT and self.dweight.dtype != torch.float32 and rows.count > BLOCK_ROWS:
            self.sums = large_empty(self.dweight.shape, torch.float32, x.device)
        written_last = self.sums is not self.dweight or rows.count <= BLOCK_ROWS
        self.free = self.dweight if written_last else None
        if bits & INPUT and (rows.index is not None or not rows.count):
            self.dx.zero_()
        self.bias_sums = self.dbias.new_zeros(self.dbias.shape, dtype=torch.float32)

    def add(self, part: slice) -> None:
        """Take in `self.d`, the gradient of the logits of the rows `part`."""
        x, d = self.rows.take(self.rows.x, part), self.d[: part.stop - part.start]
        if self.bits & INPUT:
            dx = _float_view(self.free, x.shape)  # the logits there have been used
            if dx is None:
                dx = x.new_empty(x.shape, dtype=torch.float32)
            self.backend.input_gradient(d, self.head, dx)
            if self.rows.index is None:
                self.dx[part] = dx
            else:
                self.dx.index_copy_(0, self.rows.index[part], dx.to(self.dx.dtype))
        if self.bits & BIAS:
            self.backend.bias_gradient(self.bias_sums, d)
        if self.bits & WEIGHT:
            self._add_weight(part, d, x)

    def _add_weight(self, part: slice, d: Tensor, x: Tensor) -> None:
        size = d.shape[0] * self.d.stride(0) * d.element_size()
        if part.stop - part.start < self.rows.count or size < _HALVED_BYTES:
            self.backend.weight_gradient(self.sums, d, x, part.start > 0)
            return
        # The only block: half of d is let go of before the second half of dweight is touched.
        half = d.shape[1] // 2
        for ids in (slice(half), slice(half, d.shape[1])):
            self.backend.weight_gradient(self.sums[ids], d[:, ids], x, False)
            release_rows(d[:, ids])

    def walk(self, logits: Logits, one: Callable[[slice, Tensor, Tensor], None]) -> None:
        """All blocks: one(rows, their d to fill, their logits) for every chunk, then `add`."""
        for block in spans(self.rows.count, BLOCK_ROWS):
            for part in spans(block.stop - block.start, logits.most, block.start):
                d = self.d[part.start - block.start : part.stop - block.start]
                one(part, d, logits.of(self.rows.take(self.rows.x, part)))
            self.add(block)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """(dx, dweight, dbias), empty where they were not asked for."""
        if self.bits & WEIGHT and not self.rows.count:
            self.dweight.zero_()
        elif self.sums is not self.dweight:
            self.dweight.copy_(self.sums)
        if self.bits & BIAS:
            self.dbias.copy_(self.bias_sums)
        return self.dx, self.dweight, self.dbias


def _cross_entropy(backend: Backend, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, head = head_of(args)
    target, ignore_index, reduction, softcap, smoothing, z_loss, bits = args[7:]
    rows = Rows(x, target, ignore_index, backend.gathers)
    mean = rows.mean_scale() if reduction == "mean" else 1.0
    options = CrossEntropy(softcap, smoothing, z_loss, mean)
    losses, lse = rows.new(), rows.new()

    def one(part: slice, d: Tensor | None, of: Tensor) -> None:
        backend.cross_entropy(losses[part], lse[part], d, of, rows.take(target, part), options)

    if bits & ~WEIGHT_FP32 and reduction != "none":
        made = Gradients(backend, head, rows, bits)
        made.walk(Logits(backend, head, x, made.free), one)
        found = made.finish()
    else:
        logits = Logits(backend, head, x)
        for part in spans(rows.count, logits.most):
            one(part, None, logits.of(rows.take(rows.x, part)))
        found = head.empty_gradients(x, bits & WEIGHT_FP32, 0)
    losses, lse = rows.spread(losses), rows.spread(lse)
    if reduction == "none":
        return losses, lse, *found
    total = losses.double().sum()
    if reduction == "mean":
        total = total / (rows.count if rows.ignored is None else (~rows.ignored).sum())
    return total.float(), lse, *found


def _logprob(backend: Backend, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, head = head_of(args)
    target, ignore_index, temperature, softcap, _ = args[7:]
    rows = Rows(x, target, ignore_index, backend.gathers)
    logprob, entropy, lse = (rows.new() for _ in range(3))
    scaling, logits = Scaling(softcap, temperature), Logits(backend, head, x)
    for part in spans(rows.count, logits.most):
        backend.log_probs(
            logprob[part], lse[part], entropy[part], logits.of(rows.take(rows.x, part)),
            rows.take(target, part), scaling,
        )  # fmt: skip
    return rows.spread(logprob), rows.spread(entropy), rows.spread(lse)


def _logits_backward(backend: Backend, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, head = head_of(args)
    target, lse, coefficients, ignore_index, temperature, softcap, bits = args[7:]
    rows = Rows(x, target, ignore_index, backend.gathers)
    made, scaling = Gradients(backend, head, rows, bits), Scaling(softcap, temperature)

    def one(part: slice, d: Tensor, of: Tensor) -> None:
        targets, sums = rows.take(target, part), rows.take(lse, part)
        backend.target_gradient(d, of, targets, sums, rows.take(coefficients, part), scaling)

    made.walk(Logits(backend, head, x, made.free), one)
    return made.finish()


def _dense_teacher(backend: Backend, args: tuple[Any, ...]) -> Callable[..., None]:
    """divergence(rows, out, lse, d, grad, logits) from a teacher's head."""
    x, head = head_of(args[7:])
    teacher_softcap, temperature, softcap, kind, beta = args[14:19]
    scaling, logits = Scaling(softcap, temperature, kind, beta), Logits(backend, head, x)

    def divergence(
        part: slice, out: Tensor | None, lse: Tensor | None, d: Tensor | None,
        grad: Tensor | None, of: Tensor,
    ) -> None:  # fmt: skip
        teacher = logits.of(logits.x[part])
        backend.divergence(out, lse, d, grad, of, teacher, teacher_softcap, scaling)

    return divergence


def _top_teacher(backend: Backend, args: tuple[Any, ...]) -> Callable[..., None]:
    """The same from ids and log-probabilities."""
    ids, logprobs = (t.contiguous() for t in args[7:9])
    temperature, softcap, kind, beta = args[9:13]
    scaling = Scaling(softcap, temperature, kind, beta)

    def divergence(
        part: slice, out: Tensor | None, lse: Tensor | None, d: Tensor | None,
        grad: Tensor | None, of: Tensor,
    ) -> None:  # fmt: skip
        backend.top_divergence(out, lse, d, grad, of, ids[part], logprobs[part], scaling)

    return divergence


_Teacher = Callable[[Backend, tuple[Any, ...]], Callable[..., None]]


def _divergences(teacher: _Teacher, backend: Backend, *args: Any) -> tuple[Tensor, Tensor]:
    x, head = head_of(args)
    rows, logits = Rows(x, None, 0, gather=False), Logits(backend, head, x)
    out, lse, divergence = rows.new(), rows.new(), teacher(backend, args)
    for part in spans(rows.count, logits.most):
        divergence(part, out[part], lse[part], None, None, logits.of(rows.x[part]))
    return out, lse


def _divergence_gradients(
    teacher: _Teacher, backend: Backend, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    x, head = head_of(args)
    *_, grad, bits = args
    rows = Rows(x, None, 0, gather=False)
    made, divergence = Gradients(backend, head, rows, bits), teacher(backend, args)

    def one(part: slice, d: Tensor, of: Tensor) -> None:
        divergence(part, None, None, d, grad[part], of)

    made.walk(Logits(backend, head, x, made.free), one)
    return made.finish()


def add_rows(name: str, device: str, backend: Backend, fits: Callable[..., bool]) -> None:
    """Add a row served by `backend` to the table of every op of the family.

    fits: (x, weight, scales, format) -> whether the backend reads a head as it lies.
    """

    def both_fit(*args: Any) -> bool:
        return fits(*args[:4]) and fits(*args[7:11])

    def head_fits(*args: Any) -> bool:
        return fits(*args[:4])

    for op, walk, when in (
        (_linear_cross_entropy, _cross_entropy, head_fits),
        (_linear_logprob, _logprob, head_fits),
        (linear_logits_backward, _logits_backward, head_fits),
        (_linear_kl, partial(_divergences, _dense_teacher), both_fit),
        (linear_kl_backward, partial(_divergence_gradients, _dense_teacher), both_fit),
        (_linear_kl_top, partial(_divergences, _top_teacher), head_fits),
        (linear_kl_top_backward, partial(_divergence_gradients, _top_teacher), head_fits),
    ):
        op.impl(name, device, variants=VARIANTS, when=when)(partial(walk, backend))
