"""The online softmax of attention, in base 2, row by row (FlashAttention, arXiv 2205.14135).

State of a row: m, the largest base-2 logit so far (-inf before the first key), total, the sum of
2^(logit - m), and acc, the output at that maximum. Products that decide a bit are explicit fused
multiply-adds, so that two kernels that call these give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_compat import exp2, fma

LOG2_E = 1.4426950408889634
_LOG2_E = tl.constexpr(LOG2_E)
LN_2 = tl.constexpr(0.6931471805599453)
SPLIT_POSITIONS = 512


@triton.jit
def update(s, m, total, factor):
    """One tile of scores s[R, N]: (p[R, N], rescaling of acc[R], new m, new total).

    factor > 0 turns a score into a base-2 logit; hidden scores are -inf.
    """
    m_new = tl.maximum(m, tl.max(s, axis=1) * factor)
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    factors = tl.full(s.shape, factor, tl.float32)
    p = exp2(fma(s, factors, tl.broadcast_to(-shift[:, None], s.shape)))
    alpha = exp2(m - shift)
    return p, alpha, m_new, fma(total, alpha, tl.sum(p, axis=1))


@triton.jit
def merge_splits(m1, l1, o1, m2, l2, o2):
    """Adds a later split (m2, l2, o2) to the merged earlier ones (m1, l1, o1), row by row.

    m[R]: maximum of the base-2 logits; l[R], o[R, D]: sum and output at that maximum. A split
    without keys (m2 = -inf) changes nothing; the first split with keys is taken as it is.
    """
    m = tl.maximum(m1, m2)
    shift = tl.where(m == float("-inf"), 0.0, m)
    keep, add = exp2(m1 - shift), exp2(m2 - shift)
    l_sum = fma(l2, add, l1 * keep)
    return m, l_sum, fma(o2, tl.broadcast_to(add[:, None], o2.shape), o1 * keep[:, None])


@triton.jit
def finish(m, total, sink):
    """(factor of acc[R], natural log-sum-exp[R]) with one more logit, sink[R] (natural), or None.

    A row without keys has factor 0 (or finite) over acc = 0, and lse -inf or its sink.
    """
    keep = tl.full(m.shape, 1.0, tl.float32)
    if sink is not None:
        sink *= _LOG2_E
        top = tl.maximum(m, sink)
        shift = tl.where(top == float("-inf"), 0.0, top)
        keep = exp2(m - shift)
        total = fma(total, keep, exp2(sink - shift))
        m = top
    divisor = tl.where(total == 0, 1.0, total)
    return keep / divisor, (m + tl.math.log2(divisor)) * LN_2
