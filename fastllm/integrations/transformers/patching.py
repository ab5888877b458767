"""`patch`: one line that puts our kernels under a transformers model, and `unpatch`, its way back.

Modules keep their names, parameters and classes' names; only what they compute with changes. A
module that must not be changed is left alone and the report says why.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import torch
from torch import nn

from . import implementations, registry
from .parts import Offer, left_alone
from .report import PatchError, Report, Row
from .swap import check_unswap, swapped, unswap
from .versions import check_version

# op -> the module beside this one that is its part
_PARTS = {
    "attention": "attention_part",
    "experts": "experts",
    "norm": "norm",
    "rope": "rope",
    "mlp": "mlp",
    "linear": "linear",
    "loss": "loss",
}
OPS = tuple(_PARTS)
_LOCK = threading.RLock()


def patch(
    model: nn.Module | None = None,
    *,
    ops: Sequence[str] = OPS,
    default: bool = False,
    strict: bool = False,
) -> Report:
    """Put our kernels under `model`, in place; without a model only register them.

    Names of modules and parameters, `state_dict`, `save_pretrained` and hooks stay as they are.
    Patching twice changes nothing. Safe to call from several threads.

    Args:
        model: a transformers model, or a module that holds some (PEFT's, a trainer's). None: only
            `attn_implementation="fastllm"` and `experts_implementation="fastllm"` become known.
        ops: which parts to replace, of `OPS`.
        default: also serve what transformers calls "sdpa" and "grouped_mm", so that every model in
            the process uses our kernels, continuous batching too; what they do not support goes
            to transformers' own functions. `unpatch()` takes it back.
        strict: raise if a recognised module cannot be replaced; the model is then unchanged.

    Returns:
        a row for each recognised module and part: replaced, or left alone and why. Print it.

    Raises:
        ValueError: `ops` names something else.
        TypeError: `model` is no module.
        PatchError: with `strict`, listing what would have been left alone.
        ImportError: transformers is missing or older than 5.
    """
    if isinstance(ops, str):
        raise ValueError(f'ops: a sequence of names is needed, such as ("{ops}",)')
    unknown = sorted(set(ops) - set(OPS))
    if unknown:
        raise ValueError(f"ops: {', '.join(unknown)} unknown; there are {', '.join(OPS)}")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model: a torch.nn.Module is needed, not {type(model).__name__}")
    check_version()
    with _LOCK:
        registry.register(default=default)
        if model is None:
            return Report()
        report, installs = _plan(model, [_part(op) for op in OPS if op in ops])
        if strict and not all(row.replaced for row in report.rows):
            raise PatchError(report)
        before = _snapshot(model)
        done = False
        try:
            for install in installs:
                install()
            done = True
        finally:
            if not done:
                _return_to(model, before)
    return report


def unpatch(model: nn.Module | None = None) -> None:
    """Undo `patch`: of `model`, or, without a model, of `patch(default=True)`.

    A model that was never patched stays as it is. "fastllm" stays a known implementation.

    Raises:
        RuntimeError: a module was wrapped by another library after it was patched (FSDP).
    """
    with _LOCK:
        if model is None:
            registry.restore_defaults()
            return
        for module in model.modules():
            check_unswap(module)  # all of them, before the first is changed
        for module in model.modules():
            unswap(module)
        for kind in implementations.chosen(model):
            implementations.restore(model, kind)


@contextlib.contextmanager
def patched(
    model: nn.Module | None = None,
    *,
    ops: Sequence[str] = OPS,
    default: bool = False,
    strict: bool = False,
) -> Iterator[Report]:
    """`patch` for a `with` block, whose target is the report; what was patched before stays so."""
    before = _snapshot(model)
    defaults = registry.defaults_taken()
    report = patch(model, ops=ops, default=default, strict=strict)
    try:
        yield report
    finally:
        with _LOCK:
            if default and not defaults:
                registry.restore_defaults()
            if model is not None:
                _return_to(model, before)


def _part(op: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{_PARTS[op]}")


def _plan(model: nn.Module, parts: Sequence[ModuleType]) -> tuple[Report, list[Callable[[], None]]]:
    """What every part says to every module, and what has to be called to replace them."""
    if isinstance(model, torch._dynamo.OptimizedModule):
        reason = "compiled before: patch the model first, compile then"
        return Report([Row("", type(model).__name__, "model", False, reason)]), []
    report, installs = Report(), []
    for name, module in model.named_modules():
        for part in parts:
            offer = _offer(part, name, module, model)
            if offer is None:
                continue
            kind = type(module).__name__
            report.rows.append(Row(name, kind, part.NAME, offer.replaced, offer.reason))
            if offer.replaced and offer.install is not None:
                installs.append(offer.install)
    return report, installs


def _offer(part: ModuleType, name: str, module: nn.Module, model: nn.Module) -> Offer | None:
    if part.NAME in swapped(module):
        return Offer(replaced=True, reason="already replaced")
    if isinstance(module, torch.jit.ScriptModule):  # its code is not Python's, nor its attributes
        return None
    offer: Offer | None = part.offer(name, module, model)
    if offer is None:
        return None
    reason = left_alone(module)
    return Offer(reason=reason) if reason else offer


def _snapshot(model: nn.Module | None) -> tuple[set[int], set[str]]:
    """Modules that are swapped and kinds of implementations that are chosen, now."""
    if model is None:
        return set(), set()
    modules = {id(module) for module in model.modules() if swapped(module)}
    return modules, implementations.chosen(model)


def _return_to(model: nn.Module, before: tuple[set[int], set[str]]) -> None:
    modules, kinds = before
    for module in model.modules():
        if id(module) not in modules:
            unswap(module)
    for kind in implementations.chosen(model) - kinds:
        implementations.restore(model, kind)
