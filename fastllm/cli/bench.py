"""`fastllm bench`: measure suites beside their peers; a table on screen, rows in a JSON file."""

from __future__ import annotations

import importlib
import json
import pkgutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from .console import heading, note, table
from .parsing import command_parser, use_threads

if TYPE_CHECKING:
    from ..testing.suite import BenchCase, Row, Settings, Work

DESCRIPTION = """
Measures fastllm beside PyTorch, transformers and llama.cpp (what is installed of them). Ours and
peers alternate in one run, medians count, and a ratio above 1 means that fastllm is better; lines
that we lose stay. "bound" is what the machine could do at most, measured in the same run: its
read bandwidth or the peak of torch's matrix product, whichever is the tighter.

Without a suite, lists the suites and how long they take; `all` runs every one of them. The models
random-135m and random-1b (and random-1b-q4_1 and so on) are made of random weights on the spot.
"""

EXAMPLES = """
fastllm bench
fastllm bench decode prefill --quick
fastllm bench linear --json linear.json
fastllm bench decode --model ./model.gguf
fastllm bench decode --model random-1b --device cuda
fastllm bench train --case "135M full"
fastllm bench moe --plot experts.png
fastllm bench all --json bench/results/cpu.json
"""


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = command_parser("bench", DESCRIPTION, EXAMPLES)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="names of suites, or all")
    parser.add_argument("--quick", action="store_true", help="fewer cases, shorter timing")
    parser.add_argument(
        "--case", metavar="TEXT", default="", help="only the cases whose names hold TEXT"
    )
    parser.add_argument(
        "--model", default="smollm2", help="of end-to-end suites (default: smollm2)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads, ours and peers'")
    parser.add_argument("--json", metavar="FILE", default=None, help="write the rows to FILE")
    parser.add_argument(
        "--plot", metavar="FILE", default=None, help="draw the picture of a suite that has one"
    )
    options = parser.parse_args(list(argv))
    suites = find_suites()
    if not options.suites:
        rows = [[name, s.SECONDS, s.TITLE] for name, s in suites.items()]
        table(["suite", "seconds", "what it measures"], rows, right=["seconds"])
        return 0
    names = list(suites) if options.suites == ["all"] else options.suites
    for name in names:
        if name not in suites:
            raise ValueError(f"no suite named {name!r}; there are {', '.join(suites)}")
    pictures = [suites[name] for name in names if hasattr(suites[name], "plot")]
    if options.plot and not pictures:
        have = ", ".join(name for name, suite in suites.items() if hasattr(suite, "plot"))
        raise ValueError(f"--plot: of the suites only {have} has a picture")
    from ..testing.suite import Settings

    use_threads(options.threads)
    settings = Settings(quick=options.quick, model=options.model, device=options.device)
    measured: list[Row] = []

    def keep(row: Row) -> None:
        # after every row: a peer that fails after minutes takes nothing with it
        measured.append(row)
        if options.json:
            write_rows(Path(options.json), measured)

    for name in names:
        measure(suites[name], settings, keep, options.case)
    if not measured:
        raise ValueError(f"--case {options.case!r}: no case of {', '.join(names)} holds that text")
    if options.json:
        print(f"{len(measured)} rows written to {options.json}")
    if options.plot and not pictures[0].plot(measured, Path(options.plot)):
        raise ValueError("--plot: the cases of the picture are not among those that ran")
    return 0


def find_suites() -> dict[str, ModuleType]:
    """The installed suites by name. Raises ModuleNotFoundError naming the extra without pytest."""
    if find_spec("pytest") is None:  # the suites are its tests too
        raise ModuleNotFoundError(
            "the benchmark suites need pytest: pip install 'fastllm-engine[bench]'"
        )
    import fastllm.bench

    found = {}
    for module in pkgutil.iter_modules(fastllm.bench.__path__):
        if module.name.startswith("bench_"):
            suite = importlib.import_module(f"fastllm.bench.{module.name}")
            found[suite.SUITE] = suite
    return found


def measure(
    suite: ModuleType, settings: Settings, keep: Callable[[Row], None], text: str = ""
) -> None:
    """Run a suite's cases whose names hold `text`, giving each row to `keep` as it is measured, and
    print the table.
    """
    from ..testing import machine
    from ..testing.suite import run_cases

    notes: dict[str, None] = {}
    start = time.perf_counter()

    def report(case: BenchCase, row: Row, work: Work) -> None:
        keep(row)
        note(f"  {case}: {row.value:g} {row.unit}")
        notes.update(dict.fromkeys(work.notes))

    heading(f"{suite.SUITE}: {suite.TITLE}")
    note(machine.device_name(settings.device))
    cases = (case for case in suite.cases(settings) if text in case.label)
    rows = run_cases(cases, report)
    if not rows:
        return
    show(rows)
    summary = suite.summary(rows) if hasattr(suite, "summary") else []
    for line in (*notes, *summary):
        print(f"  {line}")
    print(f"  {time.perf_counter() - start:.0f} s")


def show(rows: Sequence[Row]) -> None:
    """A table of rows: ours, each peer with its ratio, percent of the bound."""
    peers = list(dict.fromkeys(name for row in rows for name in row.peers))
    ratios = [f"vs {name}" for name in peers]
    columns = ["case", "dtype", "fastllm", *(c for p in zip(peers, ratios, strict=True) for c in p)]
    lines = []
    for row in rows:
        cells: list[object] = [row.case, row.dtype, f"{row.value:g} {row.unit}"]
        for name in peers:
            known = name in row.peers
            cells += [f"{row.peers[name]:g}", f"{row.ratio[name]:.3g}x"] if known else ["", ""]
        share = row.percent_of_bound
        lines.append([*cells, f"{share:.0f}%" if share is not None else ""])
    table([*columns, "of bound"], lines, right=[*columns[2:], "of bound"])


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as a JSON list, one row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(row), ensure_ascii=False) for row in rows]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
