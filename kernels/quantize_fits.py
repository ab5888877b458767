"""The scales of groups of columns that make the weighted squared error of their values small.

Every lane owns a group (or a sub-block) and walks its columns in order, so that sums are those of
`fastllm.ops.quantize_search`, bit for bit: launches set `enable_fp_fusion=False`, and divisions
are correctly rounded. A group is read again for every fit, from the L1 cache.

`x` and `w` are pointers to the first column of each lane's group, in any shape of lanes; `starts`
is a table of STARTS numbers, those of the definition.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_compat import divide, round_even

# As in `fastllm.ops.quantize_search` and `quantize_rules`.
ONE_CODE: tl.constexpr = tl.constexpr(1e-5)
UNSEEN: tl.constexpr = tl.constexpr(2.0**-40)


@triton.jit
def inverse(x):
    """1 / x, and 0 where x is 0 or so small that the reciprocal overflows."""
    y = divide(tl.full(x.shape, 1.0, tl.float32), tl.where(x == 0, 1.0, x))
    return tl.where((x != 0) & (tl.abs(y) < float("inf")), y, 0.0)


@triton.jit
def ratio(a, b):
    """a / b where b is positive, else 0."""
    return tl.where(b > 0, divide(a, tl.where(b > 0, b, 1.0)), 0.0)


@triton.jit
def clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def half(x):
    """x rounded to fp16, as fp32."""
    return x.to(tl.float16).to(tl.float32)


@triton.jit
def value(x, c, mask):
    """Column c of every lane, -0 as 0."""
    return tl.load(x + c, mask=mask, other=0.0).to(tl.float32) + 0.0


@triton.jit
def weight(w, c, mask, WEIGHTED: tl.constexpr, some):
    """Its importance; UNSEEN where the lane has none (`some` false)."""
    if WEIGHTED:
        return tl.where(some, tl.load(w + c, mask=mask, other=0.0), UNSEEN)
    else:
        return 1.0


@triton.jit
def any_weight(w, mask, COLUMNS: tl.constexpr, WEIGHTED: tl.constexpr):
    """Whether a column of the group counts."""
    if WEIGHTED:
        total = tl.zeros(w.shape, tl.float32)
        for c in range(COLUMNS):
            total += tl.load(w + c, mask=mask, other=0.0)
        return total > UNSEEN
    else:
        return mask


@triton.jit
def extremes(x, mask, COLUMNS: tl.constexpr):
    """(smallest, largest) value."""
    low = value(x, 0, mask)
    high = low
    for c in range(1, COLUMNS):
        one = value(x, c, mask)
        low, high = tl.minimum(low, one), tl.maximum(high, one)
    return low, high


@triton.jit
def peak_of(x, mask, COLUMNS: tl.constexpr):
    """The value of largest magnitude; the negative one of two."""
    least, most = extremes(x, mask, COLUMNS)
    return tl.where(most > -least, most, least)


@triton.jit
def bounds(x, mask, FREE: tl.constexpr, COLUMNS: tl.constexpr):
    """The range of values d u + m: of the smallest, which is at most 0 unless FREE."""
    low, high = extremes(x, mask, COLUMNS)
    if not FREE:
        low = tl.minimum(low, 0.0)
    return low, high


@triton.jit
def signed_once(x, w, mask, some, factor, low, high, COLUMNS: tl.constexpr, WEIGHTED: tl.constexpr):
    """(gain, d, sum w v^2) of the codes v nearest to x factor."""
    a = tl.zeros(x.shape, tl.float32)
    b = tl.zeros(x.shape, tl.float32)
    for c in range(COLUMNS):
        one = value(x, c, mask)
        v = clamp(round_even(one * factor), low, high)
        wv = weight(w, c, mask, WEIGHTED, some) * v
        a += wv * one
        b += wv * v
    d = ratio(a, b)
    return a * d, d, b


@triton.jit
def fit_signed(
    x,
    w,
    mask,
    some,
    starts,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    STARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """(d, sum w v^2) of values d v, v from LOW to HIGH."""
    to_peak = inverse(peak_of(x, mask, COLUMNS))
    gain = tl.full(x.shape, -1.0, tl.float32)
    d = tl.zeros(x.shape, tl.float32)
    squares = tl.zeros(x.shape, tl.float32)
    last = tl.zeros(x.shape, tl.float32)
    for i in range(2 * STARTS):  # every start, and its refit
        factor = tl.where(i % 2 == 0, tl.load(starts + i // 2) * to_peak, inverse(last))
        g, last, b = signed_once(x, w, mask, some, factor, LOW, HIGH, COLUMNS, WEIGHTED)
        take = g > gain
        gain, d = tl.where(take, g, gain), tl.where(take, last, d)
        squares = tl.where(take, b, squares)
    return d, squares


@triton.jit
def fit_zero(
    x,
    w,
    mask,
    some,
    starts,
    LEVELS: tl.constexpr,
    STARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """(d, z) of values d (u - z), u and z from 0 to LEVELS."""
    low, high = extremes(x, mask, COLUMNS)
    low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
    to_span = inverse(high - low)
    gain = tl.full(x.shape, -1.0, tl.float32)
    d = tl.zeros(x.shape, tl.float32)
    zero = tl.zeros(x.shape, tl.float32)
    last = tl.zeros(x.shape, tl.float32)
    for i in range(6 * STARTS):  # three shifts, every start, and its refit
        third = i // (2 * STARTS)
        shift = tl.where(third == 0, 0.0, tl.where(third == 1, -1.0, 1.0))
        start = tl.load(starts + i // 2 % STARTS)
        factor = tl.where(i % 2 == 0, start * to_span, inverse(last))
        z = clamp(round_even(-low * factor) + shift, 0.0, LEVELS)
        g, last, _ = signed_once(x, w, mask, some, factor, -z, LEVELS - z, COLUMNS, WEIGHTED)
        take = g > gain
        gain, d = tl.where(take, g, gain), tl.where(take, last, d)
        zero = tl.where(take, z, zero)
    return d, zero


@triton.jit
def fit_affine(
    x,
    w,
    mask,
    some,
    starts,
    LEVELS: tl.constexpr,
    FREE: tl.constexpr,
    STARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """(d, m, sum w u^2, sum w) of values d u + m, u from 0 to LEVELS, d >= 0.

    m <= 0 unless FREE.
    """
    low, high = bounds(x, mask, FREE, COLUMNS)
    sw = tl.zeros(x.shape, tl.float32)
    sy = tl.zeros(x.shape, tl.float32)
    for c in range(COLUMNS):
        each = weight(w, c, mask, WEIGHTED, some)
        sw += each
        sy += each * (value(x, c, mask) - low)
    to_span = inverse(high - low)
    gain = tl.full(x.shape, -1.0, tl.float32)
    best = tl.zeros(x.shape, tl.float32)
    least = tl.zeros(x.shape, tl.float32)
    squares = tl.zeros(x.shape, tl.float32)
    d = tl.zeros(x.shape, tl.float32)
    m = tl.zeros(x.shape, tl.float32)
    for i in range(2 * STARTS):
        first = i % 2 == 0
        factor = tl.where(first, (tl.load(starts + i // 2) + LEVELS) * to_span, inverse(d))
        begin = tl.where(first, 0.0, m)
        su = tl.zeros(x.shape, tl.float32)
        suu = tl.zeros(x.shape, tl.float32)
        syu = tl.zeros(x.shape, tl.float32)
        for c in range(COLUMNS):
            y = value(x, c, mask) - low
            u = clamp(round_even((y - begin) * factor), 0.0, LEVELS)
            wu = weight(w, c, mask, WEIGHTED, some) * u
            su += wu
            suu += wu * u
            syu += wu * y
        det = sw * suu - su * su
        # Codes that (almost) all weight has in common determine one number: d, of their minimum.
        m = tl.where(det > (sw * suu) * ONE_CODE, ratio(suu * sy - su * syu, det), begin)
        m = tl.where(suu > 0, m, ratio(sy, sw))
        if not FREE:
            m = tl.minimum(m, -low)
        rest = syu - m * su
        d = tl.maximum(ratio(rest, suu), 0.0)
        found = m * (2.0 * sy - m * sw) + d * (2.0 * rest - d * suu)
        take = found > gain
        gain, best = tl.where(take, found, gain), tl.where(take, d, best)
        least, squares = tl.where(take, m, least), tl.where(take, suu, squares)
    return best, least + low, squares, sw


@triton.jit
def ordered_sum(x, SUBS: tl.constexpr):
    """[B, SUBS] -> [B]: the sum over the second dimension, in its order."""
    sub = tl.arange(0, SUBS)[None, :]
    total = tl.zeros((x.shape[0],), tl.float32)
    for i in range(SUBS):
        total += tl.sum(tl.where(sub == i, x, 0.0), axis=1)  # one of them is not 0
    return total


@triton.jit
def fit_step(values, weights, MOST: tl.constexpr, LEAST: tl.constexpr, SUBS: tl.constexpr):
    """The half [B] for which values [B, SUBS] are closest to integers -MOST - 1 .. MOST of it."""
    peak = tl.max(tl.abs(values), axis=1)
    best = tl.full(peak.shape, float("inf"), tl.float32)
    step = half(divide(peak, tl.full(peak.shape, MOST, tl.float32)))
    for i in range(MOST - LEAST + 1):
        integer = tl.zeros(peak.shape, tl.float32) + (MOST - i)
        tried = half(divide(peak, integer))
        q = clamp(round_even(values * inverse(tried)[:, None]), -MOST - 1.0, MOST)
        away = values - tried[:, None] * q
        error = ordered_sum(weights * away * away, SUBS)
        take = error < best
        best, step = tl.where(take, error, best), tl.where(take, tried, step)
    return step
