"""`verify`: is a patched model still the same model, and how much faster is it?

Both sides run in place on the same weights. Right is what the model itself gives in float32; the
patched model may be off by twice the unpatched one's own rounding error there, and by one unit in
the last place of the largest value in any case. A float32 model is compared with itself unpatched.
"""

from __future__ import annotations

import copy
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import probes
from .patching import OPS
from .sides import Sides, undisturbed
from .verification import Check, Speed, Verification

_EXACT = 1e-4  # what a float32 model may be off by: sums in another order, over all layers
# Twice the error that all-bfloat16 models were seen to have (2.4%), where it is not measured.
_UNMEASURED = {torch.bfloat16: 0.05, torch.float16: 0.01}
_ROUNDS = 5


def verify(
    model: nn.Module,
    inputs: Mapping[str, Any] | None = None,
    *,
    texts: Sequence[str] | None = None,
    tokenizer: Any = None,
    ops: Sequence[str] = OPS,
    gradients: bool = True,
    tokens: int = 32,
    speed: bool = True,
    shape: tuple[int, int] = (2, 128),
    measure_own: bool | None = None,
) -> Verification:
    """Run `model` unpatched and patched side by side; the model is left exactly as it came.

    Compared are logits, loss, the gradient of every trainable parameter, and greedy tokens, on
    random ids with padding and on real inputs. Dropout is off.

    Args:
        model: a causal language model of transformers, or one wrapped by PEFT. If it is patched,
            it is compared as it is patched.
        inputs: a real batch: `input_ids` `[rows, length]`, and what else the model takes.
        texts: real inputs as texts, in place of `inputs`; needs `tokenizer`.
        tokenizer: a transformers tokenizer; alone it reads a few lines of prose and code.
        ops: what to replace, as in `patch`; of no account for a model that came patched.
        gradients: compare and time the backward too.
        tokens: how many to generate for each row; 0: none.
        speed: measure forward, forward and backward, and decode on both sides.
        shape: rows and length of the random batch, which is also what is timed.
        measure_own: make a float32 copy of a bfloat16 or float16 model to measure the unpatched
            model's own rounding error, and bound by it. None: if it fits into free memory. Without
            it the bound is 5% of the largest value (float16: 1%).

    Returns:
        a `Verification`: print it, ask `.ok`, or exit with `.exit_code`.

    Raises:
        ValueError: `texts` without `tokenizer`, texts and inputs together, an unknown op, a model
            patched in part, a shape below (1, 4).
        TypeError: `model` is no module.
    """
    batches = _batches(model, inputs, texts, tokenizer, shape)
    sides = Sides(model, ops)
    try:
        with undisturbed(model):
            sides.original()
            exact, notes = _float32_copy(model, measure_own)
            found = {
                name: _compare(model, exact, sides, batch, gradients)
                for name, batch in batches.items()
            }
            checks = _checks(model, found, exact is not None)
            if tokens and model.can_generate():
                checks += _token_checks(model, sides, batches, tokens, checks)
            speeds = _speeds(model, sides, shape, gradients, tokens) if speed else []
    finally:
        sides.close()
    return Verification(
        model=type(model).__name__,
        dtype=_name(_dtype(model)),
        reference="its float32 copy" if exact is not None else "the unpatched model",
        report=sides.report,
        checks=tuple(checks),
        speeds=tuple(speeds),
        notes=tuple(notes),
    )


def _batches(
    model: Any, inputs: Mapping[str, Any] | None, texts: Sequence[str] | None, tokenizer: Any,
    shape: tuple[int, int],
) -> dict[str, probes.Batch]:  # fmt: skip
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: a transformers model is needed, not {type(model).__name__}")
    if shape[0] < 1 or shape[1] < 4:
        raise ValueError(f"shape: at least 1 row of 4 tokens is needed, not {shape}")
    if texts is not None and tokenizer is None:
        raise ValueError("texts: they need a tokenizer (tokenizer=AutoTokenizer...)")
    if inputs is not None and texts is not None:
        raise ValueError("texts: give either texts or inputs")
    batches: dict[str, probes.Batch] = {"random": probes.random_batch(model, *shape, padded=True)}
    if inputs is not None:
        if "input_ids" not in inputs:
            raise ValueError("inputs: input_ids are needed, as the model's forward takes them")
        batches["real"] = inputs
    elif tokenizer is not None:
        batches["real"] = probes.text_batch(model, tokenizer, texts or probes.TEXTS)
    return batches


@dataclass(frozen=True, slots=True)
class _Errors:
    """Largest errors of one side as shares of the reference's largest value."""

    logits: float
    loss: float | None
    gradients: dict[str, float]


@dataclass(frozen=True, slots=True)
class _Comparison:
    """Of one batch. units: one unit in the last place of the largest value, as a share of it."""

    ours: _Errors
    own: _Errors | None
    units: _Errors


def _compare(
    model: Any, exact: Any, sides: Sides, batch: probes.Batch, gradients: bool
) -> _Comparison:
    """Run a batch on every side; only the reference's tensors are kept for more than one run."""
    dtype = _dtype(model)
    sides.original()
    reference = probes.outputs(model if exact is None else exact, batch, gradients=gradients)
    own = None
    if exact is not None:
        own = _errors(probes.outputs(model, batch, gradients=gradients), reference)
    sides.patched()
    ours = _errors(probes.outputs(model, batch, gradients=gradients), reference)
    units = _Errors(
        _unit(dtype, _largest(reference.logits)),
        None if reference.loss is None else _unit(dtype, abs(reference.loss)),
        {name: _unit(dtype, _largest(g)) for name, g in reference.gradients.items()},
    )
    return _Comparison(ours, own, units)


def _errors(got: probes.Outputs, reference: probes.Outputs) -> _Errors:
    gradients = {
        name: _error(got.gradients[name], g) if name in got.gradients else math.inf
        for name, g in reference.gradients.items()
    }
    extra = dict.fromkeys(got.gradients.keys() - reference.gradients.keys(), math.inf)
    loss = None
    if reference.loss is not None and got.loss is not None:
        loss = abs(got.loss - reference.loss) / (abs(reference.loss) or 1.0)
    return _Errors(_error(got.logits, reference.logits), loss, gradients | extra)


def _error(got: Tensor, reference: Tensor) -> float:
    """The largest error as a share of the largest value; NaN if anything is not finite."""
    if not reference.numel():
        return 0.0
    difference = (got.float() - reference.float()).abs().max().item()
    return difference / (_largest(reference) or 1.0)


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _unit(dtype: torch.dtype, largest: float) -> float:
    if dtype == torch.float32 or not 0 < largest < math.inf:
        return _EXACT
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(largest)) / largest


def _checks(model: Any, found: Mapping[str, _Comparison], measured: bool) -> list[Check]:
    """Errors beside bounds. Gradients of one kind of parameter, over layers and batches, share the
    unpatched model's largest error: that of one small tensor is a matter of luck.
    """
    dtype = _dtype(model)
    fixed = 0.0 if measured else _UNMEASURED.get(dtype, 0.0)
    kinds: dict[str, float] = {}
    for one in found.values():
        for name, error in (one.own.gradients if one.own else {}).items():
            kinds[_kind(name)] = max(kinds.get(_kind(name), 0.0), error)
    checks = []
    for batch, one in found.items():
        own = one.own
        checks.append(_check("logits", batch, one.ours.logits, one.units.logits, fixed,
                             own.logits if own else None))  # fmt: skip
        if one.ours.loss is not None and one.units.loss is not None:
            checks.append(_check("loss", batch, one.ours.loss, one.units.loss, fixed,
                                 own.loss if own else None))  # fmt: skip
        gradients = [
            _check("gradients", batch, error, one.units.gradients.get(name, _EXACT), fixed,
                   kinds[_kind(name)] if own else None, name)
            for name, error in one.ours.gradients.items()
        ]  # fmt: skip
        if gradients:
            checks.append(max(gradients, key=_severity))
    return checks


def _check(
    what: str, batch: str, error: float, unit: float, fixed: float, own: float | None,
    worst: str = "",
) -> Check:  # fmt: skip
    bound = max(2.0 * own if own is not None else fixed, unit)
    return Check(what=what, batch=batch, error=error, bound=bound, own=own, worst=worst)


def _severity(check: Check) -> float:
    return math.inf if math.isnan(check.error) else check.error / check.bound


def _kind(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _token_checks(
    model: Any, sides: Sides, batches: Mapping[str, probes.Batch], count: int,
    checks: Sequence[Check],
) -> list[Check]:  # fmt: skip
    """Greedy tokens must be equal up to the first that logits within their bound leave open."""
    bounds = {check.batch: check.bound for check in checks if check.what == "logits"}
    found = []
    for name, batch in batches.items():
        sides.original()
        ids, scores = probes.greedy(model, batch, count)
        sides.patched()
        ours, _ = probes.greedy(model, batch, count)
        error, worst = _first_difference(ids, ours, scores)
        found.append(
            Check(what="tokens", batch=name, error=error, bound=2.0 * bounds[name], worst=worst)
        )
    return found


def _first_difference(ids: Tensor, ours: Tensor, scores: Tensor) -> tuple[float, str]:
    """How far below the chosen token ours was, as a share of the scores, in the worst row."""
    equal = (ids == ours).long().cumprod(1).sum(1).tolist()
    total = ids.numel()
    worst, text = 0.0, f"{sum(equal)} of {total} tokens equal"
    for row, count in enumerate(equal):
        if count == ids.shape[1]:
            continue
        at = scores[row, count]
        gap = (at[ids[row, count]] - at[ours[row, count]]).item()
        share = gap / (_largest(at[at.isfinite()]) or 1.0)
        if not share <= worst:
            worst = share
            text = f"{sum(equal)} of {total} tokens equal; row {row} differs from token {count} on"
    return worst, text


def _float32_copy(model: Any, wanted: bool | None) -> tuple[Any, list[str]]:
    """A float32 copy of an unpatched model in fewer bits, and what there is to say about it."""
    if _dtype(model) == torch.float32:
        return None, []
    if getattr(model, "is_quantized", False):
        return None, ["quantized weights have no float32 copy: the bound is a fixed share"]
    if wanted is False or (wanted is None and not _fits(model)):
        return None, ["no float32 copy was made: the bound is a fixed share"]
    return copy.deepcopy(model).float(), []


def _fits(model: nn.Module) -> bool:
    """Whether float32 weights and gradients take less than half of the free memory."""
    parameters = list(model.parameters())
    needed = 4 * sum(p.numel() * (2 if p.requires_grad else 1) for p in parameters)
    if parameters and parameters[0].is_cuda:
        return 2 * needed < torch.cuda.mem_get_info(parameters[0].device)[0]
    return 2 * needed < os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _dtype(model: nn.Module) -> torch.dtype:
    """Of the first floating-point parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _speeds(
    model: Any, sides: Sides, shape: tuple[int, int], gradients: bool, tokens: int
) -> list[Speed]:
    batch = probes.random_batch(model, *shape, padded=False)
    prompt = probes.random_batch(model, 1, 8, padded=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    size = f"{shape[0]} x {shape[1]}"

    @torch.no_grad()
    def forward() -> None:
        model(**batch)

    def step() -> None:
        loss = model(**batch, labels=batch["input_ids"], use_cache=False).loss
        torch.autograd.grad(loss, trained, allow_unused=True)

    calls: dict[str, Callable[[], object]] = {f"forward, {size}": forward}
    if gradients and trained and probes.takes_labels(model):
        calls[f"forward+backward, {size}"] = step
    if tokens and model.can_generate():
        calls[f"{tokens} tokens, 1 row"] = lambda: probes.greedy(model, prompt, tokens)
    return [_alternate(sides, what, call, batch["input_ids"]) for what, call in calls.items()]


def _alternate(sides: Sides, what: str, call: Callable[[], object], on: Tensor) -> Speed:
    """Medians of `_ROUNDS` calls on each side in turn, after one that is not counted."""
    seconds: dict[str, list[float]] = {"original": [], "patched": []}
    for index in range(_ROUNDS + 1):
        for name, switch in (("original", sides.original), ("patched", sides.patched)):
            switch()
            start = time.perf_counter()
            call()
            if on.is_cuda:
                torch.cuda.synchronize(on.device)
            if index:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return Speed(what=what, **medians)
