"""Honest timing: everything that is compared alternates in one run, and medians count.

Clock speed, neighbours on the machine and caches change from second to second; two runs one after
the other measure that as well. A product of one weight is timed over rotating copies of at least
128 MB, since a weight that stays in the cache is not what a model sees.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

ROTATION_BYTES = 128 << 20
_PROBE_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}  # far beyond the caches
_LONG_SECONDS = 0.5  # one call of such a function warms it up
_SAMPLE_SECONDS = 2e-3  # a shorter sample is repeated inside one reading of the clock

Function = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Samples:
    """Seconds of one function, one number per round (or what the function itself returned)."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle value: what tables show."""
        return statistics.median(self.values)

    @property
    def best(self) -> float:
        """The smallest value: the least disturbed round."""
        return min(self.values)


def alternate(
    functions: Mapping[str, Function],
    *,
    seconds: float = 1.0,
    min_rounds: int = 5,
    max_rounds: int = 1000,
    device: str = "cpu",
    own_clock: bool = False,
) -> dict[str, Samples]:
    """Time several functions in turn: each round runs all of them, every other round backwards.

    Args:
        functions: name -> function without arguments, called once or twice before timing starts.
        seconds: time to spend on all of them together; `min_rounds` are made even if it is over.
        min_rounds, max_rounds: bounds on the number of rounds.
        device: "cuda" waits for the device around every sample.
        own_clock: the functions return their sample (seconds, bytes, ...) themselves.

    Returns:
        name -> samples.
    """
    inner = {
        name: 1 if own_clock else _warm_up(function, device) for name, function in functions.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    start = time.perf_counter()
    for round in range(max_rounds):
        if round >= min_rounds and time.perf_counter() - start > seconds:
            break
        for name in order if round % 2 == 0 else reversed(order):
            function = functions[name]
            sample = float(function()) if own_clock else _time(function, inner[name], device)
            samples[name].append(sample)
    return {name: Samples(tuple(values)) for name, values in samples.items()}


def _warm_up(function: Function, device: str) -> int:
    """Call it once, twice if it is short; returns how many calls make one sample."""
    if _time(function, 1, device) > _LONG_SECONDS:
        return 1
    once = _time(function, 1, device)
    return max(1, min(1000, int(_SAMPLE_SECONDS / max(once, 1e-7))))


def _time(function: Function, count: int, device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        function()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / count


def rotation(make: Callable[[], Any], nbytes: int, total: int = ROTATION_BYTES) -> Iterator[Any]:
    """An endless cycle over copies of a thing that together take at least `total` bytes.

    Args:
        make: builds one copy.
        nbytes: the size of one copy; copies beyond 4096 are not made.
        total: bytes to spread over; more than any cache of the machine.
    """
    count = max(2, min(4096, -(-total // max(1, nbytes))))
    return itertools.cycle([make() for _ in range(count)])


def _best_rate(function: Function, work: float, device: str, rounds: int = 12) -> float:
    function()
    return work / min(_time(function, 1, device) for _ in range(rounds))


class ReadProbe(NamedTuple):
    """A function that does nothing but read `nbytes` of memory."""

    nbytes: int
    read: Function


@functools.cache
def read_probe(device: str = "cpu") -> ReadProbe:
    """The faster of two reductions over much memory, which stays allocated."""
    # Ones, not zeros: untouched zero pages are one page, and it stays in the cache.
    x = torch.ones(_PROBE_BYTES[torch.device(device).type] // 8, dtype=torch.int64, device=device)
    y = x.view(torch.float32)
    probes = [
        ReadProbe(x.nbytes, x.sum),
        ReadProbe(2 * x.nbytes, functools.partial(torch.dot, y, y.flip(0))),
    ]
    return max(probes, key=lambda probe: _best_rate(probe.read, probe.nbytes, device))


@functools.cache
def matmul_peak(kind: str, device: str = "cpu") -> float:
    """Operations a second of torch's best square product: what the machine can do.

    Args:
        kind: "bf16" or "f32"; "int8" takes torch's int8 product.
        device: "cpu" or "cuda".
    """
    best = 0.0
    for size in (1024, 2048) if device == "cpu" else (4096, 8192):
        if kind == "int8":
            a = torch.randint(-8, 8, (size, size), dtype=torch.int8, device=device)
            product = functools.partial(torch._int_mm, a, a if device == "cpu" else a.t())
        else:
            dtype = torch.bfloat16 if kind == "bf16" else torch.float32
            a = torch.randn(size, size, device=device).to(dtype)
            product = functools.partial(torch.matmul, a, a.t())
        best = max(best, _best_rate(product, 2.0 * size**3, device, rounds=6))
    return best


def timed(function: Function, device: str = "cpu") -> Function:
    """A function with its own clock: it calls `function` and returns the seconds."""
    return functools.partial(_time, function, 1, device)


def rounded(value: float, digits: int = 4) -> float:
    """`value` to so many significant digits: what a measurement is worth."""
    return float(f"{value:.{digits}g}")


def geometric_mean(values: Sequence[float]) -> float:
    """The mean of ratios."""
    return statistics.geometric_mean(values)
