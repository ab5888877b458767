"""`attn_implementation="fastllm"` is known as soon as both packages are imported, in any order.

`import fastllm` must not import transformers (seconds, and it is optional). A finder waits for
transformers' file of models; when that has run, our functions go into its registries.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_AWAITED = "transformers.modeling_utils"  # defines the attention interface, imports the other two


class _Finder:
    """Finds nothing by itself: it lets the others find, and adds a step after `exec_module`."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _AWAITED:
            return None
        stop_waiting()
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_FINDER = _Finder()


def wait() -> None:
    """Register now if transformers' models are loaded, else when they are; idempotent."""
    if _AWAITED in sys.modules:
        _register()
    elif _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)  # type: ignore[arg-type]


def stop_waiting() -> None:
    """Take the finder away."""
    if _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)  # type: ignore[arg-type]


def _register() -> None:
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        return  # without these registries; `fastllm.patch` says so
    from .transformers import quantizer, registry

    registry.register()
    quantizer.register()
