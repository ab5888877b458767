"""The scales of a group of columns that make the weighted squared error of its values small.

Every search alternates two closed steps from several starts: the nearest codes of given scales, and
the least-squares scales of given codes; it keeps the fit of the largest gain, which is how much of
`sum w x^2` the fit explains. Super-blocks then store the scales of their sub-blocks as integers:
their step is the half that brings all of them closest to integers, and neighbouring integers are
tried on the values themselves. The arithmetic is elementwise, and sums ascend, so that a kernel
with a group in each lane gives the same bits.

The gain of a fit is exact to 1e-6 of `sum w x^2` only where its sums determine both scales. Codes
of which almost all weight has one value (constants, values far from zero, a column that alone
counts) determine one: their minimum stays. Super-blocks also try the scales of their ranges, on the
values themselves, and are never worse (see `tests/ops/test_quantize_plain.py`).

Tensors have columns first: `x` and its weights `w` are [columns of a group, groups ...]. On normal
and Student's t values the squared error is 0.86 to 0.97 of llama.cpp's; on constants, offsets and
lone importances at most its own but for the rounding of halves (`tests/ops/test_quantize.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Fit = tuple[Tensor, ...]  # a gain or an error, and what it belongs to

# Where the largest value may land, counted from the first code: below it nothing is clipped, above
# it the ends are. Steps of half a code; the fits in between follow from the refit.
SIGNED_STARTS = {
    8: (-7.0, -7.5, -8.0, -8.5, -9.0, -9.5, -10.0, -10.5, 7.0, 7.5, 8.0, 9.0),
    16: (-15.0, -15.5, -16.0, -16.5, -17.0, -17.5, -18.0, -18.5, 15.0, 15.5, 16.0, 17.0),
    32: (-28.0, -29.0, -30.0, -31.0, -32.0, -33.0, 29.0, 30.0, 31.0),
    127: (-126.0, -126.5, -127.0, -127.5, 126.0, 126.5),
}
ZERO_STARTS = (14.0, 15.0, 16.0, 17.5)
ZERO_SHIFTS = (0.0, -1.0, 1.0)
AFFINE_STARTS = (-3.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)  # beside the number of levels
SHIFTS = (0.0, -1.0, 1.0)  # of the integers that sub-blocks store
ONE_CODE = 1e-5  # variance of codes over their square below which fp32 sums do not show it
ROUNDS = 3  # fits of a super-block's own scales


def inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 where x is 0 or so small that the reciprocal overflows."""
    found = 1 / x
    return torch.where(torch.isfinite(found), found, 0.0)


def half(x: Tensor) -> Tensor:
    """x rounded to fp16, as float32."""
    return x.to(torch.float16).float()


def column_sum(x: Tensor) -> Tensor:
    """The sum over the first dimension, in its order."""
    total = torch.zeros_like(x[0])
    for row in x:
        total = total + row
    return total


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b where b is positive, else 0."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1.0), 0.0)


def _better(found: Fit, best: Fit) -> Fit:
    """Elementwise the fit of the larger gain, its first entry; `best` among equals."""
    take = found[0] > best[0]
    return tuple(torch.where(take, new, old) for new, old in zip(found, best, strict=True))


def _nothing(like: Tensor, entries: int) -> Fit:
    return (torch.full_like(like, -1.0), *(torch.zeros_like(like) for _ in range(entries)))


def peak_of(x: Tensor) -> Tensor:
    """The value of largest magnitude; the negative one of two."""
    most, least = x.amax(0), x.amin(0)
    return torch.where(most > -least, most, least)


def fit_signed(
    x: Tensor, w: Tensor, low: int, high: int, starts: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """d of values d v, v from low to high, and `sum w v^2` of its codes."""
    peak = peak_of(x)

    def fit(factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        v = torch.round(x * factor).clamp(low, high)
        wv = w * v
        a, b = column_sum(wv * x), column_sum(wv * v)
        d = ratio(a, b)
        return a * d, d, b

    best = _nothing(peak, 2)
    for start in starts:
        found = fit(start * inverse(peak))
        best = _better(found, best)
        best = _better(fit(inverse(found[1])), best)
    return best[1], best[2]


def fit_zero(x: Tensor, w: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """(d, z) of values d (u - z), u and z from 0 to levels."""
    low, high = x.amin(0).clamp(max=0.0), x.amax(0).clamp(min=0.0)

    def fit(factor: Tensor, shift: float) -> tuple[Tensor, Tensor, Tensor]:
        z = (torch.round(-low * factor) + shift).clamp(0, levels)
        v = torch.minimum(torch.maximum(torch.round(x * factor), -z), levels - z)
        wv = w * v
        a, b = column_sum(wv * x), column_sum(wv * v)
        d = ratio(a, b)
        return a * d, d, z

    best = _nothing(low, 2)
    for shift in ZERO_SHIFTS:
        for start in ZERO_STARTS:
            found = fit(start * inverse(high - low), shift)
            best = _better(found, best)
            best = _better(fit(inverse(found[1]), shift), best)
    return best[1], best[2]


def bounds(x: Tensor, free: bool) -> tuple[Tensor, Tensor]:
    """The range of values d u + m: of the smallest, which is at most 0 unless `free`."""
    low = x.amin(0)
    return low if free else low.clamp(max=0.0), x.amax(0)


def fit_affine(x: Tensor, w: Tensor, levels: int, free: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(d, m, sum w u^2) of values d u + m, u from 0 to levels, d >= 0; m <= 0 unless `free`."""
    low, high = bounds(x, free)
    y = x - low
    sw, sy = column_sum(w), column_sum(w * y)

    def fit(factor: Tensor, start: Tensor) -> Fit:
        u = torch.round((y - start) * factor).clamp(0, levels)
        wu = w * u
        su, suu, syu = column_sum(wu), column_sum(wu * u), column_sum(wu * y)
        det = sw * suu - su * su
        # Codes that (almost) all weight has in common determine one number: d, of their minimum.
        both = det > ONE_CODE * (sw * suu)
        c = torch.where(both, ratio(suu * sy - su * syu, det), start)
        c = torch.where(suu > 0, c, ratio(sy, sw))
        if not free:
            c = torch.minimum(c, -low)
        rest = syu - c * su
        d = ratio(rest, suu).clamp(min=0.0)
        gain = c * (2.0 * sy - c * sw) + d * (2.0 * rest - d * suu)
        return gain, d, c, suu

    best, zero = _nothing(low, 3), torch.zeros_like(low)
    for start in AFFINE_STARTS:
        found = fit((levels + start) * inverse(high - low), zero)
        best = _better(found, best)
        best = _better(fit(inverse(found[1]), found[2]), best)
    return best[1], best[2] + low, best[3]


def fit_step(values: Tensor, weights: Tensor, most: int, least: int) -> Tensor:
    """The half `step` for which values [S, ...] are closest to integers -most - 1 .. most of it.

    Tried are the steps of which the largest value is `most`, `most` - 1, ..., `least`.
    """
    peak = values.abs().amax(0)
    best = step = None
    for integer in range(most, least - 1, -1):
        tried = half(peak / integer)
        error = _step_error(values, weights, tried, most)
        if best is None or step is None:
            best, step = error, tried
        else:
            step = torch.where(error < best, tried, step)
            best = torch.where(error < best, error, best)
    assert step is not None
    return step


def _step_error(values: Tensor, weights: Tensor, step: Tensor, most: int) -> Tensor:
    integers = torch.round(values * inverse(step)).clamp(-most - 1, most)
    away = values - step * integers
    return column_sum(weights * away * away)


def fit_super_min(x: Tensor, w: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d, dmin) [B] and integers (sc, mn) [8, B] of values (d sc) u - (dmin mn), 0 <= u <= levels.

    Args:
        x, w: [32, 8, B].
        levels: 15 or 31.
    """
    sw = column_sum(w)
    sx = column_sum(w * x)
    s, m, suu = fit_affine(x, w, levels, free=False)
    d, dmin = fit_step(s, suu, 63, 32), fit_step(-m, sw, 63, 32)
    sc, mn = _integers(s, d), _integers(-m, dmin)

    def codes(d: Tensor, dmin: Tensor, sc: Tensor, mn: Tensor) -> Tensor:
        return torch.round((x + dmin * mn) * inverse(d * sc)).clamp(0, levels)

    def error(u: Tensor, d: Tensor, dmin: Tensor, sc: Tensor, mn: Tensor) -> Tensor:
        away = ((d * sc) * u - dmin * mn) - x
        return column_sum((w * away) * away)

    def neighbours(sc: Tensor, mn: Tensor) -> Fit:
        best: Fit = (torch.full_like(sc, float("inf")), sc, mn)
        for shift in SHIFTS:
            near = (sc + shift).clamp(0, 63)
            u = codes(d, dmin, near, mn)
            best = _smaller((error(u, d, dmin, near, mn), near, mn), best)
            least = ratio(column_sum(w * ((d * near) * u - x)), sw)
            moved = torch.round(least * inverse(dmin)).clamp(0, 63)
            u = codes(d, dmin, near, moved)
            best = _smaller((error(u, d, dmin, near, moved), near, moved), best)
        return best

    best: Fit = (torch.full_like(d, float("inf")), d, dmin, sc, mn)
    plain = _plain_super_min(x, levels)
    best = _smaller((column_sum(error(codes(*plain), *plain)), *plain), best)
    for round_ in range(ROUNDS):
        errors, sc, mn = neighbours(sc, mn)
        best = _smaller((column_sum(errors), d, dmin, sc, mn), best)
        if round_ + 1 < ROUNDS:
            u = codes(d, dmin, sc, mn)
            d, dmin = _refit_super_min(x, w, u, sx, sw, (d, dmin, sc, mn))
    return best[1], best[2], best[3], best[4]


def _integers(values: Tensor, step: Tensor) -> Tensor:
    return torch.round(values * inverse(step)).clamp(0, 63)


def _plain_super_min(x: Tensor, levels: int) -> Fit:
    """(d, dmin, sc, mn) of the sub-blocks' ranges: weights take no part."""
    low, high = bounds(x, free=False)
    s, minus = (high - low) / levels, low.abs()
    d, dmin = half(s.amax(0) / 63), half(minus.amax(0) / 63)
    return d, dmin, _integers(s, d), _integers(minus, dmin)


def _smaller(found: Fit, best: Fit) -> Fit:
    """Elementwise the fit of the smaller error, its first entry; `best` among equals."""
    take = found[0] < best[0]
    return tuple(torch.where(take, new, old) for new, old in zip(found, best, strict=True))


def _refit_super_min(
    x: Tensor, w: Tensor, u: Tensor, sx: Tensor, sw: Tensor, now: Fit
) -> tuple[Tensor, Tensor]:
    """The least-squares (d, dmin) of given codes and integers, as halves."""
    d, dmin, sc, mn = now
    wu = w * u
    aa = column_sum((sc * sc) * column_sum(wu * u))
    ab = column_sum((sc * mn) * column_sum(wu))
    bb = column_sum((mn * mn) * sw)
    xa, xb = column_sum(sc * column_sum(wu * x)), column_sum(mn * sx)
    det = aa * bb - ab * ab
    both = det > 1e-6 * (aa * bb)
    alone = torch.where(aa > 0, ratio(xa + dmin * ab, aa), d)
    d = torch.where(both, ratio(xa * bb - xb * ab, det), alone)
    dmin = torch.where(both, ratio(xa * ab - xb * aa, det), dmin)
    return half(d.clamp(min=0.0)), half(dmin.clamp(min=0.0))


def fit_super(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """d [B] and integers sc [16, B] of values (d sc)(u - 32). x, w: [16, 16, B]."""
    s, svv = fit_signed(x, w, -32, 31, SIGNED_STARTS[32])
    d = fit_step(s, svv, 127, 64)
    sc = torch.round(s * inverse(d)).clamp(-128, 127)

    def codes(step: Tensor) -> Tensor:
        return torch.round(x * inverse(step)).clamp(-32, 31)

    def error(step: Tensor) -> Tensor:
        away = step * codes(step) - x
        return column_sum((w * away) * away)

    best: Fit = (torch.full_like(d, float("inf")), d, sc)
    plain_d, plain_sc = _plain_super(x)
    best = _smaller((column_sum(error(plain_d * plain_sc)), plain_d, plain_sc), best)
    for round_ in range(ROUNDS):
        around: Fit = (torch.full_like(sc, float("inf")), sc)
        for shift in SHIFTS:
            near = (sc + shift).clamp(-128, 127)
            around = _smaller((error(d * near), near), around)
        sc = around[1]
        best = _smaller((column_sum(around[0]), d, sc), best)
        if round_ + 1 < ROUNDS:
            v = codes(d * sc)
            aa = column_sum((sc * sc) * column_sum((w * v) * v))
            refit = ratio(column_sum(sc * column_sum((w * v) * x)), aa)
            d = half(torch.where(aa > 0, refit, d))  # an infinite d stays
    return best[1], best[2]


def _plain_super(x: Tensor) -> Fit:
    """(d, sc) of the sub-blocks' largest magnitudes, as `_plain_super_min`."""
    s = peak_of(x) / -32
    d = half(s.abs().amax(0) / 127)
    return d, torch.round(s * inverse(d)).clamp(-128, 127)
