"""Running an op's case and judging it, for the tests and for `fastllm doctor`."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.registry import Op
from .opinfo import Args, Case, OpInfo, generator, outputs, ulp

DRAWS = 8  # of a case, at most, to know its peer's error


def case_arguments(info: OpInfo, case: Case, draw: int = 0) -> Args:
    """The arguments of a case; the seed depends on the case alone, so it can be run by itself.

    Args:
        info: the op.
        case: one of its cases.
        draw: 0 for the arguments that are tested; others have the same shapes and other values.
    """
    label = f"{info.name} {case.label}" + (f" draw {draw}" if draw else "")
    return case.make(generator(zlib.crc32(label.encode())))


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
        if isinstance(arg, Tensor) and spec.alias_info is not None and spec.alias_info.is_write
    ]
    return (*found, *written)


def _largest_error(got: Tensor, exact: Tensor) -> float:
    if not exact.numel():
        return 0.0
    error = (got.double() - exact).abs()
    return error.where(got != exact, 0.0).max().item()  # equal infinities have no distance


class Judge:
    """The project's bound for one case: raises AssertionError where a result is outside.

    An output may be off by twice its peer's largest error over `DRAWS` draws of the case, and by
    one ulp of its largest value in any case. One draw of a few dozen outputs says little of the
    peer: its largest error varies by a factor of 2 and more from draw to draw and can be 0, so a
    result as good as the peer's would often fail by the peer's luck.

    Draws after the first are made only when a result needs them; the verdict is the same.

    Args:
        draw: gives, for the number of a draw, the float64 results and the peer's.
        bitwise: outputs must equal the exact ones, as integer outputs always must.
        draws: how many draws tell the peer's error, at most; few, dependent numbers need more.
    """

    def __init__(
        self,
        draw: Callable[[int], tuple[Sequence[Tensor], Sequence[Tensor]]],
        *,
        bitwise: bool = False,
        draws: int = DRAWS,
    ) -> None:
        self._draw, self._bitwise, self._draws, self._most = draw, bitwise, 1, draws
        self._exact, peer = draw(0)
        self._peer_errors = [_largest_error(p, e) for p, e in zip(peer, self._exact, strict=True)]

    def check(self, got: Sequence[Tensor], what: str) -> None:
        """Raise AssertionError, naming `what`, unless every output of the first draw is right."""
        for i, (g, e) in enumerate(zip(got, self._exact, strict=True)):
            name = f"{what}: output {i}"
            assert g.shape == e.shape, f"{name}: shape {tuple(g.shape)}, want {tuple(e.shape)}"
            if self._bitwise or not g.dtype.is_floating_point:
                assert torch.equal(g, e.to(g.dtype)), f"{name} differs"
            elif g.numel():
                self._check_error(i, g, e, name)

    def _check_error(self, i: int, got: Tensor, exact: Tensor, name: str) -> None:
        error = _largest_error(got, exact)
        least = ulp(got.dtype, exact.abs().where(exact.isfinite(), 0.0).max().item())
        bound = max(2.0 * self._peer_errors[i], least)
        while error > bound and self._draws < self._most:
            self._draw_again()
            bound = max(2.0 * self._peer_errors[i], least)
        assert error <= bound, f"{name}: error {error:.3e} above the bound {bound:.3e}"

    def _draw_again(self) -> None:
        exact, peer = self._draw(self._draws)
        self._draws += 1
        errors = [_largest_error(p, e) for p, e in zip(peer, exact, strict=True)]
        self._peer_errors = [max(pair) for pair in zip(self._peer_errors, errors, strict=True)]


def case_judge(op: Op, info: OpInfo, case: Case) -> Judge:
    """A judge of what implementations of an op give for a case."""

    def draw(number: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        args = case_arguments(info, case, number)
        return results(op, info.exact, args), results(op, info.peer or op.ref, args)

    return Judge(draw, bitwise=info.bitwise)
