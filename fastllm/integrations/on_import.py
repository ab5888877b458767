"""What other packages must know of us is told as soon as both are imported, in any order.

`attn_implementation="fastllm"`, `QuantConfig` and adapters of PEFT on packed layers work after
`import fastllm` alone, which must not import transformers or PEFT (seconds, and they are optional).
A finder waits for the files that define what is added to; whenever one of them has run, the first
time or by `importlib.reload`, which makes its registry anew, our functions go in.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def _register_transformers() -> None:
    if not hasattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel"):
        return  # it imports the other two, and comes here when it has run
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        return  # without these registries; `fastllm.patch` says so
    try:
        from .transformers import quantizer, registry

        registry.register()
        _register(quantizer)
    except (ImportError, AttributeError) as error:  # theirs must not fail for a name they renamed
        warnings.warn(
            f"fastllm does not fit transformers {transformers.__version__} ({error}): "
            'attn_implementation="fastllm" and QuantConfig stay unknown',
            stacklevel=2,
        )


def _register_peft() -> None:
    try:
        from . import peft

        _register(peft)
    except (ImportError, AttributeError) as error:
        warnings.warn(
            f"fastllm does not fit the PEFT that is installed ({error}): adapters on packed layers "
            "run PEFT's own forward",
            stacklevel=2,
        )


def _register(ours: ModuleType) -> None:
    # Where our module is what imports theirs it is not complete yet, and registers at its end.
    if hasattr(ours, "register"):
        ours.register()


# file -> what follows it. transformers' hold the registries; PEFT's chooses the layers of LoRA.
_AWAITED: Mapping[str, Callable[[], None]] = {
    "transformers.modeling_utils": _register_transformers,
    "transformers.masking_utils": _register_transformers,
    "transformers.integrations.moe": _register_transformers,
    "peft.tuners.lora.model": _register_peft,
}


class _Finder:
    """Finds nothing by itself: it lets the others find, and adds a step after `exec_module`."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        register = _AWAITED.get(name)
        if register is None:
            return None
        others = (f for f in sys.meta_path if f is not self and hasattr(f, "find_spec"))
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_FINDER = _Finder()


def wait() -> None:
    """Register now with what is loaded, with the rest when it is; idempotent."""
    loaded = (register for name, register in _AWAITED.items() if name in sys.modules)
    for register in dict.fromkeys(loaded):
        register()
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)  # type: ignore[arg-type]
