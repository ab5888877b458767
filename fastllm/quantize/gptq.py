"""GPTQ: weights rounded one column after another, each error passed on to columns not yet rounded.

With H the sum of x^T x over calibration inputs, the error of a layer's outputs is tr(E H E^T) for
E = W - Q. Factor H = U D U^T with U unit upper triangular in the order of rounding; then

    q_k = round(w_k + sum over j < k of (w_j - q_j) U_jk)

makes the error exactly the sum of D_kk times a squared rounding error (Frantar et al., "GPTQ",
2022, in the form of Chee et al., "QuIP", 2023, which needs no inverse of H). Columns of large
inputs go first (act-order): they have the most others to pass their error to.

Scales are fixed before the first column, as the format's own quantizer chooses them; so every
format is served by the same lines, and act-order needs no permutation in the file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NumericalError
from ..ops import packed_layout as layout
from ..ops.quant_format import QUANT_FORMATS
from .packed import PackedWeight
from .pieces import unpacked_pieces

_BLOCK = 128  # columns whose corrections are made one by one; those of others are one product
_PANEL = 256  # columns of the factorization that are worked on at once
_ATTEMPTS = 4


class Rounding:
    """How errors are passed on among the columns of weights that share their inputs.

    Args:
        gram: float32 `[k, k]`, the sum of x^T x over inputs. It is overwritten: the factor takes
            its place, because no second matrix of its size may have room.
        damping: share of the mean of `gram`'s diagonal that is added to the diagonal.
        act_order: begin with the columns of the largest inputs.

    Raises:
        NumericalError: if `gram` is not finite, or cannot be factored at a thousand times the
            damping.
    """

    def __init__(self, gram: Tensor, *, damping: float = 0.01, act_order: bool = True) -> None:
        # Rounding goes from the last place to the first: so the factor of the reversed order is
        # the plain one.
        self._order = torch.arange(len(gram)).flip(0)
        if act_order:
            self._order = gram.diagonal().argsort(stable=True)
        permute_(gram, self._order)
        self._diagonal = gram.diagonal().clone()
        factor_(gram, damping)
        self._factor = gram  # below and on the diagonal; above it is still the gram matrix
        self._steps = gram.diagonal().tolist()

    def round(self, weight: Tensor, start: PackedWeight) -> PackedWeight:
        """Choose the codes of a weight anew, with the scales that it has.

        Args:
            weight: float32 `[n, k]`, what is to be represented.
            start: the weight as its format's quantizer has it; only its scales are used.
        """
        factor, columns = self._factor, self._order.tolist()
        grid = Grid(start)
        left = weight.t()[self._order]  # becomes w - q
        codes = torch.empty(weight.shape[1], weight.shape[0], dtype=torch.uint8)
        for stop in range(len(columns), 0, -_BLOCK):
            first = max(stop - _BLOCK, 0)
            passed = factor[stop:, first:stop].t() @ left[stop:]
            for i in range(stop - 1, first - 1, -1):
                target = passed[i - first]
                if i + 1 < stop:
                    target = target + factor[i + 1 : stop, i] @ left[i + 1 : stop]
                target = left[i] + target / self._steps[i]
                codes[columns[i]], value = grid.nearest(target, columns[i])
                left[i] -= value
        return with_codes(start, codes.t())

    def output_error(self, weight: Tensor, packed: PackedWeight) -> tuple[float, float]:
        """Sums over the inputs x: (of (x (w - q)^T)^2, of (x w^T)^2), w float32 `[n, k]`."""
        error = total = 0.0
        for rows, values in unpacked_pieces(packed):
            own = weight[rows]
            error += self._of_rows((own - values).t()[self._order])
            total += self._of_rows(own.t()[self._order])
        return max(error, 0.0), max(total, 0.0)

    def _of_rows(self, d: Tensor) -> float:
        """The sum of (x d^T)^2 of a few rows, d `[k, rows]` in the order of rounding."""
        total = float((d.square().sum(1) * self._diagonal).sum())
        for first in range(0, len(d), _PANEL):
            above = self._factor[first : first + _PANEL, first:].triu(1)
            total += 2 * float(((above @ d[first:]) * d[first : first + _PANEL]).sum())
        return total


def permute_(matrix: Tensor, order: Tensor) -> None:
    """Rows and columns of a square matrix in another order, with little memory besides."""
    for part in matrix.split(_PANEL, dim=1):
        part.copy_(part[order])
    for part in matrix.split(_PANEL):
        part.copy_(part[:, order])


def factor_(matrix: Tensor, damping: float) -> None:
    """Make the lower triangle of a symmetric matrix its Cholesky factor, in place.

    The diagonal is damped first, ten times more at every attempt. The upper triangle keeps what it
    was, from which a failed attempt is undone.

    Raises:
        NumericalError: if that does not help.
    """
    diagonal = matrix.diagonal().clone()
    mean = float(diagonal.mean())
    if not mean < float("inf"):  # NaN too
        raise NumericalError("the sums over calibration inputs are not finite")
    added = damping * mean if mean > 0 else 1.0
    for _ in range(_ATTEMPTS):
        matrix.diagonal().copy_(diagonal + added)
        if _cholesky_(matrix):
            return
        added *= 10
        _restore_(matrix)
    raise NumericalError(
        "the sums over calibration inputs cannot be factored: give more text, or more damping"
    )


def _restore_(matrix: Tensor) -> None:
    """The lower triangle from the upper one."""
    size = len(matrix)
    for first in range(0, size, _PANEL):
        last = min(first + _PANEL, size)
        own = matrix[first:last, first:last]
        own.copy_(own.triu() + own.triu(1).t())
        matrix[last:, first:last].copy_(matrix[first:last, last:].t())


def _cholesky_(matrix: Tensor) -> bool:
    """False, with the lower triangle spoiled, where the matrix is not positive."""
    size = len(matrix)
    for first in range(0, size, _PANEL):
        last = min(first + _PANEL, size)
        own, info = torch.linalg.cholesky_ex(_symmetric(matrix[first:last, first:last]))
        if int(info) or not bool(torch.isfinite(own).all()):
            return False
        block = matrix[first:last, first:last]
        block.copy_(own + block.triu(1))
        below = matrix[last:, first:last]
        below.copy_(torch.linalg.solve_triangular(own, below.t(), upper=False).t())
        for start in range(last, size, _PANEL):  # the lower triangle alone
            rows = slice(start, min(start + _PANEL, size))
            change = below[start - last : rows.stop - last] @ below[: rows.stop - last].t()
            diagonal = matrix[rows, rows]
            kept = diagonal.triu(1)
            matrix[rows, last : rows.stop] -= change
            diagonal.copy_(diagonal.tril() + kept)
    return True


def _symmetric(lower: Tensor) -> Tensor:
    return lower.tril() + lower.tril(-1).t()


class Grid:
    """The values that a packed weight's scales let each place take."""

    def __init__(self, packed: PackedWeight) -> None:
        kind = QUANT_FORMATS[packed.format]
        d, m = layout.block_scales(packed.scales, packed.format, packed.n, packed.k)
        self._columns = kind.columns_per_scale(packed.k)
        self._scales = d.t().contiguous()
        self._minimums = None if m is None else m.t().contiguous()
        inverse = 1 / self._scales
        self._inverse = torch.where(inverse.isfinite(), inverse, 0.0)
        stored = torch.arange(1 << kind.bits).to(torch.uint8)
        values = layout.code_values(stored, packed.format)
        known = values.isfinite()  # e4m3 has NaN
        if kind.name == "q8_0" or kind.codes == "int8":
            known &= values > -128  # files of these formats are symmetric
        self._values, order = values[known].sort(stable=True)
        self._stored = stored[known][order]
        self._middles = (self._values[1:] + self._values[:-1]) / 2

    def nearest(self, wanted: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """Stored codes uint8 and values float32 [n] nearest to `wanted` [n] in a column."""
        group = column // self._columns
        m = None if self._minimums is None else self._minimums[group]
        shifted = wanted if m is None else wanted - m
        index = torch.bucketize(shifted * self._inverse[group], self._middles)
        values = self._values[index] * self._scales[group]
        return self._stored[index], values if m is None else values + m


def with_codes(packed: PackedWeight, codes: Tensor) -> PackedWeight:
    """The scales of a packed weight with other stored codes, uint8 [n, k]."""
    step = _PANEL // packed.rows_per_group * packed.rows_per_group
    data = [
        layout.interleave(
            layout.code_words(rows.contiguous(), packed.format), packed.rows_per_group
        )
        for rows in codes.split(step)
    ]
    return PackedWeight(torch.cat(data), packed.scales, packed.format, packed.n, packed.k)
