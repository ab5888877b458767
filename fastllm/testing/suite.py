"""Benchmark suites: a case knows what to run and against whom; running it gives one row.

A suite is a module `bench/bench_<name>.py` with `SUITE`, `SECONDS` (how long it takes, in full) and
`cases(settings)`. The same cases are tests of pytest-benchmark and rows of `fastllm bench`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from . import machine
from .timing import alternate, matmul_peak, read_probe, rounded, timed

OURS = "fastllm"
_PROBE = "reading memory"
TIME_UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6}
LESS_IS_BETTER = {*TIME_UNITS, "MB"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the user asked for."""

    quick: bool = False
    model: str = "smollm2"
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a case runs, made when it runs.

    functions: name -> function; `OURS` first, then the peers.
    unit: of the row: a time ("us", "ms", "s"), "MB", or a rate such as "tok/s".
    amount: for a rate, how much of the unit's numerator one call does.
    own_clock: the functions return their own sample: seconds, or bytes for "MB".
    nbytes, flops, kind: what the call must read and compute at least, for the bound; all zero
        where there is none.
    notes: settings of the peers, to print.
    """

    functions: Mapping[str, Callable[[], Any]]
    unit: str = "us"
    amount: float = 1.0
    own_clock: bool = False
    nbytes: float = 0.0
    flops: float = 0.0
    kind: str = "bf16"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchCase:
    """One measurement of a suite. `seconds` is what timing may take, beyond the least rounds."""

    suite: str
    label: str
    dtype: str
    make: Callable[[], Work]
    device: str = "cpu"
    seconds: float = 1.0
    min_rounds: int = 5

    def __str__(self) -> str:
        return f"{self.suite}: {self.label} {self.dtype}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of a result file. A ratio above 1 means that fastllm is better."""

    suite: str
    case: str
    device: str
    dtype: str
    unit: str
    value: float
    peers: dict[str, float] = field(default_factory=dict)
    ratio: dict[str, float] = field(default_factory=dict)
    bound: float | None = None
    percent_of_bound: float | None = None
    commit: str = ""


def run_cases(
    cases: Iterator[BenchCase], report: Callable[[BenchCase, Row, Work], None]
) -> list[Row]:
    """Run cases one after the other, reporting each row as it is made."""
    commit = machine.commit()
    rows = []
    for case in cases:
        work = case.make()
        row = run_case(case, work, commit)
        report(case, row, work)
        rows.append(row)
    return rows


def run_case(case: BenchCase, work: Work, commit: str) -> Row:
    """Measure one case: the medians of alternating rounds.

    Where the bound is of bytes, a probe that only reads takes part in the rounds: what memory gives
    changes with the neighbours on the machine, by a half within minutes. It stands behind ours: who
    ends a round begins the next, with what the caches still hold, and that is ours and the last
    peer in turn.
    """
    functions = dict(work.functions)
    probe = read_probe(case.device) if work.nbytes else None
    if probe is not None:
        read = timed(probe.read, case.device) if work.own_clock else probe.read
        functions = {OURS: work.functions[OURS], _PROBE: read, **work.functions}
    samples = alternate(
        functions,
        seconds=case.seconds,
        min_rounds=case.min_rounds,
        device=case.device,
        own_clock=work.own_clock,
    )
    bound = work.flops / matmul_peak(work.kind, case.device) if work.flops else 0.0
    if probe is not None:
        bound = max(bound, work.nbytes * samples.pop(_PROBE).median / probe.nbytes)
    values = {name: _in_unit(s.median, work) for name, s in samples.items()}
    ours = values.pop(OURS)
    sign = 1 if work.unit in LESS_IS_BETTER else -1
    row = Row(
        suite=case.suite,
        case=case.label,
        device=machine.device_name(case.device),
        dtype=case.dtype,
        unit=work.unit,
        value=rounded(ours),
        peers={name: rounded(value) for name, value in values.items()},
        ratio={name: rounded((value / ours) ** sign, 3) for name, value in values.items()},
        commit=commit,
    )
    return _with_bound(row, _in_unit(bound, work)) if bound else row


def _in_unit(sample: float, work: Work) -> float:
    if work.unit in TIME_UNITS:
        return sample * TIME_UNITS[work.unit]
    return sample / 1e6 if work.unit == "MB" else work.amount / sample


def _with_bound(row: Row, bound: float) -> Row:
    share = bound / row.value if row.unit in LESS_IS_BETTER else row.value / bound
    return Row(**{**asdict(row), "bound": rounded(bound), "percent_of_bound": rounded(100 * share)})


def benchmark_case(case: BenchCase, benchmark: Any) -> None:
    """Time our function of a case with pytest-benchmark's fixture; the row is its extra info."""
    work = case.make()
    benchmark.group = case.suite
    benchmark(work.functions[OURS])
    benchmark.extra_info.update(asdict(run_case(case, work, machine.commit())))
