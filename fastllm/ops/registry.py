"""Ops: one definition, an explicit ordered table of implementations, one way to dispatch.

`Op` holds an op's schema, reference, fake and backward; `Op.impl` adds a row to its backend table.
A call takes one of three roads, decided here once:

- traced (torch.compile, FakeTensor, a tensor subclass, a dispatch mode, functorch): the torch
  library's op, `torch.ops.fastllm.<op>`; differentiation by torch.func or in forward mode raises;
- eager with a gradient to record: one generic `autograd.Function` made from the op's backward;
- eager without: the first row of the table that supports the arguments, called directly.

`Library.define` + `impl` is used because `torch.library.custom_op` costs 3 to 9 times more per
call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter

from .. import _C

LIBRARY = torch.library.Library("fastllm", "DEF")
OPS: dict[str, Op] = {}
DEVICES = ("cpu", "cuda")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # of ops that take halves too
_PLAIN_TYPES = frozenset({int, float, bool, str, type(None), torch.dtype})
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch = torch._C._functorch
_functorch_level = _functorch.maybe_current_level
_jit_tracing = torch._C._get_tracing_state  # torch.jit.trace records torch ops, nothing else
# What a choice needs of an Impl: function, variants, when.
_Row = tuple[Callable[..., Any], frozenset[str], Callable[..., bool] | None]

_batch_invariant = False


def is_eager(x: Tensor) -> bool:
    """Whether x is plain and no tracer, dispatch mode, functorch or forward mode sees a call."""
    return (
        not is_compiling()
        and type(x) is Tensor
        and not _dispatch_modes()
        and not _functorch_level()
        and not _jit_tracing()
        and forward_ad._current_level < 0
    )


def is_transformed() -> bool:
    """Whether torch.func (grad, vmap, jvp) or forward-mode differentiation runs this call.

    Our gradients are made for backward passes alone: ops raise where they would be differentiated
    there, and code that has other operations at hand takes those.
    """
    return not is_compiling() and (bool(_functorch_level()) or forward_ad._current_level >= 0)


def _refuse_derivatives(name: str, args: tuple[Any, ...]) -> None:
    """Raise if torch.func or forward mode differentiates with respect to one of `args`.

    An op would otherwise count as a constant there: tangents and gradients of 0, silently.
    """
    if any(isinstance(arg, Tensor) and _is_differentiated(arg) for arg in args):
        raise NotImplementedError(
            f"fastllm.ops.{name} has no derivatives under torch.func (grad, vjp, jvp, jacrev, "
            "jacfwd) or in forward mode: use backward() or torch.autograd.grad, or PyTorch's own "
            "operations"
        )


def _is_differentiated(x: Tensor) -> bool:
    # Each level of torch.func wraps a tensor; one that vmap wrapped has its tangent further in.
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_gradtrackingtensor(x) and (
            (x.requires_grad and torch.is_grad_enabled()) or _has_tangent(x)
        ):
            return True
        x = _functorch.get_unwrapped(x)
    return _has_tangent(x)


def _has_tangent(x: Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def set_batch_invariant(enabled: bool) -> None:
    """Make GPU results independent of batch, chunking and paging (they always are on the CPU)."""
    global _batch_invariant
    _batch_invariant = bool(enabled)


def batch_invariant() -> bool:
    """Whether GPU kernels must use their batch-invariant form."""
    return _batch_invariant


@dataclass(frozen=True)
class Impl:
    """One row of a backend table: a name, the function, and what it declares to support."""

    name: str
    device: str
    fn: Callable[..., Any]
    dtypes: frozenset[torch.dtype]  # of the op's first floating argument, else of its first tensor
    variants: frozenset[str]  # e.g. packed formats or activation modes; empty: the op has none
    when: Callable[..., bool] | None
    opt_in: bool


class NoImplementation(RuntimeError):
    """No row of the backend table supports these arguments."""


class Op:
    """An op of the package; call it like a function.

    Args:
        schema: torch schema without the namespace: `"swiglu(Tensor gate, Tensor up) -> Tensor"`.
        ref: plain PyTorch definition of right, rounding points included; the last row of every
            table.
        fake: output shapes and dtypes from input shapes (defaults to the reference, which is
            shape-exact).
        backward: `(ctx, *grad_outputs) -> gradients of every input`; `None`: not differentiable.
        setup_context: stores on ctx what backward needs; `(ctx, inputs, output)`.
        variant: `(*args) -> str`: which variant of the table these arguments need.
    """

    def __init__(
        self,
        schema: str,
        ref: Callable[..., Any],
        *,
        fake: Callable[..., Any] | None = None,
        backward: Callable[..., Any] | None = None,
        setup_context: Callable[..., None] | None = None,
        variant: Callable[..., str] | None = None,
    ) -> None:
        self.name = schema.split("(", 1)[0]
        self.schema = schema
        self.ref = ref
        self.backward = backward
        self.setup_context = setup_context
        self.variant = variant
        self.tables: dict[str, list[Impl]] = {device: [] for device in DEVICES}
        self._rows: dict[tuple[str, torch.dtype], tuple[_Row, ...]] = {}
        OPS[self.name] = self
        LIBRARY.define(schema)
        LIBRARY.impl(self.name, self._run, "CPU")
        LIBRARY.impl(self.name, self._run, "CUDA")
        qualified = f"fastllm::{self.name}"
        torch.library.register_fake(qualified, fake or ref, lib=LIBRARY)
        if backward is not None:
            torch.library.register_autograd(
                qualified, backward, setup_context=setup_context, lib=LIBRARY
            )
        self.overload = getattr(torch.ops.fastllm, self.name).default
        self.mutable = self.overload._schema.is_mutable
        self._function = _autograd_function(self) if backward is not None else None

    def impl(
        self,
        name: str,
        device: str,
        *,
        dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
        variants: Sequence[str] = (),
        when: Callable[..., bool] | None = None,
        opt_in: bool = False,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Add a row to the table of `device`: rows are tried in the order in which they are added.

        `dtypes` and `variants` declare support; `when(*args)` may refuse particular arguments.
        An `opt_in` row is listed and tested but never chosen (a kernel without a measured result).
        """

        def add(fn: Callable[..., Any]) -> Callable[..., Any]:
            row = Impl(name, device, fn, frozenset(dtypes), frozenset(variants), when, opt_in)
            self.tables[device].append(row)
            self._rows.clear()
            return fn

        return add

    def select(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        """The implementation that serves `args`: the first row that supports them, else `ref`."""
        first = None
        for arg in args:
            if isinstance(arg, Tensor):
                if arg.dtype.is_floating_point:
                    return self._choose(arg, args)
                first = arg if first is None else first
        return self._reference(args) if first is None else self._choose(first, args)

    def _choose(self, first: Tensor, args: tuple[Any, ...]) -> Callable[..., Any]:
        # `first` is the first floating tensor of args, or the first one of an op on integers. The
        # rows left after device and dtype are cached: this runs in every eager call.
        device = "cpu" if first.is_cpu else first.device.type
        dtype = first.dtype
        rows = self._rows.get((device, dtype))
        if rows is None:
            rows = self._rows[device, dtype] = tuple(
                (row.fn, row.variants, row.when)
                for row in self.tables.get(device, ())
                if not row.opt_in and dtype in row.dtypes
            )
        variant = self.variant(*args) if self.variant is not None else None
        for fn, variants, when in rows:
            if (variant is None or variant in variants) and (when is None or when(*args)):
                return fn
        return self._reference(args)

    def _reference(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        if _C.recording():
            raise NoImplementation(
                f"a graph cannot record fastllm.ops.{self.name}: it has no native kernel for "
                f"({', '.join(map(_describe, args))})"
            )
        return self.ref

    def __call__(self, *args: Any) -> Any:
        if is_compiling():
            return self.overload(*args)
        transformed = _functorch_level() or forward_ad._current_level >= 0
        if transformed:
            _refuse_derivatives(self.name, args)
        if transformed or _dispatch_modes() or _jit_tracing():
            return self.overload(*args)
        first = None
        floating = needs_grad = False
        for arg in args:
            kind = type(arg)
            if kind is Tensor or kind is Parameter:
                if not floating and (first is None or arg.dtype.is_floating_point):
                    first, floating = arg, arg.dtype.is_floating_point
                if arg.requires_grad:
                    needs_grad = True
            elif kind not in _PLAIN_TYPES and isinstance(arg, Tensor):
                return self.overload(*args)
        if needs_grad and torch.is_grad_enabled():
            if self._function is not None:
                return self._function.apply(*args)
            if not self.mutable:
                raise RuntimeError(
                    f"fastllm.ops.{self.name} has no backward: call it under torch.no_grad(), "
                    "or detach its inputs"
                )
        fn = self._choose(first, args) if first is not None else self._reference(args)
        return fn(*args)

    def _run(self, *args: Any) -> Any:
        return self.select(args)(*args)

    def __repr__(self) -> str:
        return f"Op({self.schema})"


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype in which a backward should give the gradient of an input of its op.

    A parameter's `grad_dtype`, where its owner set one: gradients of bfloat16 parameters that are
    added up in float32 are then not rounded on the way. Otherwise the dtype of the input.
    """
    wanted = parameter.grad_dtype if parameter.is_leaf else None
    return parameter.dtype if wanted is None else wanted


def _describe(arg: Any) -> str:
    if isinstance(arg, Tensor):
        return f"{_short(arg.dtype)}{list(arg.shape)} strides {list(arg.stride())} on {arg.device}"
    return repr(arg)


def _autograd_function(op: Op) -> type[torch.autograd.Function]:
    """The eager twin of `register_autograd`, made from the same backward (21 us a call, not 43)."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = op._run(*args)
            if op.setup_context is not None:
                op.setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            assert op.backward is not None
            return op.backward(ctx, *grads)

    Function.__name__ = f"{op.name}_function"
    return Function


def backend_table() -> list[dict[str, str]]:
    """Every row of every table, in the order of choice, for `fastllm doctor` and the tests."""
    rows = []
    for op in OPS.values():
        for device in DEVICES:
            for impl in op.tables[device]:
                rows.append(
                    {
                        "op": op.name,
                        "device": device,
                        "backend": impl.name + (" (opt-in)" if impl.opt_in else ""),
                        "dtypes": " ".join(sorted(_short(d) for d in impl.dtypes)),
                        "variants": " ".join(sorted(impl.variants)),
                    }
                )
            rows.append(
                {
                    "op": op.name,
                    "device": device,
                    "backend": "reference",
                    "dtypes": "any",
                    "variants": "any",
                }
            )
    return rows


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
