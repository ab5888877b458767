"""One `OpInfo` per op: inputs, odd and empty shapes, bench shapes, tolerance, cost.

Tests and bench iterate over `all_infos()`; an op of the registry without an entry fails a test.
The infos of `fastllm/ops/<stem>.py` are the list `INFOS` of `fastllm/testing/infos/<stem>.py`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Args = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One set of arguments: `make(generator)` builds them, fresh for every user."""

    label: str
    make: Callable[[torch.Generator], Args]
    full: bool = False  # only in `make test-full`
    gradients: bool = True  # False where the exact gradient is a difference of equal numbers


@dataclass(frozen=True, kw_only=True)
class OpInfo:
    """How one op is tested and measured.

    `exact(*args)` is the mathematically right result in float64 from the same, already rounded,
    inputs. `peer(*args)`, where torch has the op, is what error bound and bench compare with;
    elsewhere it is the op's own reference. How they are compared: `fastllm.testing.check.Judge`.
    """

    name: str
    cases: Callable[[torch.dtype], Iterator[Case]]
    exact: Callable[..., Any]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    peer: Callable[..., Any] | None = None
    grad_args: Sequence[int] = ()  # indices of the arguments whose gradients are tested
    bitwise: bool = False  # integer or copy results: native must equal exact
    bench_cases: Callable[[torch.dtype], Iterator[Case]] | None = None
    # (prepare, run): what bench times in place of `peer` is run(*prepare(*args)), prepare untimed
    bench_peer: tuple[Callable[..., Args], Callable[..., Any]] | None = None
    bytes_moved: Callable[..., int] | None = None
    flops: Callable[..., int] | None = None
    variants: tuple[str, ...] = field(
        default=()
    )  # every one needs a native CPU row and a Triton row


def all_infos() -> dict[str, OpInfo]:
    """Every OpInfo by op name."""
    from . import infos

    found: dict[str, OpInfo] = {}
    for module in pkgutil.iter_modules(infos.__path__):
        for info in importlib.import_module(f"{infos.__name__}.{module.name}").INFOS:
            found[info.name] = info
    return found


def generator(seed: int = 0) -> torch.Generator:
    """A seeded CPU generator."""
    return torch.Generator().manual_seed(seed)


def outputs(result: Any) -> tuple[Tensor, ...]:
    """An op's result as a tuple of tensors."""
    if result is None:
        return ()
    return (result,) if isinstance(result, Tensor) else tuple(result)


def ulp(dtype: torch.dtype, magnitude: float) -> float:
    """The distance between neighbours of `dtype` at `magnitude`."""
    if magnitude == 0.0:
        return torch.finfo(dtype).tiny
    exponent = torch.frexp(torch.tensor(magnitude, dtype=torch.float64)).exponent.item()
    return torch.finfo(dtype).eps * 2.0 ** (int(exponent) - 1)
