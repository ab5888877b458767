"""How one module of somebody else's model gets our forward, and how it gets its own back.

The module's `__class__` becomes a subclass made for it, with the same name, so that everything
which goes by names, parameters or `isinstance` holds: `state_dict`, `save_pretrained`, PEFT's
target modules, FSDP's wrapping, hooks. Nothing is assigned into the classes or modules of
transformers: other models in the process stay as they were.

A swapped module is pickled as what it was (files do not need this package) and deep-copied as what
it is.
"""

from __future__ import annotations

import copy
import copyreg
import threading
import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

_CLASSES: dict[tuple[type, str, Callable[..., Any]], type] = {}
_LOCK = threading.RLock()
_ATTRIBUTES = "fastllm_attributes"  # in a module's __dict__: names of the attributes that we added


def swap(module: nn.Module, part: str, forward: Callable[..., Any], **attrs: Any) -> None:
    """Let `module` run `forward` until `unswap`; the same part twice changes nothing.

    Args:
        module: the module, changed in place.
        part: what is replaced ("norm"); several parts of one module nest, the last is outermost.
        forward: `forward(self, ...)`. Classes are kept per (class, part, forward), so it should be
            one function per class of modules, not one per module.
        attrs: attributes that `forward` reads from the module; removed by `unswap`. No tensors and
            no modules, which would become part of its state.
    """
    if part in swapped(module):
        return
    taken = sorted(name for name in attrs if hasattr(module, name))
    if taken:
        raise ValueError(f"attrs: {type(module).__name__} already has {', '.join(taken)}")
    with _LOCK:
        cls = type(module)
        key = (cls, part, forward)
        if key not in _CLASSES:
            _CLASSES[key] = _subclass(cls, part, forward)
        module.__dict__.update(attrs)
        if attrs:
            added = module.__dict__.get(_ATTRIBUTES, ())
            module.__dict__[_ATTRIBUTES] = (*added, *attrs)
        module.__class__ = _CLASSES[key]  # type: ignore[assignment]


def unswap(module: nn.Module) -> bool:
    """Give `module` its own class back and drop our attributes; whether anything changed.

    Raises:
        RuntimeError: as `check_unswap`.
    """
    if not swapped(module):
        return False
    check_unswap(module)
    with _LOCK:
        module.__class__ = original(module)  # type: ignore[assignment]
        for name in module.__dict__.pop(_ATTRIBUTES, ()):
            del module.__dict__[name]
    return True


def check_unswap(module: nn.Module) -> None:
    """Raise RuntimeError if another library has since made a subclass of ours (FSDP does)."""
    if swapped(module) and "fastllm_part" not in type(module).__dict__:
        raise RuntimeError(
            f"{type(module).__name__} was wrapped by another library after it was patched: undo "
            "that first, or unpatch before wrapping"
        )


def swapped(module: nn.Module) -> tuple[str, ...]:
    """The parts of `module` that are swapped, innermost first."""
    classes = (cls.__dict__ for cls in reversed(type(module).__mro__))
    return tuple(names["fastllm_part"] for names in classes if "fastllm_part" in names)


def original(module: nn.Module) -> type:
    """The class that `module` had before any swap (its class, if there was none)."""
    return getattr(type(module), "fastllm_original", type(module))


def rebind(forward: Callable[..., Any], names: Mapping[str, Any]) -> Callable[..., Any]:
    """`forward` with other values for globals that it reads by name: the code stays the same.

    Args:
        forward: a plain Python function, such as `LlamaAttention.forward`.
        names: global name -> what the new function finds there, such as
            `{"apply_rotary_pos_emb": rotate}`. Its own module is not touched.

    Raises:
        ValueError: `forward` reads no such global, or is wrapped by a decorator that does.
    """
    if not isinstance(forward, types.FunctionType) or hasattr(forward, "__wrapped__"):
        raise ValueError(f"forward: {forward!r} is no plain function; its globals are not its own")
    missing = sorted(
        name
        for name in names
        if name not in forward.__code__.co_names or name not in forward.__globals__
    )
    if missing:
        raise ValueError(f"names: {forward.__qualname__} reads no global {', '.join(missing)}")
    return with_globals(forward, names)


def with_globals(function: types.FunctionType, names: Mapping[str, Any]) -> types.FunctionType:
    """A copy of `function`, wrapped or not, whose own code finds other values under global names.

    Signature, names and attributes are those of `function`.
    """
    scope = {**function.__globals__, **names}
    # torch.compile looks the globals of an inlined function up in the module that `__name__` names,
    # and would find the old values; without it, it takes the function's own.
    scope.pop("__name__", None)
    made = types.FunctionType(
        function.__code__,
        scope,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    for name in ("__kwdefaults__", "__annotations__", "__doc__", "__qualname__", "__module__"):
        setattr(made, name, getattr(function, name))
    made.__dict__.update(function.__dict__)
    return made


def _subclass(cls: type, part: str, forward: Callable[..., Any]) -> type:
    body: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "fastllm_part": part,
        "fastllm_original": getattr(cls, "fastllm_original", cls),
        "forward": forward,
        "__reduce_ex__": _reduce_as_original,
    }
    if not hasattr(cls, "__deepcopy__"):
        body["__deepcopy__"] = _deepcopy
    if not hasattr(cls, "__copy__"):
        body["__copy__"] = _copy
    return type(cls)(cls.__name__, (cls,), body)


def _reduce_as_original(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """What pickle stores: an object of the original class, without our attributes."""
    first: Any = original(self)
    make, arguments, state, *rest = first.__reduce_ex__(self, max(int(protocol), 2))
    arguments = tuple(first if argument is type(self) else argument for argument in arguments)
    if make is copyreg.__newobj__:  # type: ignore[attr-defined]
        # pickle wants that one with the object's own class; the older function makes the same
        make, arguments = copyreg._reconstructor, (first, object, None)  # type: ignore[attr-defined]
    if isinstance(state, dict) and _ATTRIBUTES in state:
        ours = {_ATTRIBUTES, *state[_ATTRIBUTES]}
        state = {name: value for name, value in state.items() if name not in ours}
    return (make, arguments, state, *rest)


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    new = type(self).__new__(type(self))
    memo[id(self)] = new  # before the state: parts of it may point back here
    new.__setstate__(copy.deepcopy(self.__dict__, memo))
    return new


def _copy(self: nn.Module) -> nn.Module:
    new = type(self).__new__(type(self))
    new.__setstate__(self.__dict__.copy())
    return new
