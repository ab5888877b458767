"""K-quants: sub-blocks hold integers, 256 columns share the halves that these multiply.

Lanes are [B, sub-blocks]: a super-block's scales are [B]. The steps are those of
`fastllm.ops.quantize_search`, bit for bit (see `quantize_fits`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .quantize_fits import (
    any_weight,
    bounds,
    clamp,
    fit_affine,
    fit_signed,
    fit_step,
    half,
    inverse,
    ordered_sum,
    peak_of,
    ratio,
    value,
    weight,
)
from .triton_compat import divide, round_even

ROUNDS: tl.constexpr = tl.constexpr(3)


@triton.jit
def sub_min_error(x, w, mask, some, step, low, LEVELS: tl.constexpr, WEIGHTED: tl.constexpr):
    """(sum w (value - x)^2, sum w (step u - x)) of values step u - low."""
    factor = inverse(step)
    error = tl.zeros(x.shape, tl.float32)
    drift = tl.zeros(x.shape, tl.float32)
    for c in range(32):
        one, each = value(x, c, mask), weight(w, c, mask, WEIGHTED, some)
        v = step * clamp(round_even((one + low) * factor), 0.0, LEVELS)
        away = (v - low) - one
        error += (each * away) * away
        drift += each * (v - one)
    return error, drift


@triton.jit
def near_integers(
    x, w, mask, some, d, dmin, sc, mn, sw, LEVELS: tl.constexpr, WEIGHTED: tl.constexpr
):
    """(error, sc, mn) of the best integers of every sub-block next to (sc, mn)."""
    best = tl.full(x.shape, float("inf"), tl.float32)
    best_sc, best_mn = sc, mn
    moved = mn
    for i in range(6):  # three shifts of sc, with mn and with the mn that then fits best
        shift = tl.where(i < 2, 0.0, tl.where(i < 4, -1.0, 1.0))
        near = clamp(sc + shift, 0.0, 63.0)
        tried = tl.where(i % 2 == 0, mn, moved)
        error, drift = sub_min_error(x, w, mask, some, d * near, dmin * tried, LEVELS, WEIGHTED)
        take = error < best
        best = tl.where(take, error, best)
        best_sc, best_mn = tl.where(take, near, best_sc), tl.where(take, tried, best_mn)
        moved = clamp(round_even(ratio(drift, sw) * inverse(dmin)), 0.0, 63.0)
    return best, best_sc, best_mn


@triton.jit
def refit(x, w, mask, some, d, dmin, sc, mn, sw, LEVELS: tl.constexpr, WEIGHTED: tl.constexpr):
    """The least-squares (d, dmin) [B, 1] of given integers, as halves."""
    low, factor = dmin * mn, inverse(d * sc)
    su = tl.zeros(x.shape, tl.float32)
    suu = tl.zeros(x.shape, tl.float32)
    sxu = tl.zeros(x.shape, tl.float32)
    sx = tl.zeros(x.shape, tl.float32)
    for c in range(32):
        one, each = value(x, c, mask), weight(w, c, mask, WEIGHTED, some)
        u = clamp(round_even((one + low) * factor), 0.0, LEVELS)
        wu = each * u
        su += wu
        suu += wu * u
        sxu += wu * one
        sx += each * one
    aa, ab = ordered_sum((sc * sc) * suu, 8)[:, None], ordered_sum((sc * mn) * su, 8)[:, None]
    bb = ordered_sum((mn * mn) * sw, 8)[:, None]
    xa, xb = ordered_sum(sc * sxu, 8)[:, None], ordered_sum(mn * sx, 8)[:, None]
    det = aa * bb - ab * ab
    both = det > 1e-6 * (aa * bb)
    alone = tl.where(aa > 0, ratio(xa + dmin * ab, aa), d)
    first = tl.where(both, ratio(xa * bb - xb * ab, det), alone)
    second = tl.where(both, ratio(xa * ab - xb * aa, det), dmin)
    return half(tl.maximum(first, 0.0)), half(tl.maximum(second, 0.0))


@triton.jit
def sub_integers(x, step):
    return clamp(round_even(x * inverse(step)), 0.0, 63.0)


@triton.jit
def plain_super_min(x, mask, LEVELS: tl.constexpr):
    """(d, dmin [B, 1], sc, mn [B, 8]) of the sub-blocks' ranges: no weights take part."""
    low, high = bounds(x, mask, False, 32)
    minus = tl.abs(low)
    s = divide(high - low, tl.full(low.shape, LEVELS, tl.float32))
    most, deepest = tl.max(s, axis=1)[:, None], tl.max(minus, axis=1)[:, None]
    integers = tl.full(most.shape, 63.0, tl.float32)
    d, dmin = half(divide(most, integers)), half(divide(deepest, integers))
    return d, dmin, sub_integers(s, d), sub_integers(minus, dmin)


@triton.jit
def fit_super_min(
    x, w, mask, starts, LEVELS: tl.constexpr, STARTS: tl.constexpr, WEIGHTED: tl.constexpr
):
    """(d, dmin [B, 1], sc, mn [B, 8]) of values (d sc) u - (dmin mn)."""
    some = any_weight(w, mask, 32, WEIGHTED)
    s, m, squares, sw = fit_affine(x, w, mask, some, starts, LEVELS, False, STARTS, 32, WEIGHTED)
    d, dmin = fit_step(s, squares, 63, 32, 8)[:, None], fit_step(-m, sw, 63, 32, 8)[:, None]
    sc, mn = sub_integers(s, d), sub_integers(-m, dmin)
    plain_d, plain_dmin, plain_sc, plain_mn = plain_super_min(x, mask, LEVELS)
    errors, _ = sub_min_error(
        x, w, mask, some, plain_d * plain_sc, plain_dmin * plain_mn, LEVELS, WEIGHTED
    )
    error = ordered_sum(errors, 8)[:, None]
    take = error < float("inf")
    least = tl.where(take, error, float("inf"))
    best_d, best_dmin = tl.where(take, plain_d, d), tl.where(take, plain_dmin, dmin)
    best_sc, best_mn = tl.where(take, plain_sc, sc), tl.where(take, plain_mn, mn)
    for i in range(ROUNDS):
        if i > 0:
            d, dmin = refit(x, w, mask, some, d, dmin, sc, mn, sw, LEVELS, WEIGHTED)
        errors, sc, mn = near_integers(x, w, mask, some, d, dmin, sc, mn, sw, LEVELS, WEIGHTED)
        error = ordered_sum(errors, 8)[:, None]
        take = error < least
        least = tl.where(take, error, least)
        best_d, best_dmin = tl.where(take, d, best_d), tl.where(take, dmin, best_dmin)
        best_sc, best_mn = tl.where(take, sc, best_sc), tl.where(take, mn, best_mn)
    return best_d, best_dmin, best_sc, best_mn


@triton.jit
def sub_error(x, w, mask, some, step, WEIGHTED: tl.constexpr):
    """sum w (value - x)^2 of values step v."""
    factor = inverse(step)
    error = tl.zeros(x.shape, tl.float32)
    for c in range(16):
        one = value(x, c, mask)
        away = step * clamp(round_even(one * factor), -32.0, 31.0) - one
        error += (weight(w, c, mask, WEIGHTED, some) * away) * away
    return error


@triton.jit
def plain_super(x, mask):
    """(d [B, 1], sc [B, 16]) of the sub-blocks' largest magnitudes, as `plain_super_min`."""
    s = divide(peak_of(x, mask, 16), tl.full(x.shape, -32.0, tl.float32))
    most = tl.max(tl.abs(s), axis=1)[:, None]
    d = half(divide(most, tl.full(most.shape, 127.0, tl.float32)))
    return d, clamp(round_even(s * inverse(d)), -128.0, 127.0)


@triton.jit
def fit_super(x, w, mask, starts, STARTS: tl.constexpr, WEIGHTED: tl.constexpr):
    """(d [B, 1], sc [B, 16]) of values (d sc) v, v from -32 to 31."""
    some = any_weight(w, mask, 16, WEIGHTED)
    s, squares = fit_signed(x, w, mask, some, starts, -32.0, 31.0, STARTS, 16, WEIGHTED)
    d = fit_step(s, squares, 127, 64, 16)[:, None]
    sc = clamp(round_even(s * inverse(d)), -128.0, 127.0)
    plain_d, plain_sc = plain_super(x, mask)
    errors = sub_error(x, w, mask, some, plain_d * plain_sc, WEIGHTED)
    error = ordered_sum(errors, 16)[:, None]
    take = error < float("inf")
    least = tl.where(take, error, float("inf"))
    best_d, best_sc = tl.where(take, plain_d, d), tl.where(take, plain_sc, sc)
    for i in range(ROUNDS):
        if i > 0:
            factor = inverse(d * sc)
            svv = tl.zeros(x.shape, tl.float32)
            sxv = tl.zeros(x.shape, tl.float32)
            for c in range(16):
                one = value(x, c, mask)
                v = clamp(round_even(one * factor), -32.0, 31.0)
                wv = weight(w, c, mask, WEIGHTED, some) * v
                svv += wv * v
                sxv += wv * one
            aa = ordered_sum((sc * sc) * svv, 16)[:, None]
            fitted = ratio(ordered_sum(sc * sxv, 16)[:, None], aa)
            d = half(tl.where(aa > 0, fitted, d))  # an infinite d stays
        smallest = tl.full(x.shape, float("inf"), tl.float32)
        middle = sc
        for j in range(3):
            near = clamp(middle + tl.where(j == 0, 0.0, tl.where(j == 1, -1.0, 1.0)), -128.0, 127.0)
            tried = sub_error(x, w, mask, some, d * near, WEIGHTED)
            sc = tl.where(tried < smallest, near, sc)
            smallest = tl.where(tried < smallest, tried, smallest)
        error = ordered_sum(smallest, 16)[:, None]
        take = error < least
        least = tl.where(take, error, least)
        best_d, best_sc = tl.where(take, d, best_d), tl.where(take, sc, best_sc)
    return best_d, best_sc
