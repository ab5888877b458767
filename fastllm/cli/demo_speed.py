"""The demo's measurements: generation, prompts and training steps beside their peers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import bench
from .console import note
from .demo_stage import Part, Setting

if TYPE_CHECKING:
    from ..testing.suite import BenchCase, Row, Work

# Training steps to measure: models of the shapes that the trainings have, and batches like theirs.
STEPS = (("3M", "full", 7, 512), ("135M", "lora", 2, 128))


def speed(setting: Setting) -> Part:
    """Measure ours and the peers in turn on the same model; rows.json and speed.png."""
    from ..bench.bench_train import step_case
    from ..testing.suite import Settings, run_cases

    device = setting.options.device or "cpu"
    settings = Settings(quick=True, model=setting.model, device=device)
    suites = bench.find_suites()
    firsts = (itertools.islice(suites[name].cases(settings), 1) for name in ("prefill", "decode"))
    steps = (step_case(settings, *step) for step in STEPS)
    notes: dict[str, None] = {}

    def report(case: BenchCase, row: Row, work: Work) -> None:
        note(f"  {case}: {row.value:g} {row.unit}")
        notes.update(dict.fromkeys(work.notes))

    rows = run_cases(itertools.chain(*firsts, steps), report)
    bench.show(rows)
    for line in notes:
        print(f"  {line}")
    folder = setting.folder("speed")
    bench.write_rows(folder / "rows.json", rows)
    found = [("rows", str((folder / "rows.json").resolve()))]
    if find_spec("matplotlib") is None:
        found.append(("picture", "needs matplotlib (pip install matplotlib)"))
    else:
        found.append(("picture", str(draw(rows, folder / "speed.png").resolve())))
    return Part(record={"rows": [_record(row) for row in rows]}, facts=found, tables=[_table(rows)])


def _record(row: Row) -> dict[str, Any]:
    kept = ("suite", "case", "unit", "value", "peers", "ratio")
    return {name: getattr(row, name) for name in kept}


def _table(rows: Sequence[Row]) -> tuple[str, list[str], list[list[str]]]:
    """Ours, and each peer with how many times as fast we are."""
    peers = list(dict.fromkeys(name for row in rows for name in row.peers))
    cells = [
        [f"{row.suite} {row.case}, {row.unit}", f"{row.value:,.0f}"]
        + [
            f"{row.peers[name]:,.0f} (fastllm {row.ratio[name]:.2f}x)" if name in row.ratio else ""
            for name in peers
        ]
        for row in rows
    ]
    return "in turn, on the same model", ["", "fastllm", *peers], cells


def draw(rows: Sequence[Row], path: Path) -> Path:
    """Bars of ours and the peers, one panel a row, with the machine's bound as a dashed line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        len(rows), 1, figsize=(8, 0.9 + 1.5 * len(rows)), layout="constrained", squeeze=False
    )
    for axes, row in zip(panels[:, 0], rows, strict=True):
        _panel(axes, row)
    figure.suptitle(f"{rows[0].device}", fontsize=9, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def _panel(axes: Any, row: Row) -> None:
    values = {"fastllm": row.value, **row.peers}
    names = sorted(values, key=lambda name: values[name])
    colors = ["#1f6feb" if name == "fastllm" else "#b8c0cc" for name in names]
    bars = axes.barh(names, [values[name] for name in names], color=colors, height=0.62)
    labels = [
        f"{values[name]:,.0f}"
        + (f"  (fastllm {row.ratio[name]:.2f}x)" if name in row.ratio else "")
        for name in names
    ]
    axes.bar_label(bars, labels, padding=4, fontsize=9)
    axes.set_title(f"{row.suite}: {row.case}, {row.unit}", loc="left", fontsize=10)
    widest = max(values.values())
    if row.bound is not None and row.bound < 2.5 * widest:
        axes.axvline(row.bound, color="#d1242f", linestyle="--", linewidth=1)
        axes.annotate(
            "machine's bound", (row.bound, 1.0), xycoords=("data", "axes fraction"),
            xytext=(0, 3), textcoords="offset points", ha="center", va="bottom",
            fontsize=8, color="#d1242f",
        )  # fmt: skip
        widest = max(widest, row.bound)
    axes.set_xlim(0, 1.25 * widest)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
