"""What a replaceable part of a model is, and when a module must be left alone whatever it is.

A part is a module of this package with

    NAME: str
    def offer(name: str, module: nn.Module, model: nn.Module) -> Offer | None

`offer` says None to a module of another kind, `Offer(install=...)` to one that it can replace and
`Offer(reason=...)` to one that it recognises but must leave, with the reason for the user.
`install` changes a module by `swap`, or the model by `implementations.choose`; `unpatch` undoes
both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from .swap import original

_DEVICES = ("cpu", "cuda")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True, slots=True)
class Offer:
    """A part's answer for a module of its kind.

    replaced: whether `install` would replace it (or, without `install`, it already is). reason: for
    the user, why not. install: replaces it; called once, after every part has been asked.
    """

    replaced: bool = False
    install: Callable[[], None] | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        if not self.replaced and not self.reason:
            raise ValueError("reason: an offer that replaces nothing says why")


def hooked(function: object) -> bool:
    """Whether a call of a module runs somebody's hooks, which a kernel in its place would not."""
    return isinstance(function, nn.Module) and any(getattr(function, name) for name in _HOOKS)


def left_alone(module: nn.Module) -> str:
    """Why `module` must keep the forward that it has now; "" if nothing speaks against a change."""
    devices = {tensor.device.type for tensor in [*module.parameters(), *module.buffers()]}
    if "meta" in devices:
        return "on the meta device: load its weights first"
    if len({tensor.device for tensor in module.parameters()}) > 1:
        return "its parameters are on several devices"
    if not devices <= set(_DEVICES):
        return f"no kernels for {', '.join(sorted(devices))}"
    if "forward" in module.__dict__:
        return f"its forward was set on the module by {_owner(module.__dict__['forward'])}"
    if getattr(module, "_compiled_call_impl", None) is not None:
        return "compiled before: patch first, compile then"
    return _foreign_forward(module)


def _foreign_forward(module: nn.Module) -> str:
    """Whether the class's forward was assigned by somebody else's package."""
    cls = next((c for c in original(module).__mro__ if "forward" in c.__dict__), nn.Module)
    owner = _owner(cls.__dict__["forward"])
    known = owner.split(".")[0] in (cls.__module__.split(".")[0], "torch")
    return "" if known else f"{cls.__name__}.forward was replaced by {owner}"


def _owner(forward: object) -> str:
    function = getattr(forward, "__func__", forward)
    while hasattr(function, "func"):  # functools.partial, as accelerate's hooks are
        function = function.func
    return getattr(function, "__module__", None) or type(function).__module__
