"""Errors of a patched model beside its bounds.

An error is a share of the largest value of what is compared. Right is what the model gives in
float32; the patched one may be off by twice the unpatched one's own rounding error there, and by
one unit in the last place of the largest value in any case.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import model_outputs
from .sides import Sides
from .verification import Check

_EXACT = 1e-4  # what a float32 model may be off by: sums in another order, over all layers
# And its gradients. In float32 torch's cross entropy over 49,152 columns is itself off by 1e-5 of
# them (ours by 2e-6), and 30 layers were seen to make 8e-4 of that in SmolLM2-135M.
_EXACT_GRADIENT = 2e-3
# Twice the error that all-bfloat16 models were seen to have (2.4%), where it is not measured.
_UNMEASURED = {torch.bfloat16: 0.05, torch.float16: 0.01}
_MEDIAN = "median logits"
_DRAWS = 8  # random batches that may tell the unpatched model's own error


@dataclass(frozen=True, slots=True)
class Pair:
    """What is compared.

    exact: a float32 copy of the model, or None: right is then what the unpatched model gives.
    gradients: whether they are compared. shape: of random batches.
    """

    model: Any
    exact: Any
    sides: Sides
    gradients: bool
    shape: tuple[int, int]


def output_checks(pair: Pair, batches: Mapping[str, model_outputs.Batch]) -> list[Check]:
    """Logits, loss and gradients of every batch; of the gradients only the one that is worst.

    Args:
        batches: by the name that checks get.
    """
    own = None if pair.exact is None else _Own(pair)
    found = {name: _compare(pair, batch, own) for name, batch in batches.items()}
    fixed = _UNMEASURED.get(dtype_of(pair.model), 0.0)
    while True:
        checks = [
            check for batch, one in found.items() for check in _of_batch(batch, one, own, fixed)
        ]
        if all(check.ok for check in checks) or own is None or not own.draw():
            return checks


def token_checks(
    pair: Pair, batches: Mapping[str, model_outputs.Batch], count: int, checks: Sequence[Check]
) -> list[Check]:
    """Greedy tokens, and the scores they were chosen by, of every batch.

    Tokens must be equal up to the first that logits within their bound leave open. Both sides have
    rounding errors here, so bounds are twice those of `checks`.
    """
    bounds = {(check.what, check.batch): 2.0 * check.bound for check in checks}
    found = []
    for name, batch in batches.items():
        pair.sides.original()
        ids, scores = model_outputs.greedy(pair.model, batch, count)
        pair.sides.patched()
        ours, our_scores = model_outputs.greedy(pair.model, batch, count)
        equal = (ids == ours).long().cumprod(1).sum(1).tolist()
        found += [
            Check(
                what="median scores", batch=name, bound=bounds[_MEDIAN, name],
                error=_median_of_scores(our_scores, scores, equal),
            ),
            _first_difference(name, bounds["logits", name], ids, ours, scores, equal),
        ]  # fmt: skip
    return found


def dtype_of(model: nn.Module) -> torch.dtype:
    """Of the first floating-point parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


class _Own:
    """The unpatched model's own largest rounding errors: of logits, loss, and of the gradients of
    each kind of parameter over layers.

    One batch says little of them: whether a router near a tie turns around is a matter of luck.
    More are drawn, up to `_DRAWS`, only while a patched model is outside the bound.
    """

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self._drawn = 0
        self._largest: dict[str, float] = {}

    def add(self, errors: _Errors) -> None:
        """Take the errors of one more batch into account."""
        pairs = [("logits", errors.logits), (_MEDIAN, errors.median), ("loss", errors.loss or 0.0)]
        pairs += [(_kind(name), error) for name, error in errors.gradients.items()]
        for name, error in pairs:
            self._largest[name] = max(self._largest.get(name, 0.0), error)

    def draw(self) -> bool:
        """Measure one more random batch; False once there were enough."""
        self._drawn += 1
        if self._drawn >= _DRAWS:
            return False
        pair = self._pair
        batch = model_outputs.random_batch(pair.model, *pair.shape, padded=True, seed=self._drawn)
        pair.sides.original()
        exact = model_outputs.outputs(pair.exact, batch, gradients=pair.gradients)
        self.add(_errors(model_outputs.outputs(pair.model, batch, gradients=pair.gradients), exact))
        return True

    def of(self, name: str) -> float:
        """The largest error seen of "logits", the other checks, or a kind of parameter."""
        return self._largest.get(name, 0.0)


@dataclass(frozen=True, slots=True)
class _Errors:
    """Largest errors of one side as shares of the reference's largest value.

    median: of the logits' error over tokens. A router near a tie that turns around changes a few
    tokens much; what is wrong changes all of them.
    """

    logits: float
    median: float
    loss: float | None
    gradients: dict[str, float]


@dataclass(frozen=True, slots=True)
class _Comparison:
    """Of one batch. units: one unit in the last place of the largest value, as a share of it."""

    ours: _Errors
    units: _Errors


def _compare(pair: Pair, batch: model_outputs.Batch, own: _Own | None) -> _Comparison:
    """Run a batch on every side; only the reference's tensors are kept for more than one run."""
    dtype = dtype_of(pair.model)
    pair.sides.original()
    reference = model_outputs.outputs(
        pair.model if pair.exact is None else pair.exact, batch, gradients=pair.gradients
    )
    if own is not None:
        own.add(
            _errors(model_outputs.outputs(pair.model, batch, gradients=pair.gradients), reference)
        )
    pair.sides.patched()
    ours = _errors(model_outputs.outputs(pair.model, batch, gradients=pair.gradients), reference)
    unit = _unit(dtype, _largest(reference.logits))
    units = _Errors(
        logits=unit,
        median=unit,
        loss=None if reference.loss is None else _unit(dtype, abs(reference.loss)),
        gradients={
            name: _unit(dtype, _largest(g), _EXACT_GRADIENT)
            for name, g in reference.gradients.items()
        },
    )
    return _Comparison(ours, units)


def _errors(got: model_outputs.Outputs, reference: model_outputs.Outputs) -> _Errors:
    gradients = {
        name: _error(got.gradients[name], g) if name in got.gradients else math.inf
        for name, g in reference.gradients.items()
    }
    extra = dict.fromkeys(got.gradients.keys() - reference.gradients.keys(), math.inf)
    loss = None
    if reference.loss is not None:
        off = math.inf if got.loss is None else abs(got.loss - reference.loss)
        loss = off / (abs(reference.loss) or 1.0)
    tokens = (got.logits - reference.logits).abs().amax(1) / (_largest(reference.logits) or 1.0)
    largest = _error(got.logits, reference.logits)
    return _Errors(largest, tokens.median().item(), loss, gradients | extra)


def _error(got: Tensor, reference: Tensor) -> float:
    """The largest error as a share of the largest value; NaN if anything is not finite."""
    if not reference.numel():
        return 0.0
    difference = (got.float() - reference.float()).abs().max().item()
    return difference / (_largest(reference) or 1.0)


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _unit(dtype: torch.dtype, largest: float, exact: float = _EXACT) -> float:
    """One unit in the last place of the largest value, as a share of it; `exact` in float32."""
    if dtype == torch.float32 or not 0 < largest < math.inf:
        return exact
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(largest)) / largest


def _of_batch(batch: str, one: _Comparison, own: _Own | None, fixed: float) -> list[Check]:
    ours, units = one.ours, one.units

    def check(what: str, kind: str, error: float, unit: float, worst: str = "") -> Check:
        known = None if own is None else own.of(kind)
        bound = max(fixed if known is None else 2.0 * known, unit)
        return Check(what=what, batch=batch, error=error, bound=bound, own=known, worst=worst)

    checks = [
        check("logits", "logits", ours.logits, units.logits),
        check(_MEDIAN, _MEDIAN, ours.median, units.median),
    ]
    if ours.loss is not None and units.loss is not None:
        checks.append(check("loss", "loss", ours.loss, units.loss))
    gradients = [
        check("gradients", _kind(name), error, units.gradients.get(name, _EXACT_GRADIENT), name)
        for name, error in ours.gradients.items()
    ]
    return checks + ([max(gradients, key=_severity)] if gradients else [])


def _severity(check: Check) -> float:
    return math.inf if math.isnan(check.error) else check.error / check.bound


def _kind(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _median_of_scores(ours: Tensor, scores: Tensor, equal: Sequence[int]) -> float:
    """Over the tokens whose contexts are the same on both sides; `[rows, count, vocabulary]`."""
    at = [(row, step) for row, n in enumerate(equal) for step in range(min(n + 1, ours.shape[1]))]
    rows, steps = zip(*at, strict=True)
    one, other = ours[rows, steps], scores[rows, steps]
    open_ = other.isfinite()  # a score of -inf is a token that must not come yet
    errors = (one - other).where(open_, 0.0).abs().amax(1)
    return errors.median().item() / (_largest(other[open_]) or 1.0)


def _first_difference(
    batch: str, bound: float, ids: Tensor, ours: Tensor, scores: Tensor, equal: Sequence[int]
) -> Check:
    """How far below the chosen token ours was, as a share of the scores, in the worst row."""
    worst, text = 0.0, f"{sum(equal)} of {ids.numel()} tokens equal"
    for row, count in enumerate(equal):
        if count == ids.shape[1]:
            continue
        at = scores[row, count]
        gap = (at[ids[row, count]] - at[ours[row, count]]).item()
        share = gap / (_largest(at[at.isfinite()]) or 1.0)
        if not share <= worst:
            worst = share
            text = f"{sum(equal)} of {ids.numel()} equal; row {row} differs from token {count} on"
    return Check(what="tokens", batch=batch, error=worst, bound=bound, worst=text)
