"""Rows of logits [R, V] for the LM-head losses: statistics, divergences, gradients of the logits.

Log-sum-exp runs over the 512-column tiles of `log_probs`, so that a loss sees the log-probabilities
of generation. The logits of a chunk of rows lie in a workspace and are overwritten by z, the capped
logits times 1 / temperature; the gradient of a chunk is written once, in the dtype of the hidden
states, for the two products that follow.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .log_probs import VOCAB_TILE, log_probs_tile_kernel, merge_statistics
from .triton_compat import cast, tanh

LEAST_LOG_REST = -16.635532  # log 2^-24: fp32 cannot tell a smaller rest of the teacher from none
KINDS = ("forward", "reverse", "js")


@triton.jit
def scale_logits_kernel(
    logits_ptr, stride, V, softcap, inverse_temperature, CAPPED: tl.constexpr, BLOCK: tl.constexpr
):
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = logits_ptr + tl.program_id(0).to(tl.int64) * stride + ids
    z = tl.load(at, mask=ids < V, other=0.0)
    if CAPPED:
        z = softcap * tanh(z / softcap)
    tl.store(at, z * inverse_temperature, mask=ids < V)


@triton.jit
def row_lse_kernel(lse_ptr, stats_ptr, n_tiles, BLOCK_TILES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    stats = stats_ptr + row * 2 * n_tiles
    lse, _ = merge_statistics(stats, stats + n_tiles, n_tiles, BLOCK_TILES)
    tl.store(lse_ptr + row, lse)


@triton.jit
def loss_rows_kernel(
    logprob_ptr,
    entropy_ptr,
    mean_ptr,
    lse_ptr,
    logits_ptr,
    targets_ptr,
    stride,
    V,
    WALK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_row = logits_ptr + row * stride
    lse = tl.load(lse_ptr + row)
    target = tl.load(targets_ptr + row).to(tl.int64)
    inside = (target >= 0) & (target < V)
    picked = tl.load(z_row + target, mask=inside, other=float("nan"))
    tl.store(logprob_ptr + row, picked - lse)
    if WALK:
        entropy = tl.zeros((BLOCK,), dtype=tl.float32)
        mass = tl.zeros((BLOCK,), dtype=tl.float32)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for begin in range(0, V, BLOCK):
            ids = begin + tl.arange(0, BLOCK)
            z = tl.load(z_row + ids, mask=ids < V, other=float("-inf"))
            logp = z - lse
            p = tl.exp(logp)
            entropy -= tl.where(p == 0.0, 0.0, p * logp)
            mass += p
            total += tl.where(ids < V, z, 0.0)
        # lse is rounded, so that p sums up to 1 + 1e-7 or so: dividing by the sum undoes it.
        one = tl.sum(mass, axis=0)
        tl.store(entropy_ptr + row, tl.sum(entropy, axis=0) / one + tl.log(one))
        tl.store(mean_ptr + row, tl.sum(total, axis=0) / V)


@triton.jit
def slope(z, softcap, inverse_temperature, CAPPED: tl.constexpr):
    """d z / d logit."""
    if CAPPED:
        t = z / (softcap * inverse_temperature)
        return inverse_temperature * (1.0 - t * t)
    else:
        return inverse_temperature + tl.zeros_like(z)


@triton.jit
def target_gradient_kernel(
    d_ptr,
    logits_ptr,
    targets_ptr,
    lse_ptr,
    coefficients_ptr,
    stride,
    stride_d,
    V,
    softcap,
    inverse_temperature,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """d = (a p + b [v = target] + c + e p log p) dz/dl; 0 if the target is outside [0, V)."""
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(logits_ptr + row * stride + ids, mask=ids < V, other=0.0)
    target = tl.load(targets_ptr + row).to(tl.int64)
    a = tl.load(coefficients_ptr + 4 * row)
    b = tl.load(coefficients_ptr + 4 * row + 1)
    c = tl.load(coefficients_ptr + 4 * row + 2)
    e = tl.load(coefficients_ptr + 4 * row + 3)
    logp = z - tl.load(lse_ptr + row)
    p = tl.exp(logp)
    dz = a * p + c + e * tl.where(p == 0.0, 0.0, p * logp) + tl.where(ids == target, b, 0.0)
    d = dz * slope(z, softcap, inverse_temperature, CAPPED)
    d = tl.where((target >= 0) & (target < V), d, 0.0)
    tl.store(d_ptr + row * stride_d + ids, cast(d, d_ptr.dtype.element_ty), mask=ids < V)


@triton.jit
def log_mixture(p, q, beta):
    return tl.log(beta * q + (1.0 - beta) * p)


@triton.jit
def weighted(p, x):
    """p * x with 0 * infinity = 0."""
    return tl.where(p == 0.0, 0.0, p * x)


@triton.jit
def kl_rows_kernel(
    out_ptr,
    student_ptr,
    logits_ptr,
    lse_ptr,
    teacher_ptr,
    teacher_lse_ptr,
    stride,
    stride_t,
    V,
    beta,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The divergence, and its student's sum: KL(p || q), or KL(p || m).

    A log-sum-exp is rounded, so that p sums up to 1 + 1e-7 or so; a KL of 5 would err by 6 times
    that (3.5 times what torch errs by). Its sums undo it.
    """
    row = tl.program_id(0).to(tl.int64)
    lse, teacher_lse = tl.load(lse_ptr + row), tl.load(teacher_lse_ptr + row)
    teacher = tl.zeros((BLOCK,), dtype=tl.float32)
    student = tl.zeros((BLOCK,), dtype=tl.float32)
    mass_p = tl.zeros((BLOCK,), dtype=tl.float32)
    mass_q = tl.zeros((BLOCK,), dtype=tl.float32)
    for begin in range(0, V, BLOCK):
        ids = begin + tl.arange(0, BLOCK)
        z = tl.load(logits_ptr + row * stride + ids, mask=ids < V, other=float("-inf"))
        t = tl.load(teacher_ptr + row * stride_t + ids, mask=ids < V, other=float("-inf"))
        logp, logq = z - lse, t - teacher_lse
        p, q = tl.exp(logp), tl.exp(logq)
        if KIND == 0:
            teacher += weighted(q, logq - logp)
        elif KIND == 1:
            student += weighted(p, logp - logq)
        else:
            logm = log_mixture(p, q, beta)
            teacher += weighted(q, logq - logm)
            student += weighted(p, logp - logm)
        mass_p += p
        mass_q += q
    one_p, one_q = tl.sum(mass_p, axis=0), tl.sum(mass_q, axis=0)
    of_student = tl.sum(student, axis=0) / one_p
    value = tl.sum(teacher, axis=0) / one_q
    if KIND == 0:
        value += tl.log(one_p) - tl.log(one_q)
    elif KIND == 1:
        value = of_student + (tl.log(one_q) - tl.log(one_p))
    else:
        value = beta * value + (1.0 - beta) * of_student
    tl.store(out_ptr + row, value)
    tl.store(student_ptr + row, of_student)


@triton.jit
def kl_gradient_kernel(
    d_ptr,
    grad_ptr,
    student_ptr,
    logits_ptr,
    lse_ptr,
    teacher_ptr,
    teacher_lse_ptr,
    stride,
    stride_t,
    stride_d,
    V,
    beta,
    softcap,
    inverse_temperature,
    KIND: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(logits_ptr + row * stride + ids, mask=ids < V, other=0.0)
    t = tl.load(teacher_ptr + row * stride_t + ids, mask=ids < V, other=0.0)
    logp, logq = z - tl.load(lse_ptr + row), t - tl.load(teacher_lse_ptr + row)
    p, q = tl.exp(logp), tl.exp(logq)
    if KIND == 0:
        dz = p - q
    elif KIND == 1:
        dz = weighted(p, logp - logq - tl.load(student_ptr + row))
    else:
        logm = log_mixture(p, q, beta)
        dz = (1.0 - beta) * weighted(p, logp - logm - tl.load(student_ptr + row))
    d = tl.load(grad_ptr + row) * dz * slope(z, softcap, inverse_temperature, CAPPED)
    tl.store(d_ptr + row * stride_d + ids, cast(d, d_ptr.dtype.element_ty), mask=ids < V)


def scale_logits(logits: Tensor, softcap: float, temperature: float) -> None:
    """logits [R, V] become z in place."""
    if softcap == 0.0 and temperature == 1.0:
        return
    n_rows, vocab = logits.shape
    block = tuning.ELEMENTWISE_BLOCK
    scale_logits_kernel[(n_rows, triton.cdiv(vocab, block))](
        logits, logits.stride(0), vocab, softcap, 1.0 / temperature,
        CAPPED=softcap != 0.0, BLOCK=block, num_warps=4,
    )  # fmt: skip


def row_lse(logits: Tensor) -> Tensor:
    """Log-sum-exp f32[R] of z, the one that `log_probs` subtracts."""
    n_rows, vocab = logits.shape
    n_tiles = triton.cdiv(vocab, VOCAB_TILE)
    stats = torch.empty((n_rows, 2, n_tiles), dtype=torch.float32, device=logits.device)
    lse = torch.empty(n_rows, dtype=torch.float32, device=logits.device)
    log_probs_tile_kernel[(n_rows, n_tiles)](
        stats, logits, logits.stride(0), vocab, n_tiles, TILE=VOCAB_TILE, num_warps=4
    )
    row_lse_kernel[(n_rows,)](
        lse, stats, n_tiles, BLOCK_TILES=triton.next_power_of_2(n_tiles), num_warps=4
    )
    return lse


def loss_rows(
    logits: Tensor, targets: Tensor, softcap: float, temperature: float, walk: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """f32[R] each: log-probability of the target, log-sum-exp, entropy, mean of z.

    logits become z. The last two are made only with `walk`. A target outside gives NaN.
    """
    scale_logits(logits, softcap, temperature)
    lse = row_lse(logits)
    logprob, entropy, mean = (torch.empty_like(lse) for _ in range(3))
    loss_rows_kernel[(logits.shape[0],)](
        logprob, entropy, mean, lse, logits, targets, logits.stride(0), logits.shape[1],
        WALK=walk, BLOCK=tuning.CUTOFF_BLOCK, num_warps=tuning.CUTOFF_WARPS,
    )  # fmt: skip
    return logprob, lse, entropy, mean


def target_gradient_rows(
    d: Tensor, z: Tensor, targets: Tensor, lse: Tensor, coefficients: Tensor, softcap: float,
    temperature: float,
) -> None:  # fmt: skip
    """d[R, V] (bf16 or f32) from z[R, V] and coefficients f32[R, 4]; rows without target: 0."""
    n_rows, vocab = z.shape
    block = tuning.ELEMENTWISE_BLOCK
    target_gradient_kernel[(n_rows, triton.cdiv(vocab, block))](
        d, z, targets, lse, coefficients, z.stride(0), d.stride(0), vocab, softcap,
        1.0 / temperature, CAPPED=softcap != 0.0, BLOCK=block, num_warps=4,
    )  # fmt: skip


def kl_rows(
    z: Tensor, lse: Tensor, teacher: Tensor, teacher_lse: Tensor, kind: str, beta: float
) -> tuple[Tensor, Tensor]:
    """(divergence, the student's sum of it), f32[R], of scaled logits z and teacher [R, V]."""
    out, student = torch.empty_like(lse), torch.empty_like(lse)
    kl_rows_kernel[(z.shape[0],)](
        out, student, z, lse, teacher, teacher_lse, z.stride(0), teacher.stride(0), z.shape[1],
        beta, KIND=KINDS.index(kind), BLOCK=tuning.CUTOFF_BLOCK // 2,
        num_warps=tuning.CUTOFF_WARPS,
    )  # fmt: skip
    return out, student


def kl_gradient_rows(
    d: Tensor, grad: Tensor, student: Tensor, z: Tensor, lse: Tensor, teacher: Tensor,
    teacher_lse: Tensor, kind: str, beta: float, softcap: float, temperature: float,
) -> None:  # fmt: skip
    """d[R, V] = grad[R] times the gradient of the divergence, in the logits that z came from."""
    n_rows, vocab = z.shape
    block = tuning.ELEMENTWISE_BLOCK
    kl_gradient_kernel[(n_rows, triton.cdiv(vocab, block))](
        d, grad, student, z, lse, teacher, teacher_lse, z.stride(0), teacher.stride(0),
        d.stride(0), vocab, beta, softcap, 1.0 / temperature, KIND=KINDS.index(kind),
        CAPPED=softcap != 0.0, BLOCK=block, num_warps=4,
    )  # fmt: skip


def _divergence(logp: Tensor, logq: Tensor, kind: str, beta: float) -> tuple[Tensor, Tensor]:
    """(divergence [R], its gradient in z [R, K]) of a few outcomes."""
    logp = logp - logp.logsumexp(1, keepdim=True)  # rounded, they do not quite sum up to 1
    p, q = logp.exp(), logq.exp()

    def expected(w: Tensor, x: Tensor) -> Tensor:
        return torch.where(w == 0.0, 0.0, w * x)

    if kind == "forward":
        return expected(q, logq - logp).sum(1), p * q.sum(1, keepdim=True) - q
    if kind == "reverse":
        value = expected(p, logp - logq).sum(1)
        return value, expected(p, logp - logq - value[:, None])
    logm = torch.log(beta * q + (1.0 - beta) * p)
    student = expected(p, logp - logm).sum(1)
    value = beta * expected(q, logq - logm).sum(1) + (1.0 - beta) * student
    return value, (1.0 - beta) * expected(p, logp - logm - student[:, None])


def kl_top_rows(
    d: Tensor | None, grad: Tensor | None, logits: Tensor, ids: Tensor, logprobs: Tensor,
    softcap: float, temperature: float, kind: str, beta: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(divergence, log-sum-exp) f32[R] from a teacher's ids and log-probabilities [R, k].

    All other ids are one outcome. logits become z; with d, the gradient of the logits is written.
    """
    scale_logits(logits, softcap, temperature)
    lse, wide = row_lse(logits), ids.long()
    known = logits.gather(1, wide)
    logits.scatter_(1, wide, float("-inf"))
    log_rest = row_lse(logits)
    logits.scatter_(1, wide, known)
    logp, logq = known - lse[:, None], logprobs
    others = ids.shape[1] < logits.shape[1]
    if others:
        left = torch.log1p(-logprobs.exp().sum(1, keepdim=True).clamp(max=1.0))
        logp = torch.cat((logp, (log_rest - lse)[:, None]), 1)
        logq = torch.cat((logprobs, left.clamp(min=LEAST_LOG_REST)), 1)
    value, dz = _divergence(logp, logq, kind, beta)
    if d is not None:
        assert grad is not None
        dz = dz * grad[:, None]
        coefficients = torch.zeros((ids.shape[0], 4), dtype=torch.float32, device=ids.device)
        if others:
            coefficients[:, 0] = dz[:, -1]  # shared among the other ids as p is
        first = torch.zeros_like(ids[:, 0])
        target_gradient_rows(d, logits, first, log_rest, coefficients, softcap, temperature)
        slopes = torch.full_like(known, 1.0 / temperature)
        if softcap:
            slopes *= 1.0 - (known * (temperature / softcap)).square()
        d.scatter_(1, wide, (dz[:, : ids.shape[1]] * slopes).to(d.dtype))
    return value, lse
