"""Running an op's case and judging it, for the tests and for `fastllm doctor`."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops.registry import Op
from .opinfo import Args, Case, OpInfo, assert_within_bound, generator, outputs


def case_arguments(info: OpInfo, case: Case) -> Args:
    """The arguments of a case; the seed depends on the case alone, so it can be run by itself."""
    return case.make(generator(zlib.crc32(f"{info.name} {case.label}".encode())))


def copies(args: Args) -> Args:
    """Fresh storage with the same strides, so that ops which write into arguments start equal."""

    def copy(arg: Any) -> Any:
        if not isinstance(arg, Tensor):
            return arg
        return torch.empty_strided(
            arg.shape, arg.stride(), dtype=arg.dtype, device=arg.device
        ).copy_(arg)

    return tuple(copy(arg) for arg in args)


def results(op: Op, fn: Callable[..., Any], args: Args) -> tuple[Tensor, ...]:
    """What a call gives: its outputs, and for a mutating op the arguments that it wrote."""
    args = copies(args)
    found = outputs(fn(*args))
    written = [
        arg
        for arg, spec in zip(args, op.overload._schema.arguments, strict=False)
        if spec.alias_info is not None and spec.alias_info.is_write
    ]
    return (*found, *written)


def assert_right(op: Op, info: OpInfo, fn: Callable[..., Any], args: Args, what: str) -> None:
    """Raise AssertionError unless `fn(*args)` is within the project's bound of the exact result."""
    got = results(op, fn, args)
    exact = results(op, info.exact, args)
    peer = results(op, info.peer or op.ref, args)
    assert len(got) == len(exact) == len(peer)
    for i, (g, e, p) in enumerate(zip(got, exact, peer, strict=True)):
        if info.bitwise or not g.dtype.is_floating_point:
            assert torch.equal(g, e.to(g.dtype)), f"{what}: output {i} differs"
        else:
            assert_within_bound(g, e, p, f"{what}: output {i}")
