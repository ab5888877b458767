"""`fastllm doctor`: what this machine offers, what was chosen, and whether every op is right."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .console import facts, heading, human_bytes, table
from .parsing import command_parser

DESCRIPTION = """
Shows hardware, the instruction-set level that was found and chosen, threads and their
runtime, library versions and the backend table, and runs the first cases of every op
against float64.

The exit status is 0 if every op is within its error bound, 1 otherwise. FASTLLM_ISA=avx2
(or generic, avx512, avx512_bf16) forces a level: results at different levels may differ by
rounding.
"""

EXAMPLES = """
fastllm doctor
fastllm doctor --short
fastllm doctor --json doctor.json
FASTLLM_ISA=generic fastllm doctor
"""

_WIDTH = 100  # of lines that no terminal wraps
_BACKEND = ("device", "backend", "dtypes", "variants")
_MANY = 24  # variants that are still written one by one


def run(argv: Sequence[str]) -> int:
    """Run the command; 1 if an op is wrong on this machine."""
    parser = command_parser("doctor", DESCRIPTION, EXAMPLES)
    parser.add_argument("--short", action="store_true", help="leave the backend table out")
    parser.add_argument("--json", metavar="FILE", default=None, help="write everything to FILE too")
    options = parser.parse_args(list(argv))
    report = examine()
    show(report, short=options.short)
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if all(not outcome["problem"] for outcome in report["self_test"]) else 1


def examine() -> dict[str, Any]:
    """Everything that the command knows, as plain data."""
    from .. import _C
    from ..ops.quant_paths import quant_paths
    from ..ops.registry import backend_table
    from ..testing import machine
    from ..testing.selftest import self_test

    total, available = machine.memory()
    return {
        "processor": machine.processor(),
        "cores": machine.usable_cores(),
        "memory_bytes": total,
        "memory_available_bytes": available,
        "accelerators": machine.accelerators(),
        "features": _C.cpu_features(),
        "isa_found": _C.isas(),
        "isa": _C.isa(),
        "isa_forced_by": os.environ.get("FASTLLM_ISA", ""),
        "threads": _C.num_threads(),
        "thread_runtime": _C.thread_runtime(),
        "core": str(_C.__file__),
        "versions": machine.versions(),
        "self_test": [asdict(outcome) for outcome in self_test()],
        "backends": backend_table(),
        "quant_paths": quant_paths(),
    }


def show(report: dict[str, Any], *, short: bool) -> None:
    """Print a report of `examine`."""
    from ..ops.quant_paths import MEASURED

    heading("Machine")
    forced = report["isa_forced_by"]
    chosen = report["isa"] + (f" (forced by FASTLLM_ISA={forced})" if forced else "")
    facts(
        [
            ("processor", f"{report['processor']}, {report['cores']} cores"),
            ("features", report["features"]),
            (
                "memory",
                f"{human_bytes(report['memory_bytes'])}, "
                f"{human_bytes(report['memory_available_bytes'])} available",
            ),
            ("GPU", ", ".join(report["accelerators"]) or "none that torch can use"),
            ("ISA levels", f"{' '.join(report['isa_found'])}; chosen: {chosen}"),
            ("threads", f"{report['threads']}, {report['thread_runtime']}"),
            ("core", report["core"]),
            ("versions", ", ".join(f"{k} {v}" for k, v in report["versions"].items())),
        ]
    )
    if not short:
        heading("Backends (the first row that supports the arguments serves a call)")
        table(["op", *_BACKEND], _backend_rows(report["backends"]), width=_WIDTH)
        heading("Quantized products on the CPU")
        print(f"measured {MEASURED}")
        columns = ["modes", "rows", "path", "measured"]
        table(columns, [[row[c] for c in columns] for row in report["quant_paths"]], width=_WIDTH)
    heading("Self-test against float64")
    _show_self_test(report["self_test"])


def _backend_rows(table: Sequence[dict[str, str]]) -> list[list[str]]:
    """The backend table, ops with equal rows together."""
    rows: dict[str, list[tuple[str, ...]]] = {}
    for row in table:
        cells = (*(row[column] for column in _BACKEND[:-1]), _brief(row["variants"]))
        rows.setdefault(row["op"], []).append(cells)
    ops: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for op, own in rows.items():
        ops.setdefault(tuple(own), []).append(op)
    return [
        [" ".join(names) if i == 0 else "", *cells]
        for own, names in ops.items()
        for i, cells in enumerate(own)
    ]


def _brief(variants: str) -> str:
    """Variants, by what they are made of where there are many; --json has every one."""
    words = variants.split()
    if len(words) <= _MANY:
        return variants
    formats = sorted({part for word in words for part in word.partition("/")[0].split("+")})
    modes = sorted({word.partition("/")[2] for word in words} - {""})
    pairs = " in pairs" if "+" in variants else ""
    text = f"{len(words)} of {' '.join(formats)}{pairs}"
    return f"{text}, modes {' '.join(modes)}" if modes else text


def _show_self_test(outcomes: Sequence[dict[str, Any]]) -> None:
    rows = [
        [
            outcome["op"],
            " ".join(outcome["backends"]),
            outcome["cases"],
            f"{1e3 * outcome['seconds']:.0f}",
            outcome["problem"] or "ok",
        ]
        for outcome in outcomes
    ]
    table(["op", "served by", "cases", "ms", "result"], rows, right=["cases", "ms"])
    wrong = [outcome["op"] for outcome in outcomes if outcome["problem"]]
    print(f"{len(wrong)} ops are wrong: {', '.join(wrong)}" if wrong else "Every op is right here.")
