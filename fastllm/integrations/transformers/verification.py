"""What `verify` found: errors beside their bounds, speed-ups, one verdict; as table and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ...tables import plain_table
from .report import Report


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One comparison of the patched model with the unpatched one.

    what: "logits", "loss", "gradients", "tokens", or the median token's logits and scores. batch:
    "random" or "real". error: the largest error of the patched model, as a share of the largest
    value that is compared. bound: what it may be. own: the unpatched model's own rounding error,
    None where it was not measured. worst: where the error is: a parameter's name, a token.
    """

    what: str
    batch: str
    error: float
    bound: float
    own: float | None = None
    worst: str = ""

    @property
    def ok(self) -> bool:
        """Whether the error is within the bound; an error that is no number is not."""
        return self.error <= self.bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Seconds of one call, medians of alternating calls; `ratio` above 1: patched is faster."""

    what: str
    original: float
    patched: float

    @property
    def ratio(self) -> float:
        """How many times as fast the patched model is."""
        return self.original / self.patched


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """The result of `verify`; `print` shows it as a table.

    model: its class. dtype: of its parameters. reference: what errors are measured against.
    report: what was replaced and what not.
    """

    model: str
    dtype: str
    reference: str
    report: Report
    checks: tuple[Check, ...]
    speeds: tuple[Speed, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether every check is within its bound."""
        return all(check.ok for check in self.checks)

    @property
    def exit_code(self) -> int:
        """For scripts: 0 if everything is equal within its bound, else 1."""
        return 0 if self.ok else 1

    def as_dict(self) -> dict[str, Any]:
        """Everything, of types that JSON has."""
        return {
            "model": self.model,
            "dtype": self.dtype,
            "reference": self.reference,
            "ok": self.ok,
            "replaced": {
                part: {"replaced": done, "of": total}
                for part, (done, total) in self.report.counts().items()
            },
            "checks": [asdict(check) | {"ok": check.ok} for check in self.checks],
            "speeds": [asdict(speed) | {"ratio": speed.ratio} for speed in self.speeds],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        parts = [f"{part} {done} of {n}" for part, (done, n) in self.report.counts().items()]
        lines = [
            f"{self.model}, {self.dtype}; replaced: {', '.join(parts) or 'nothing'}",
            f"errors are shares of the largest value, measured against {self.reference}",
            "",
            *plain_table(
                ("check", "batch", "error", "bound", "own error", "", "where it is largest"),
                [_cells(check) for check in self.checks],
            ),
        ]
        if self.speeds:
            rows = [
                (s.what, _time(s.original), _time(s.patched), f"{s.ratio:.2f}x")
                for s in self.speeds
            ]
            lines += ["", *plain_table(("speed", "unpatched", "patched", "speed-up"), rows)]
        wrong = [f"{check.what} ({check.batch})" for check in self.checks if not check.ok]
        verdict = f"NOT equal: {', '.join(wrong)}" if wrong else "equal within the bounds"
        return "\n".join([*lines, "", *self.notes, verdict])

    __repr__ = __str__


def _cells(check: Check) -> tuple[str, ...]:
    own = "" if check.own is None else f"{check.own:.1e}"
    verdict = "ok" if check.ok else "WRONG"
    return (
        check.what, check.batch, f"{check.error:.1e}", f"{check.bound:.1e}", own, verdict,
        check.worst,
    )  # fmt: skip


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
