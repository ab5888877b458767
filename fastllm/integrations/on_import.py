"""What other packages must know of us is told as soon as both are imported, in any order.

`attn_implementation="fastllm"`, `QuantConfig` and adapters of PEFT on packed layers work after
`import fastllm` alone, which must not import transformers or PEFT (seconds, and they are optional).
A finder waits for the file that defines what is added to; when that has run, our functions go in.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def _register_transformers() -> None:
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        return  # without these registries; `fastllm.patch` says so
    try:
        from .transformers import quantizer, registry

        registry.register()
        quantizer.register()
    except (ImportError, AttributeError) as error:  # theirs must not fail for a name they renamed
        warnings.warn(
            f"fastllm does not fit transformers {transformers.__version__} ({error}): "
            'attn_implementation="fastllm" and QuantConfig stay unknown',
            stacklevel=2,
        )


def _register_peft() -> None:
    try:
        from . import peft

        peft.register()
    except (ImportError, AttributeError) as error:
        warnings.warn(
            f"fastllm does not fit the PEFT that is installed ({error}): adapters on packed layers "
            "run PEFT's own forward",
            stacklevel=2,
        )


# file -> what follows it. transformers' defines the attention interface and imports the other two;
# PEFT's chooses the layers of LoRA.
_AWAITED: Mapping[str, Callable[[], None]] = {
    "transformers.modeling_utils": _register_transformers,
    "peft.tuners.lora.model": _register_peft,
}


class _Finder:
    """Finds nothing by itself: it lets the others find, and adds a step after `exec_module`."""

    def __init__(self) -> None:
        self.pending: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.pending:
            return None
        self.pending.discard(name)  # the others are asked next, by the same road
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.pending.add(name)  # until it has run: finding is not importing
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _AWAITED[name]()
            self.pending.discard(name)
            if not self.pending and self in sys.meta_path:
                sys.meta_path.remove(self)  # type: ignore[arg-type]

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_FINDER = _Finder()


def wait() -> None:
    """Register now with what is loaded, with the rest when it is; idempotent."""
    for name, register in _AWAITED.items():
        if name in sys.modules:
            register()
        else:
            _FINDER.pending.add(name)
    if _FINDER.pending and _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)  # type: ignore[arg-type]
